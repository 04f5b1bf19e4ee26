"""4-bit and 8-bit bases: what is quantized, gradients that evaluations leave alone, every stage, exact merges."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import inference
import merge_peft_adapter
from stagewise.arguments import LoraArguments, ModelArguments, StageTrainingArguments
from stagewise.errors import InputError
from stagewise.modeling.generation import load_for_inference
from stagewise.modeling.loading import load_causal_lm, load_reward_model, load_tokenizer
from stagewise.modeling.lora import attach_adapter
from stagewise.modeling.quantization import Quantization, plan_quantization, quantization_of, quantized_layers
from stagewise.run.merging import proof_rows
from tests.stages import assert_same_weights, losses, run_pt, run_rm, run_sft, weights

bnb = pytest.importorskip("bitsandbytes")

QLORA = ("--qlora", "True")
LORA = ("--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0")
SHORT = (*LORA, "--max_steps", "2", "--save_strategy", "no", "--report_to", "none", "--plot_loss", "False")
NF4, NF4_DOUBLE, INT8 = Quantization(4, "nf4"), Quantization(4, "nf4", double_quant=True), Quantization(8, "int8")
# A batch of one row; every position is trained.
BATCH = {"input_ids": torch.arange(20, 60)[None], "labels": torch.arange(20, 60)[None]}


def load(model_dir: str, quantization: Quantization | None, **arguments):
    args = ModelArguments(model_name_or_path=model_dir, **arguments)
    return load_causal_lm(args, load_tokenizer(args), trains_all=False, quantization=quantization)


def with_adapter(model, **arguments):
    """An adapter that is not nothing: B is drawn as well."""
    torch.manual_seed(0)
    peft_model = attach_adapter(model, LoraArguments(lora_rank=4, lora_dropout=0.0, **arguments))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return peft_model


def gradients(model) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**BATCH).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def stage(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


# --- what is quantized -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [NF4, NF4_DOUBLE, INT8], ids=str)
def test_linear_layers_are_quantized_and_only_the_adapter_is_trained(quantization, dtype, tiny_model_dir):
    model = with_adapter(load(tiny_model_dir, quantization, dtype=dtype))
    layers = quantized_layers(model)
    assert len(layers) == 2 * 7  # q, k, v, o, gate, up, down
    for layer in layers:
        if quantization.bits == 8:
            assert isinstance(layer, bnb.nn.Linear8bitLt)
            assert layer.weight.dtype == torch.int8
            continue
        assert isinstance(layer, bnb.nn.Linear4bit)
        state = layer.weight.quant_state
        assert layer.weight.numel() == layer.in_features * layer.out_features / 2  # two to a byte
        assert (state.quant_type, state.nested) == ("nf4", quantization.double_quant)
    base = model.get_base_model()
    for module in (base.get_input_embeddings(), base.get_output_embeddings(), base.model.norm):
        assert module.weight.dtype == getattr(torch, dtype)
    assert len(trained(model)) == 2 * len(layers)
    for name, parameter in trained(model).items():
        assert "lora_" in name
        assert parameter.dtype == torch.float32
    assert gradients(model).keys() == trained(model).keys()


@pytest.mark.parametrize(
    ("flags", "quantization", "compute_dtype"),
    [
        ({"load_in_4bit": True}, NF4, "float32"),
        ({"qlora": True, "load_in_4bit": True, "dtype": "bfloat16"}, NF4_DOUBLE, "bfloat16"),
        ({"qlora": True, "bf16": True}, NF4_DOUBLE, "bfloat16"),
        ({"load_in_8bit": True}, INT8, None),
        ({}, None, None),
    ],
)
def test_flags_and_what_they_give(flags, quantization, compute_dtype, tiny_model_dir, tmp_path):
    flags = dict(flags)
    args = StageTrainingArguments(output_dir=str(tmp_path), report_to="none", bf16=flags.pop("bf16", False))
    planned = plan_quantization(ModelArguments(model_name_or_path=tiny_model_dir, **flags), LoraArguments(), args)
    found = quantization_of(load(tiny_model_dir, planned, dtype=flags.get("dtype", "auto")))
    assert str(found) == str(planned) == str(quantization)
    assert (found and found.compute_dtype) == compute_dtype


def test_the_reward_models_head_is_neither_quantized_nor_rounded(tiny_model_dir):
    args = ModelArguments(model_name_or_path=tiny_model_dir, dtype="bfloat16")
    model = attach_adapter(
        load_reward_model(args, load_tokenizer(args), False, NF4_DOUBLE), LoraArguments(), "SEQ_CLS"
    )
    heads = [parameter for name, parameter in trained(model).items() if ".score." in name]
    assert len(quantized_layers(model)) == 14
    assert [(head.dtype, type(head)) for head in heads] == [(torch.float32, torch.nn.Parameter)]


def tiny(config_class: str, tokenizer, **sizes):
    """A model of another family with the same tokenizer; attention layers of 64x64."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), hidden_size=64, **sizes)
    return AutoModelForCausalLM.from_config(config)


FAMILIES = {
    "Qwen3Config": {"num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    "MixtralConfig": {"num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
                      "num_key_value_heads": 4, "num_local_experts": 4, "max_position_embeddings": 256},
    "BloomConfig": {"n_layer": 2, "n_head": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "layers"), [("Qwen3Config", 14), ("MixtralConfig", 8), ("BloomConfig", 8)], ids=FAMILIES
)
def test_other_families_train(family, layers, tokenizer, sft_file, tmp_path, capsys):
    """Bloom: query_key_value, dense and two in the MLP, a layer. Mixtral: attention alone, and the log says so."""
    tiny(family, tokenizer, **FAMILIES[family]).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run_sft(str(tmp_path / "base"), sft_file, tmp_path / "run", *SHORT, *QLORA)
    log = capsys.readouterr().out
    assert f"4-bit nf4 with double quantization: {layers} linear layers" in log
    assert ("bitsandbytes does not quantize" in log) == (family == "MixtralConfig")
    assert ("mlp.experts.gate_up_proj" in log) == (family == "MixtralConfig")
    assert losses(tmp_path / "run")[1] == pytest.approx(6.4, abs=0.5)  # ln 600
    assert any(tensor.any() for name, tensor in weights(tmp_path / "run").items() if "lora_B" in name)


# --- evaluations leave training alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [NF4, NF4_DOUBLE, INT8], ids=str)
def test_an_evaluation_leaves_gradients_and_values_as_they_were(quantization, tiny_model_dir):
    """bitsandbytes alone repacks 4-bit weights at an evaluation, on CPUs with AVX512-BF16."""
    model = with_adapter(load(tiny_model_dir, quantization))
    wanted = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=BATCH["input_ids"])
    found = gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("flags", [QLORA, ("--load_in_8bit", "True")], ids=["qlora", "8 bits"])
def test_training_with_evaluations_equals_training_without(flags, tiny_model_dir, text_file, tmp_path):
    flags = (*SHORT, *flags, "--max_steps", "5", "--validation_file_dir", text_file, "--max_eval_samples", "4")
    run_pt(tiny_model_dir, text_file, tmp_path / "without", *flags)
    run_pt(
        tiny_model_dir, text_file, tmp_path / "with", *flags, "--eval_strategy", "steps", "--eval_steps", "1",
        "--eval_on_start", "True",
    )  # fmt: skip
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert_same_weights(tmp_path / "with", tmp_path / "without", rtol=0, atol=0)


@pytest.mark.parametrize("kwargs", ["{}", '{"use_reentrant": true}'])
def test_gradient_checkpointing_changes_nothing(kwargs, tiny_model_dir, sft_file, tmp_path):
    run_sft(tiny_model_dir, sft_file, tmp_path / "plain", *SHORT, *QLORA)
    run_sft(
        tiny_model_dir, sft_file, tmp_path / "less", *SHORT, *QLORA, "--gradient_checkpointing", "True",
        "--gradient_checkpointing_kwargs", kwargs,
    )  # fmt: skip
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert_same_weights(tmp_path / "plain", tmp_path / "less", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags", [(*QLORA, "--bf16", "True"), ("--load_in_8bit", "True")], ids=["bf16", "8 bits"])
def test_rounding_in_quantized_layers_passes_for_no_leak_of_packed_rows(flags, tiny_model_dir, sft_file, tmp_path):
    run_sft(tiny_model_dir, sft_file, tmp_path, *SHORT, *flags, "--packing", "True")
    assert len(losses(tmp_path)) == 2


# --- the stages ------------------------------------------------------------------------------------------------------


def run_dpo(model_dir: str, pairs: str, output_dir: Path, *flags: str) -> dict:
    import dpo_training

    return dpo_training.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", pairs, "--output_dir", str(output_dir), *SHORT]
        + ["--template_name", "chatml", "--max_length", "128", "--logging_steps", "1", *flags]
    )


def run_ppo(model_dir: str, prompts: str, output_dir: Path, *flags: str) -> dict:
    import ppo_training

    return ppo_training.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", prompts, "--output_dir", str(output_dir), *SHORT]
        + ["--template_name", "chatml", "--max_new_tokens", "6", "--per_device_train_batch_size", "4", *flags]
    )


@pytest.fixture(scope="module")
def reward_function(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text("def length(prompts, completions):\n    return [len(text) / 10 for text in completions]\n")
    return f"{path}:length"


@pytest.mark.parametrize("name", ["pt", "sft", "rm", "dpo", "ppo"])
def test_every_stage_trains_an_adapter(
    name, tiny_model_dir, text_file, sft_file, preference_file, reward_function, tmp_path
):
    run, data = {
        "pt": (run_pt, text_file), "sft": (run_sft, sft_file), "rm": (run_rm, preference_file),
        "dpo": (run_dpo, preference_file), "ppo": (run_ppo, sft_file),
    }[name]  # fmt: skip
    flags = ("--reward_function", reward_function) if name == "ppo" else ()
    metrics = run(tiny_model_dir, data, tmp_path, *SHORT, *QLORA, *flags, "--learning_rate", "5e-3")
    assert metrics["train_loss"] == metrics["train_loss"]  # a number
    entry = {"bits": 4, "quant_type": "nf4", "double_quant": True, "compute_dtype": "float32"}
    assert stage(tmp_path)["quantization"] == entry
    tensors = weights(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    assert "4-bit nf4" in (tmp_path / "README.md").read_text()


def test_a_run_without_quantization_says_so(tiny_model_dir, sft_file, tmp_path):
    run_sft(tiny_model_dir, sft_file, tmp_path, *SHORT)
    assert stage(tmp_path)["quantization"] is None


@pytest.mark.parametrize(
    "flags", [QLORA, ("--load_in_8bit", "True", "--optim", "adamw_8bit")], ids=["qlora", "8 bits"]
)
def test_resume_equals_no_interruption(flags, tiny_model_dir, sft_file, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = (
        *SHORT,
        *flags,
        "--lora_dropout",
        "0.1",
        "--max_steps",
        "4",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
    )
    run_sft(tiny_model_dir, sft_file, whole, *flags)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run_sft(tiny_model_dir, sft_file, resumed, *flags, "--resume_from_checkpoint", "True")
    assert losses(resumed) == losses(whole)
    assert_same_weights(whole, resumed, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_optimizers_of_bitsandbytes_run(optimizer, tiny_model_dir, sft_file, tmp_path):
    run_sft(tiny_model_dir, sft_file, tmp_path, *SHORT, *QLORA, "--optim", optimizer, "--learning_rate", "1e-2")
    assert losses(tmp_path)[2] < losses(tmp_path)[1]


def test_dpo_trains_in_float32_and_starts_from_the_very_adapter(tiny_model_dir, preference_file, qlora_dir, tmp_path):
    """trl rounds adapters on quantized bases to bfloat16: an old adapter would not be what it was."""
    run_dpo(
        tiny_model_dir,
        preference_file,
        tmp_path / "still",
        *QLORA,
        "--peft_path",
        str(qlora_dir),
        "--learning_rate",
        "0",
    )
    old, new = weights(qlora_dir), weights(tmp_path / "still")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert losses(tmp_path / "still")[2] == pytest.approx(0.693147, abs=1e-5)
    # 1e-6 is lost in bfloat16 where weights are near 0.1
    run_dpo(tiny_model_dir, preference_file, tmp_path / "fine", *QLORA, "--learning_rate", "1e-6")
    assert any((t != t.bfloat16().float()).any() for name, t in weights(tmp_path / "fine").items() if "lora_A" in name)


def test_a_reward_model_joins_the_base_it_was_trained_on(tiny_model_dir, preference_file, sft_file, tmp_path, capsys):
    for name, flags in (("quantized", QLORA), ("plain", ())):
        run_rm(tiny_model_dir, preference_file, tmp_path / name, *SHORT, *flags)
    run_ppo(tiny_model_dir, sft_file, tmp_path / "1", *QLORA, "--reward_model_path", str(tmp_path / "quantized"))
    assert "on the policy's own base" in capsys.readouterr().out
    run_ppo(tiny_model_dir, sft_file, tmp_path / "2", *QLORA, "--reward_model_path", str(tmp_path / "plain"))
    log = capsys.readouterr().out
    assert "was trained on weights that were not quantized, the policy has 4-bit nf4" in log
    assert "a model of its own in memory" in log


# --- merging and inference -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qlora_dir(tiny_model_dir, sft_file, tmp_path_factory):
    """An adapter with a clear effect, trained on a base that was loaded in bfloat16 from a float32 checkpoint."""
    folder = tmp_path_factory.mktemp("qlora") / "out"
    flags = ("--max_steps", "16", "--learning_rate", "1e-2", "--dtype", "bfloat16")
    run_sft(tiny_model_dir, sft_file, folder, *SHORT, *QLORA, *flags)
    return folder


def merge(base, adapter, output, *flags: str) -> dict:
    return merge_peft_adapter.main(
        ["--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(output), *flags]
    )


def trained_logits(model_dir: str, adapter: Path, dtype: str = "bfloat16") -> list[torch.Tensor]:
    """Quantized base + adapter, without anything of ours: the base from from_pretrained, computing in float32."""
    from peft import PeftModel

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, quantization_config=config)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif not isinstance(module, torch.nn.Sequential):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return logits(PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(model_dir))


@torch.no_grad()
def logits(model, tokenizer) -> list[torch.Tensor]:
    return [model(row[None]).logits for row in proof_rows(tokenizer)]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def test_merged_is_the_quantized_base_with_the_adapter(tiny_model_dir, qlora_dir, tmp_path):
    report = merge(tiny_model_dir, qlora_dir, tmp_path / "m")
    assert report["max_logit_difference"] < 1e-5
    assert report["adapter_effect"] > 0.5
    assert report["merged_onto"] == "trained"
    assert report["quantization"] == stage(qlora_dir)["quantization"]
    assert report["quantization"]["compute_dtype"] == "bfloat16"
    assert "base_difference" not in report
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not hasattr(merged.config, "quantization_config")
    assert {type(module) for module in merged.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    assert stage(tmp_path / "m")["quantization"] is None
    found = logits(merged, AutoTokenizer.from_pretrained(tmp_path / "m"))
    assert largest_difference(found, trained_logits(tiny_model_dir, qlora_dir)) < 1e-5
    # the type that the weights were loaded in is part of what training saw
    assert largest_difference(found, trained_logits(tiny_model_dir, qlora_dir, "float32")) > 1e-3


def test_merging_onto_the_original_weights_is_another_model(tiny_model_dir, qlora_dir, tmp_path):
    report = merge(tiny_model_dir, qlora_dir, tmp_path / "m", "--merge_onto", "original")
    assert report["merged_onto"] == "original"
    assert report["max_logit_difference"] < 1e-5  # the sum is right
    difference = report["base_difference"]
    assert difference["max_logit_difference"] > 1e-2
    assert 0.5 < difference["top1_agreement"] < 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    found = logits(merged, AutoTokenizer.from_pretrained(tmp_path / "m"))
    wanted = trained_logits(tiny_model_dir, qlora_dir)
    assert largest_difference(found, wanted) == pytest.approx(difference["max_logit_difference"], rel=0.1)


@pytest.mark.parametrize(
    "flags", [("--use_dora", "True"), ("--modules_to_save", "embed_tokens,norm")], ids=lambda f: f[0]
)
def test_adapters_that_are_more_than_two_matrices_merge(flags, tiny_model_dir, sft_file, tmp_path):
    steps = ("--max_steps", "8", "--learning_rate", "1e-2")
    run_sft(tiny_model_dir, sft_file, tmp_path / "run", *SHORT, *QLORA, *steps, *flags)
    report = merge(tiny_model_dir, tmp_path / "run", tmp_path / "m")
    assert report["max_logit_difference"] < 1e-4
    assert report["saved"]["top1_agreement"] == 1.0


def test_8_bit_layers_round_what_comes_in_too(tiny_model_dir, sft_file, tmp_path):
    steps = ("--max_steps", "8", "--learning_rate", "5e-3")
    run_sft(tiny_model_dir, sft_file, tmp_path / "run", *SHORT, "--load_in_8bit", "True", *steps)
    report = merge(tiny_model_dir, tmp_path / "run", tmp_path / "m")
    assert report["quantization"] == {"bits": 8, "quant_type": "int8", "double_quant": False, "compute_dtype": None}
    assert 1e-5 < report["max_logit_difference"] < 0.3 * report["adapter_effect"]
    assert report["top1_agreement"] > 0.9


def test_a_reward_model_keeps_its_head_and_its_scores(tiny_model_dir, preference_file, tmp_path):
    steps = ("--max_steps", "6", "--learning_rate", "1e-2")
    run_rm(tiny_model_dir, preference_file, tmp_path / "rm", *SHORT, *QLORA, *steps)
    report = merge(tiny_model_dir, tmp_path / "rm", tmp_path / "m")
    assert report["max_logit_difference"] < 1e-5
    scores = {}
    rows = [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"No {i}"}]} for i in range(4)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("rm", "m"):
        inference.main(
            ["--model_name_or_path", str(tmp_path / name), "--score", "--input_file", str(tmp_path / "in.jsonl")]
            + ["--output_file", str(tmp_path / f"{name}.jsonl")]
        )
        scores[name] = [json.loads(line)["score"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert scores["rm"] == pytest.approx(scores["m"], abs=1e-4)


def test_inference_quantizes_the_base_as_training_did(tiny_model_dir, qlora_dir):
    model, tokenizer = load_for_inference(str(qlora_dir), dtype="float32")
    assert str(quantization_of(model.get_base_model())) == str(NF4_DOUBLE)
    assert largest_difference(logits(model, tokenizer), trained_logits(tiny_model_dir, qlora_dir)) < 1e-5
    as_trained, _ = load_for_inference(tiny_model_dir, str(qlora_dir))
    assert quantization_of(as_trained.get_base_model()).compute_dtype == "bfloat16"


# --- checkpoints that are saved quantized ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_dir(tiny_model_dir, tokenizer, tmp_path_factory):
    """The tiny model, saved in nf4 with double quantization."""
    folder = tmp_path_factory.mktemp("nf4") / "model"
    load(tiny_model_dir, NF4_DOUBLE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_saved_quantized_model_needs_no_flag(saved_dir, tiny_model_dir, sft_file, tmp_path):
    for name, base, flags in (("saved", saved_dir, ()), ("made", tiny_model_dir, QLORA), ("both", saved_dir, QLORA)):
        run_sft(base, sft_file, tmp_path / name, *SHORT, *flags, "--learning_rate", "1e-2")
    assert stage(tmp_path / "saved")["quantization"] == stage(tmp_path / "made")["quantization"]
    assert losses(tmp_path / "saved") == losses(tmp_path / "made") == losses(tmp_path / "both")
    report = merge(saved_dir, tmp_path / "saved", tmp_path / "m")
    assert report["max_logit_difference"] < 1e-5
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "m"), "quantization_config")
    with pytest.raises(InputError, match="is saved quantized; give the model it was made from"):
        merge(saved_dir, tmp_path / "saved", tmp_path / "o", "--merge_onto", "original")


def test_an_adapter_of_full_weights_is_not_put_on_quantized_ones(saved_dir, tiny_model_dir, sft_file, tmp_path):
    run_sft(tiny_model_dir, sft_file, tmp_path / "run", *SHORT)
    with pytest.raises(InputError, match="was trained on weights that were not quantized"):
        merge(saved_dir, tmp_path / "run", tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --- what cannot be had ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*QLORA, "--load_in_8bit", "True"), "--load_in_8bit: found beside --qlora"),
        (("--load_in_4bit", "True", "--load_in_8bit", "True"), "--load_in_8bit: found beside --load_in_4bit"),
        ((*QLORA, "--use_peft", "False"), "--qlora: quantized weights cannot be trained"),
        ((*QLORA, "--modules_to_save", "q_proj"), "--modules_to_save q_proj: .*q_proj has quantized weights"),
        (
            ("--load_in_8bit", "True", "--use_dora", "True"),
            "--use_dora: peft cannot do it on 8-bit int8 weights on CPU",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(flags, message, tiny_model_dir, sft_file, tmp_path):
    with pytest.raises(InputError, match=message):
        run_sft(tiny_model_dir, sft_file, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--load_in_8bit", "True"), "asks for 8-bit int8, and .* is saved as 4-bit nf4 with double quantization"),
        (("--use_peft", "False"), "are saved quantized and cannot be trained"),
    ],
)
def test_flags_that_contradict_the_checkpoint(flags, message, saved_dir, sft_file, tmp_path):
    with pytest.raises(InputError, match=message):
        run_sft(saved_dir, sft_file, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_method_takes_no_flag(tiny_model_dir, sft_file, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is quantized already, by gptq"):
        run_sft(str(tmp_path / "gptq"), sft_file, tmp_path / "out", *QLORA)


def test_random_weights_are_not_quantized(tiny_model_dir):
    with pytest.raises(InputError, match="--qlora: there is nothing to quantize in random weights"):
        ModelArguments(config_name=tiny_model_dir, qlora=True)


def test_without_bitsandbytes_the_error_says_what_to_install(
    tiny_model_dir, sft_file, qlora_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("stagewise.modeling.quantization.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--qlora: needs bitsandbytes.*pip install"):
        run_sft(tiny_model_dir, sft_file, tmp_path / "out", *QLORA)
    with pytest.raises(InputError, match="needs bitsandbytes"):
        load_for_inference(str(qlora_dir))


def test_weights_that_are_sharded_are_not_quantized(tiny_model_dir, tmp_path):
    from transformers.integrations import HfDeepSpeedConfig

    args = StageTrainingArguments(output_dir=str(tmp_path), report_to="none")
    model_args = ModelArguments(model_name_or_path=tiny_model_dir, load_in_4bit=True)
    keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    with pytest.raises(InputError, match="--load_in_4bit: ZeRO-3 cannot share out quantized weights"):
        plan_quantization(model_args, LoraArguments(), args)
    del keep
    args.fsdp = "full_shard"
    with pytest.raises(InputError, match="--load_in_4bit: FSDP cannot share out quantized weights"):
        plan_quantization(model_args, LoraArguments(), args)
