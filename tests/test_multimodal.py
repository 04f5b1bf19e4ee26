"""Models that also read images or sounds: text trains their language model, and everything else stays as it is."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    Qwen3_5ForConditionalGeneration,
)

import merge_peft_adapter
import supervised_finetuning
from stagewise.arguments import LoraArguments
from stagewise.modeling.experts import every_pass_trains_all
from stagewise.modeling.lora import attach_adapter, expert_parameters
from stagewise.modeling.model_shape import read_shape
from stagewise.modeling.multimodal import beside_language
from stagewise.modeling.quantization import quantized_layers
from stagewise.modeling.token_loss import decoder_of, install_token_loss
from tests.stages import FULL, losses, weights
from tests.test_distributed import check, torchrun
from tests.zoo.measure import WORKS, measure
from tests.zoo.models import SHELLS, save_model, tiny_config, tiny_model

LLAMA_LAYERS = {
    f"{part}.{name}_proj" for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for name in names
}
COMPANIONS = {
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": '{"processor_class": "Gemma3Processor"}',
    "video_preprocessor_config.json": "{}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "LICENSE": "Terms.",
}


def add_beside(folder: Path) -> Path:
    """What such a folder has beside the model: files, and tensors that transformers passes over."""
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> folder; made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = add_beside(save_model(name, folder))
        return made[name]

    return base


def train(base: Path, data: str, out: Path, *flags: str) -> list[str]:
    """SFT with the tokenizer's own template, and its flags."""
    every = [
        "--model_name_or_path", str(base), "--train_file_dir", data, "--output_dir", str(out), "--do_train", "True",
        "--model_max_length", "256", "--learning_rate", "5e-3", "--logging_steps", "1", "--save_strategy", "no",
        "--per_device_train_batch_size", "8", "--lora_dropout", "0", *flags,
    ]  # fmt: skip
    supervised_finetuning.main(every)
    return every


def merge(base: Path, adapter: Path, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    merge_peft_adapter.main(
        ["--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(output), *flags]
    )
    return load_file(output / "model.safetensors")


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype for name in one)
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen2_5_vl", "llama4"])
def test_every_stage_of_a_shell_works_or_says_why_not(name):
    refused = {column: cell for column, cell in measure(name).items() if cell != WORKS}
    assert refused.keys() <= {"packed", "RM"}
    assert refused.get("packed", "--packing: ").startswith("--packing: ")
    assert "has no AutoModelForSequenceClassification" in refused.get(
        "RM", "has no AutoModelForSequenceClassification"
    )


# What is trained.


@pytest.mark.parametrize("how", ["an adapter", "all weights"])
@pytest.mark.parametrize("name", SHELLS)
def test_what_is_trained_is_what_text_comes_through(name, how):
    """Every trained parameter gets a gradient, and none of a tower or projector is trained."""
    model = tiny_model(name, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    towers = ("vision", "visual", "audio", "projector", "connector", "image_newline")
    assert any(any(tower in path for tower in towers) for path in beside_language(model))
    settings = LoraArguments(lora_rank=2, lora_dropout=0.0, use_peft=how == "an adapter")
    model = attach_adapter(model, settings)
    assert every_pass_trains_all(model) == (not expert_parameters(model))
    trained = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [path for path in trained if any(tower in path for tower in towers)]
    model(input_ids=torch.arange(5, 37)[None]).logits.sum().backward()
    assert not [path for path, parameter in trained.items() if parameter.grad is None]


def test_all_weights_are_those_of_the_language_model(bases, tmp_path, sft_file, capsys):
    base = bases("gemma3")
    train(base, sft_file, tmp_path, *FULL, "--max_steps", "1")
    said = capsys.readouterr().out
    assert "text does not come through them: model.vision_tower, model.multi_modal_projector" in said
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() - after.keys() == {"mtp.fc.weight"}
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {name for name in after if "vision_tower" in name or "multi_modal_projector" in name}
    for name, text in COMPANIONS.items():
        assert (tmp_path / name).read_text() == text


def test_tensors_that_training_drops_are_named(bases, tmp_path, sft_file, capsys):
    train(bases("qwen3_5"), sft_file, tmp_path, *FULL, "--max_steps", "1")
    said = capsys.readouterr().out
    assert "1 tensors that Qwen3_5ForConditionalGeneration has no use for" in said
    assert "will not be in what is saved: mtp.fc.weight" in said


def test_parameters_that_are_trained_are_counted(bases):
    """By hand: the language model of the tiny Gemma 3, whose head is its embedding."""
    config = tiny_config("gemma3", vocab_size=100)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8  # q, k and v, o, norms of queries and keys
    layer = attention + 3 * 32 * 48 + 4 * 32
    language = 100 * 32 + 2 * layer + 32
    shape = read_shape(config, LoraArguments(use_peft=False))
    assert shape.trainable == language
    assert shape.parameters > language
    assert shape.trainable_embedding == 100 * 32


@pytest.mark.parametrize("how", [(), FULL], ids=["lora", "full"])
def test_two_processes_with_gradient_checkpointing(how, bases, tmp_path, sft_file):
    """As one process without it. A parameter without a gradient would end the second step of two."""
    one = train(bases("gemma3"), sft_file, tmp_path / "one", *how, "--max_steps", "3")
    flags = [*one, "--per_device_train_batch_size", "4", "--gradient_checkpointing", "True"]
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "two")
    check(torchrun("supervised_finetuning.py", *flags))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3}
    assert all(abs(one[step] - two[step]) < 1e-4 for step in one)
    assert one[3] < one[1]


# The merge.


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_a_merge_changes_what_has_an_adapter_and_nothing_else(name, bases, tmp_path, sft_file):
    base = bases(name)
    train(base, sft_file, tmp_path / "adapter", "--max_steps", "1")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")
    layers = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in weights(tmp_path / "adapter")}
    in_files = {  # those of Gemma 3 are older
        f"{layer.replace('model.language_model', 'language_model.model')}.weight"
        if name == "gemma3"
        else f"{layer}.weight"
        for layer in layers
    }
    assert changed(load_file(base / "model.safetensors"), merged) == in_files
    assert all(layer.startswith("model.language_model.layers.") for layer in layers)
    for file, text in COMPANIONS.items():
        assert (tmp_path / "merged" / file).read_text() == text
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged"))
    assert before["architectures"] == after["architectures"]
    assert before["vision_config"] == after["vision_config"]


@torch.no_grad()
def test_an_adapter_of_the_language_model_alone(bases, tmp_path):
    """AutoModelForCausalLM gives of Qwen3.5 the language model alone, whose layers have other names: such an adapter
    is merged into the whole model."""
    base, ids = bases("qwen3_5"), torch.arange(5, 37)[None]
    text = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(text, settings)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.eval()(input_ids=ids).logits
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert changed(load_file(base / "model.safetensors"), merged) == {
        f"model.language_model.layers.{layer}.{name}.weight"
        for layer, name in [(1, "self_attn.q_proj"), (0, "mlp.down_proj"), (1, "mlp.down_proj")]
    }
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(whole(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flag", ["--qlora", "--load_in_8bit"])
def test_towers_are_not_quantized_and_come_back_as_they_were(flag, bases, tmp_path, sft_file):
    base = bases("gemma3")
    out = tmp_path / "adapter"
    train(base, sft_file, out, flag, "True", "--max_steps", "1")
    from stagewise.modeling.generation import load_for_inference

    model, _ = load_for_inference(str(base), str(out))
    packed = {path for path, module in model.named_modules() if module in set(quantized_layers(model))}
    assert len(packed) == 2 * len(LLAMA_LAYERS)
    assert all("language_model" in path for path in packed)
    merged, before = merge(base, out, tmp_path / "merged"), load_file(base / "model.safetensors")
    assert not [name for name in changed(before, merged) if "language_model" not in name]


def test_experts_that_files_have_transposed(tmp_path):
    """As the first files of Qwen3-VL's mixtures have them: read, merged and written in the same way."""
    base = save_model("qwen3_vl_moe", tmp_path)
    tensors = load_file(base / "model.safetensors")
    turned = {k: v.transpose(1, 2).contiguous() if ".experts.down_proj" in k else v for k, v in tensors.items()}
    assert {turned[k].shape for k in turned if ".experts.down_proj" in k} == {(4, 16, 32)}
    save_file(turned, base / "model.safetensors", {"format": "pt"})
    model = AutoModelForMultimodalLM.from_pretrained(base)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    torch.testing.assert_close(model.get_parameter(name).detach(), tensors[name])
    adapter = LoraConfig(r=2, lora_alpha=2, target_parameters=[name], target_modules=[], init_lora_weights=False)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, adapter)
    peft_model.save_pretrained(tmp_path / "adapter")
    found = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert changed(turned, found) == {name}
    peft_model.merge_and_unload()
    torch.testing.assert_close(found[name].transpose(1, 2), model.get_parameter(name).detach())


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bfloat16")], ids=["as the base", "bfloat16"])
def test_what_an_architecture_keeps_in_float32_stays_so(dtype, tmp_path):
    """The bias by which DeepSeek-V3 chooses experts: its values differ by less than bfloat16 tells."""
    base = save_model("deepseek_v3", tmp_path)
    tensors = load_file(base / "model.safetensors")
    (bias,) = [name for name in tensors if "e_score_correction_bias" in name]
    values = 1 + torch.arange(4) * 1e-5
    halves = {name: value if name == bias else value.bfloat16() for name, value in tensors.items()}
    # a layer beyond the model's own, which transformers passes over
    extra = {bias: values, bias.replace("layers.1.", "layers.2."): values.clone()}
    save_file({**halves, **extra}, base / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    settings = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", *dtype)
    for name, wanted in extra.items():
        assert merged[name].dtype == torch.float32
        assert torch.equal(merged[name], wanted)
    assert {value.dtype for name, value in merged.items() if name not in extra} == {torch.bfloat16}
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(reread.state_dict()[bias], values)


# Parts.


def test_the_decoder_is_without_the_head():
    """Llama 4's language model has its head inside."""
    model = tiny_model("llama4", vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert decoder_of(model) is model.language_model.model


def test_own_logits_keep_packed_documents_apart():
    """Aya Vision scales no logits, where its text model does: its own are used. Without a word it would make a cache
    in training, and transformers looks for packed documents only without one."""
    model = tiny_model("aya_vision", vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert not install_token_loss(model)
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, [0, 9]] = -100
    positions = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1)
    packed = model(input_ids=ids, labels=labels, position_ids=positions)
    rows = [model(input_ids=row[None, part], labels=row[None, part]) for row in ids
            for part in (slice(0, 9), slice(9, 24))]  # fmt: skip
    torch.testing.assert_close(packed.row_nll.sum(), torch.stack([row.row_nll.sum() for row in rows]).sum())
