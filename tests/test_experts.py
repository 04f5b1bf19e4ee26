"""Mixtures of experts: where adapters go, the loss of the routers, training, merging."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from stagewise.arguments import LoraArguments
from stagewise.errors import InputError
from stagewise.modeling.experts import find_router_loss
from stagewise.modeling.lora import attach_adapter
from stagewise.modeling.token_loss import install_token_loss
from tests.architectures import tiny_model
from tests.stages import FULL, losses, run_pt, run_rm, run_sft, weights

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LORA = ("--lora_rank", "2", "--lora_dropout", "0")


def adapted(model) -> set[str]:
    """Last names of the layers and parameters with an adapter, those of experts as experts.<parameter>."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = set()
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module.parameter_name != "weight":
            names.add(f"experts.{module.parameter_name}")
        elif isinstance(module, BaseTunerLayer):
            names.add(path.rpartition(".")[-1])
    return names


@pytest.fixture(scope="session")
def mixture_dirs(tiny_model_dir, tmp_path_factory) -> dict[str, str]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    folders = {}
    for name in ("mixtral", "qwen3_moe"):
        folders[name] = str(tmp_path_factory.mktemp(name))
        tiny_model(name, vocab_size=len(tokenizer)).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


# Adapters.


@pytest.mark.parametrize("name", MIXTURES)
def test_all_is_linear_layers_and_experts_without_routers(name):
    shared = {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"} if name == "qwen2_moe" else set()
    model = attach_adapter(tiny_model(name), LoraArguments(lora_dropout=0.0))
    assert adapted(model) == ATTENTION | shared | {"experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("experts", {"experts.gate_up_proj", "experts.down_proj"}),
        ("o_proj,gate_up_proj", {"o_proj", "experts.gate_up_proj"}),
    ],
)
def test_names_choose_attention_or_experts(spec, expected):
    assert (
        adapted(attach_adapter(tiny_model("mixtral"), LoraArguments(target_modules=spec, lora_dropout=0.0)))
        == expected
    )


@pytest.mark.parametrize("options", [{"lora_dropout": 0.05}, {"lora_dropout": 0.0, "use_dora": True}])
def test_what_adapters_of_experts_cannot_have_is_refused_with_the_remedy(options):
    with pytest.raises(InputError, match="--target_modules q_proj,k_proj,v_proj,o_proj"):
        attach_adapter(tiny_model("mixtral"), LoraArguments(**options))
    attach_adapter(tiny_model("mixtral"), LoraArguments(target_modules="q_proj,v_proj", **options))


@pytest.mark.parametrize("spec", ["gate", "gate_proj", "experts,w4"])
def test_names_that_are_not_there_are_refused(spec):
    with pytest.raises(InputError, match="no linear layer and no experts named"):
        attach_adapter(tiny_model("mixtral"), LoraArguments(target_modules=spec, lora_dropout=0.0))


def test_dense_layers_that_peft_takes_for_experts_have_adapters_too():
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    peft_model = attach_adapter(model, LoraArguments(lora_dropout=0.0))
    experts = {"experts.gate_up_proj", "experts.down_proj"}
    assert adapted(peft_model) == ATTENTION | experts | {"gate_proj", "up_proj", "down_proj"}


# The loss of the routers.


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (rows, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradients_are_those_of_transformers(name, checkpointing):
    model, inputs = tiny_model(name, router_aux_loss_coef=0.5).train(), batch()
    theirs = model(**inputs, output_router_logits=True)
    theirs.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    install_token_loss(model, router_loss=find_router_loss(model, 0.5))
    if checkpointing:
        model.gradient_checkpointing_enable()
    ours = model(**inputs)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.router_loss, theirs.aux_loss.detach())
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)


def test_batches_of_a_step_share_the_coefficient_as_their_tokens_share_the_loss():
    model = tiny_model("mixtral").train()
    install_token_loss(model, router_loss=find_router_loss(model, 1.0))
    inputs = batch()
    count = int((inputs["labels"][:, 1:] != -100).sum())
    whole, half = model(**inputs), model(**inputs, num_items_in_batch=2 * count)
    torch.testing.assert_close(half.loss, whole.loss / 2)
    assert torch.equal(half.router_loss, whole.router_loss)


def test_routers_that_use_all_experts_alike_have_the_least_loss():
    router_loss = find_router_loss(tiny_model("mixtral"), 1.0)
    alike = torch.eye(4).repeat(6, 1) * 1e-6  # the first choice goes round, the probabilities are equal
    assert router_loss((alike,), None).item() == pytest.approx(2.0, rel=1e-3)
    one_sided = torch.tensor([[50.0, 0.0, -50.0, -50.0]]).repeat(24, 1)
    assert router_loss((one_sided,), None).item() == pytest.approx(4.0, rel=1e-3)


def test_evaluation_has_no_router_loss():
    model = tiny_model("mixtral")
    install_token_loss(model, router_loss=find_router_loss(model, 1.0))
    plain = tiny_model("mixtral")
    install_token_loss(plain)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch()).loss, plain.eval()(**batch()).loss)


@pytest.mark.parametrize(
    ("changes", "coefficient", "expected"),
    [
        ({}, None, None),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, None, 0.02),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, 0.0, None),
        ({}, 0.1, 0.1),
    ],
)
def test_the_flag_wins_over_the_configuration(changes, coefficient, expected):
    found = find_router_loss(tiny_model("mixtral", **changes), coefficient)
    assert (found and found.coefficient) == expected


def test_a_dense_model_has_no_routers_to_balance(tiny_model_dir, text_file, tmp_path):
    with pytest.raises(InputError, match="--router_aux_loss_coef 0.01: LlamaForCausalLM has no load-balancing loss"):
        run_pt(tiny_model_dir, text_file, tmp_path / "out", *FULL, "--router_aux_loss_coef", "0.01")


def test_other_stages_refuse_it(tiny_model_dir, preference_file, tmp_path):
    with pytest.raises(InputError, match="--router_aux_loss_coef: not for reward_modeling.py"):
        run_rm(tiny_model_dir, preference_file, tmp_path / "out", "--router_aux_loss_coef", "0.01")


# Runs.


@pytest.mark.parametrize("packing", ["True", "False"])
def test_a_run_logs_and_lowers_the_router_loss(packing, mixture_dirs, sft_file, tmp_path):
    out = tmp_path / "out"
    flags = ("--packing", packing, "--max_steps", "25", "--logging_steps", "5", "--router_aux_loss_coef", "5")
    run_sft(mixture_dirs["mixtral"], sft_file, out, *FULL, *flags)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    found = [entry["router_loss"] for entry in history if "router_loss" in entry]
    assert len(found) == 5
    # 2 is the least there is for two of four experts
    assert found[0] > found[-1] >= 2.0 - 1e-3
    assert all("router_loss" not in entry for entry in history if "eval_loss" in entry)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_train_merge_and_go_on(name, mixture_dirs, sft_file, tmp_path):
    import merge_peft_adapter

    out, merged = tmp_path / "out", tmp_path / "merged"
    run_sft(mixture_dirs[name], sft_file, out, *LORA, "--max_steps", "3")
    assert any("experts" in key for key in weights(out))
    first = losses(out)
    report = merge_peft_adapter.main(
        ["--base_model", mixture_dirs[name], "--lora_model", str(out), "--output_dir", str(merged)]
    )
    assert report["max_logit_difference"] < 1e-4
    assert report["adapter_effect"] > 0
    run_sft(str(merged), sft_file, tmp_path / "again", *LORA, "--max_steps", "1")
    assert losses(tmp_path / "again")[1] < first[1]
