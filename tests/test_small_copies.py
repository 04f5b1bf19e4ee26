"""Proofs on small copies: what they find of an architecture and a kernel, without running the model."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    TrainingArguments,
    modeling_flash_attention_utils,
)
from transformers.integrations import hub_kernels
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stagewise.data.collators import CausalLMCollator
from stagewise.errors import InputError
from stagewise.modeling.attention import check_packing, is_flash
from stagewise.modeling.document_attention import enable_document_attention
from stagewise.modeling.small_copy import on_small_copy
from stagewise.modeling.token_loss import hidden_states_reproduce_logits
from tests.architectures import ARCHITECTURES, tiny_config, tiny_model
from tests.reference_attention import hub_kernel
from tests.stages import FULL, losses, run_sft

HUB = "kernels-community/flash-attn2"


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def without_weights(name: str, **changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(name, **changes))


class Doubled(LlamaForCausalLM):
    """Does more than head(decoder(x))."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_the_model_itself_is_not_run(args):
    model = without_weights("llama")
    assert hidden_states_reproduce_logits(model)
    assert check_packing(model, CausalLMCollator(0), args) < 1e-4
    model.__class__ = Doubled
    assert not hidden_states_reproduce_logits(model)
    with pytest.raises(InputError, match="BloomForCausalLM does not keep packed documents apart"):
        check_packing(without_weights("bloom"), CausalLMCollator(0), args)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bloom"])
@pytest.mark.parametrize("bf16", [False, True])
def test_architectures_that_keep_documents_apart(name, bf16, tmp_path):
    model = tiny_model(name)
    enable_document_attention(model)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=bf16)
    assert check_packing(model, CausalLMCollator(0), args) < (1e-2 if bf16 else 1e-4)


def test_random_numbers_and_the_model_stay_as_they_are(args):
    model = tiny_model("llama").train()
    before = torch.get_rng_state()
    hidden_states_reproduce_logits(model)
    check_packing(model, CausalLMCollator(0), args)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == 96


@pytest.mark.parametrize(("name", "sizes", "layers", "heads"), [
    (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256},
        2, (4, 2, 128),
    ),
    ("gemma3_text", {}, 2, (4, 2, 256)),
    ("qwen3_moe", {}, 2, (4, 2, None)),
    ("deepseek_v3", {}, 2, (2, 2, None)),
])  # fmt: skip
def test_copies_of_large_models_are_small(name, sizes, layers, heads):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    copy = on_small_copy(model, "eager", lambda copy: copy)
    config = copy.config
    assert copy.num_parameters() < 10_000_000 < model.num_parameters()
    assert config.num_hidden_layers == layers
    assert (config.num_attention_heads, config.num_key_value_heads) == heads[:2]
    assert heads[2] is None or config.head_dim == heads[2]
    if name == "gemma3_text":  # five of the first kind, then one of the other
        assert config.layer_types == ["sliding_attention", "full_attention"]


def test_what_the_narrow_copy_cannot_do_is_tried_on_the_wide_one():
    widths = []

    def prove(copy):
        widths.append(copy.config.hidden_size)
        if len(widths) == 1:
            raise ValueError("demands its own width")
        return "proven"

    model = without_weights("llama", hidden_size=512, num_attention_heads=16, num_key_value_heads=4)
    assert on_small_copy(model, "eager", prove) == "proven"
    assert widths == [128, 512]


def leaky(module, query, key, value, mask, **kwargs):
    """Keeps documents apart in the first row, and in the others does not."""
    out = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0].clone()
    if len(query) > 1:
        out[1:] = sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)[0][1:]
    return out, None


def blind(module, query, key, value, mask, **kwargs):
    """No token sees another: packed documents stay apart, whatever they are told by."""
    repeats = query.shape[1] // value.shape[1]
    return value.repeat_interleave(repeats, 1).transpose(1, 2), None


def broken(*args, **kwargs):
    raise RuntimeError("no such kernel for this head size")


@pytest.mark.parametrize(("kernel", "message"), [
    (leaky, "does not keep packed documents apart"), (blind, "cannot be shown"), (broken, "no such kernel"),
])  # fmt: skip
def test_kernels_that_cannot_be_trusted_are_refused(kernel, message, args, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "other", kernel)
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, "other", AttentionMaskInterface._global_mapping["sdpa"]
    )
    with pytest.raises(InputError, match=message):
        check_packing(tiny_model("llama", "other"), CausalLMCollator(0), args)


@pytest.fixture
def hub(monkeypatch):
    """As if the package `kernels` had found FlashAttention 2 on the hub; transformers registers it itself."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: hub_kernel())


@pytest.mark.parametrize("name", ["llama", "mistral window", "qwen3", "mixtral"])
def test_kernels_of_the_hub_are_told_the_borders(name, hub, args):
    assert not is_flash(HUB)  # nobody has asked the hub yet
    model = tiny_model(name, HUB)
    assert is_flash(model.config._attn_implementation)
    assert check_packing(model, CausalLMCollator(0, flash=True), args) < 1e-4
    with pytest.raises(InputError, match="does not keep packed documents apart"):
        check_packing(model, CausalLMCollator(0), args)


@pytest.mark.parametrize("kernel", [None, "eager", "sdpa", "flex_attention", "sdpa_by_document"])
def test_kernels_with_masks_need_no_borders(kernel):
    assert not is_flash(kernel)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_attention_needs_borders(kernel):
    assert is_flash(kernel)


def test_a_packed_run_on_a_kernel_of_the_hub(hub, tiny_model_dir, sft_file, tmp_path):
    flags = (*FULL, "--packing", "True", "--bf16", "True", "--use_cpu", "True", "--max_steps", "3")
    run_sft(tiny_model_dir, sft_file, tmp_path / "hub", *flags, "--attn_implementation", HUB)
    run_sft(tiny_model_dir, sft_file, tmp_path / "eager", *flags, "--attn_implementation", "eager")
    assert losses(tmp_path / "hub") == pytest.approx(losses(tmp_path / "eager"), rel=5e-3)


def test_a_kernel_of_the_hub_gets_no_float32(hub, tiny_model_dir, sft_file, tmp_path):
    with pytest.raises(InputError, match="takes numbers of 16 bits"):
        run_sft(tiny_model_dir, sft_file, tmp_path / "out", *FULL, "--attn_implementation", HUB)
