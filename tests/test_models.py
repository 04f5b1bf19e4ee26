"""Architectures a little off the shape of Llama: what `all` adapts, what is random in training, what is missing."""

import json
import logging
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from stagewise.arguments import LoraArguments
from stagewise.errors import InputError
from stagewise.modeling.lora import attach_adapter, left_out
from stagewise.modeling.randomness import turn_randomness_off
from stagewise.modeling.token_loss import decoder_of, hidden_states_reproduce_logits
from tests.stages import FULL, losses, run_rm, run_sft, weights
from tests.zoo.measure import LN_2, WORKS, measure
from tests.zoo.models import save_model, tiny_model

LORA = LoraArguments(lora_rank=2, lora_dropout=0.0)
IDS = torch.arange(5, 37)[None]
VOCABULARY = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# One of each kind: tied; own dropout, learned positions and a projected state; soft caps and windows; a router that
# is a linear layer; decoders that are none; shared experts; a loss of routers; a state space; a recurrence.
SUITE = (
    "llama tied", "opt projected", "gemma2", "phimoe", "llama4_text", "modernbert-decoder", "deepseek_v3", "gpt_oss",
    "falcon_h1", "qwen3_next",
)  # fmt: skip


def kinds(paths) -> set[str]:
    """Last two names of paths."""
    return {".".join(path.split(".")[-2:]) for path in paths}


# The zoo.


@pytest.mark.parametrize("name", SUITE)
def test_every_stage_works_or_says_in_one_message_why_not(name):
    cells = measure(name)
    refused = {column: cell for column, cell in cells.items() if cell != WORKS}
    allowed = {"packed": "^--packing: ", "RM": "has no AutoModelForSequenceClassification|new layers beside its score"}
    assert all(re.search(allowed.get(column, "^$"), cell) for column, cell in refused.items()), refused
    assert {"LoRA all", "merge", "full", "DPO", "PPO"} <= {*cells}


# Where `all` puts adapters.


@pytest.mark.parametrize(
    ("name", "routers"),
    [
        ("phimoe", {"mlp.router"}),
        ("llama4_text", {"feed_forward.router"}),
        ("hunyuan_v1_moe", {"gate.wg"}),
        ("jetmoe", {"router.layer"}),
        ("gemma3n_text", {"altup.modality_router", "altup.correction_coefs", "altup.prediction_coefs"}),
        ("falcon_h1", {"mamba.out_proj"}),
        ("bamba", {"mamba.out_proj"}),
        ("mamba", {"mixer.out_proj", "mixer.x_proj", "mixer.dt_proj"}),
        ("bloom", set()),
        ("falcon", set()),
        ("qwen3_next", set()),
    ],
)
def test_routers_and_what_a_kernel_reads_are_left_out_and_named(name, routers, caplog):
    caplog.set_level(logging.INFO)
    model = tiny_model(name, **VOCABULARY)
    assert kinds(left_out(model)) == routers
    attach_adapter(model, LORA)
    assert all(router in caplog.text for router in routers)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "llama4_text", "qwen3_next", "jetmoe"])
def test_everything_else_is_adapted_and_plain_peft_reads_it(name, tmp_path):
    model = tiny_model(name, **VOCABULARY)
    linear = {path for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))} - {"lm_head"}
    adapted = attach_adapter(model, LORA)
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(path)))
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    found = {re.sub(r"\.lora_[AB]\.weight$", "", key).removeprefix("base_model.model.") for key in saved}
    assert linear - found == {*left_out(tiny_model(name, **VOCABULARY))}
    # of each layer of experts two parameters, one inside the other
    experts = {path for path in found - linear if "expert" in path or "mlp" in path or "attention" in path}
    assert experts
    expected = adapted.eval()(input_ids=IDS).logits
    plain = PeftModel.from_pretrained(tiny_model(name, **VOCABULARY), tmp_path).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected)


def test_a_state_space_layer_that_is_asked_for_is_refused_with_the_reason():
    with pytest.raises(InputError, match="mamba.out_proj is read by a kernel .* leave out_proj out"):
        attach_adapter(tiny_model("falcon_h1", **VOCABULARY), LoraArguments(target_modules="q_proj,out_proj"))


def test_layers_that_share_a_weight_are_left_out():
    model = tiny_model("zamba2", **VOCABULARY)
    shared = [path for path, why in left_out(model).items() if why.startswith("shares its weight")]
    assert shared
    assert all("shared_transformer" in path for path in shared)


# A matrix that embedding and head share.


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_side_of_a_tied_matrix_is_refused(name, tmp_path):
    flags = LoraArguments(target_modules=f"q_proj,{name}")
    with pytest.raises(InputError, match=f"{name} shares its matrix .* --modules_to_save embed_tokens"):
        attach_adapter(tiny_model("llama tied", **VOCABULARY), flags)
    attach_adapter(tiny_model("llama", **VOCABULARY), flags)
    # nor is an old one of that kind trained on
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", name])
    get_peft_model(tiny_model("llama tied", **VOCABULARY), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"--peft_path {tmp_path}: {name} shares its matrix"):
        attach_adapter(tiny_model("llama tied", **VOCABULARY), LoraArguments(peft_path=str(tmp_path)))


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head", "embed_tokens,lm_head"])
def test_a_grown_vocabulary_needs_both_matrices(saved, sft_file, tmp_path):
    base = save_model("llama", tmp_path)
    flags = ("--add_template_tokens", "True", "--modules_to_save", saved, "--max_steps", "1")
    if "," in saved:
        run_sft(str(base), sft_file, tmp_path / "out", *flags)
        return
    with pytest.raises(InputError, match=f"--modules_to_save embed_tokens,lm_head .{saved} alone"):
        run_sft(str(base), sft_file, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


# What is drawn at random in training.


@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "biogpt", "xglm", "seed_oss", "phimoe", "gpt_bigcode", "bloom", "mpt", "mixtral"]
)
def test_without_randomness_a_pass_in_training_is_one_in_evaluation(name):
    more = {"bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1}, "mixtral": {"router_jitter_noise": 0.2}}
    model = tiny_model(name, **VOCABULARY, **more.get(name, {}))
    config = model.config.to_dict()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=IDS).logits
        assert not torch.equal(model.train()(input_ids=IDS).logits, evaluated) or name in ("mpt", "phimoe")
        turn_randomness_off(model)
        torch.testing.assert_close(model.train()(input_ids=IDS).logits, evaluated)
    assert model.training
    assert model.config.to_dict() == config  # it is saved with the model


def test_dpo_names_what_differs(monkeypatch, preference_file, tmp_path):
    import dpo_training
    from stagewise.trainers import dpo

    base = save_model("opt", tmp_path)
    monkeypatch.setattr(dpo, "turn_randomness_off", lambda model: None)
    with pytest.raises(InputError, match="OPTForCausalLM draws random numbers in training"):
        dpo_training.main(
            ["--model_name_or_path", str(base), "--train_file_dir", preference_file, "--output_dir"]
            + [str(tmp_path / "out"), "--lora_dropout", "0", "--max_steps", "1"]
        )


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "modernbert-decoder"])
def test_dpo_of_models_that_ask_for_router_logits_or_do_more_begins_at_ln_2(name, preference_file, tmp_path):
    import dpo_training

    base = save_model(name, tmp_path)
    config = json.loads((base / "config.json").read_text())
    if name != "modernbert-decoder":
        (base / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
    dpo_training.main(
        ["--model_name_or_path", str(base), "--train_file_dir", preference_file, "--output_dir"]
        + [str(tmp_path / "out"), "--max_steps", "2", "--logging_steps", "1", "--use_peft", "False"]
    )
    assert losses(tmp_path / "out")[1] == pytest.approx(LN_2, abs=1e-3)


# Decoders.


def test_the_decoder_is_what_makes_hidden_states():
    for name in ("llama4_text", "modernbert-decoder", "gpt2", "opt projected", "gemma3_text"):
        model = tiny_model(name, **VOCABULARY).eval()
        hidden = decoder_of(model)(input_ids=IDS).last_hidden_state
        assert hidden.shape[:2] == IDS.shape
        assert hidden_states_reproduce_logits(model) == (name != "modernbert-decoder")


# Weights that are missing.


def damaged(base, folder, change):
    """A copy of a model's folder, its tensors changed."""
    shutil.copytree(base, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "begin with _orig_mod.; torch.compile"),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, "begin with module.; Distributed"),
        (lambda t: {f"base_model.model.{k}": v for k, v in t.items()}, "begin with base_model.model.; peft"),
        (lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}, "model.layers.1.* copy or download"),
        (lambda t: {k: v for k, v in t.items() if "lm_head" not in k}, "1 of 21 weights are missing.*lm_head.weight"),
    ],
    ids=["compiled", "distributed", "peft", "a layer", "the head"],
)
def test_a_base_that_lacks_weights_is_refused_with_their_names(change, message, sft_file, tmp_path):
    base = damaged(save_model("llama", tmp_path), tmp_path / "damaged", change)
    with pytest.raises(InputError, match=message):
        run_sft(base, sft_file, tmp_path / "out", "--add_template_tokens", "True", *FULL)
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_rightly_absent(sft_file, tmp_path):
    base = save_model("llama tied", tmp_path)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    run_sft(str(base), sft_file, tmp_path / "sft", "--max_steps", "1", "--add_template_tokens", "True")


def test_a_reward_model_without_its_head_is_refused(tiny_model_dir, preference_file, tmp_path):
    run_rm(tiny_model_dir, preference_file, tmp_path / "rm", "--max_steps", "1", *FULL)
    assert "score.weight" in weights(tmp_path / "rm")
    headless = damaged(tmp_path / "rm", tmp_path / "headless", lambda t: {k: t[k] for k in t if "score" not in k})
    with pytest.raises(InputError, match="score.weight"):
        run_rm(headless, preference_file, tmp_path / "again", "--max_steps", "1")


def test_an_adapter_without_its_score_head_is_refused(tiny_model_dir, preference_file, tmp_path):
    run_rm(tiny_model_dir, preference_file, tmp_path / "rm", "--max_steps", "1", "--lora_rank", "2")
    path = tmp_path / "rm" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "score" not in k}, path)
    with pytest.raises(InputError, match="score.weight is not in the adapter"):
        run_rm(tiny_model_dir, preference_file, tmp_path / "again", "--peft_path", str(tmp_path / "rm"))
