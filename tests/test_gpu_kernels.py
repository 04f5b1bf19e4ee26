"""--flash_attn and --use_liger_kernel, as far as that goes without a GPU: what is refused, what kernels are given."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

from stagewise.data.collators import CausalLMCollator
from stagewise.errors import InputError
from stagewise.modeling import attention, liger
from stagewise.modeling.attention import check_kernel, require_flash_attention
from tests.architectures import tiny_model
from tests.stages import LORA, run_pt, run_rm, run_sft


def pretend(monkeypatch, capability: tuple[int, int] | None, installed: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(attention, "find_spec", lambda name: object() if installed else None)


@pytest.mark.parametrize(
    ("capability", "installed", "message"),
    [
        (None, True, "runs on GPUs alone"),
        ((7, 5), True, r"needs compute capability 8.0 .*Tesla T4 has 7.5"),
        ((9, 0), False, "requirements-flash-attn.txt"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(monkeypatch, capability, installed, message):
    pretend(monkeypatch, capability, installed)
    with pytest.raises(InputError, match=message) as raised:
        require_flash_attention("flash_attention_2")
    assert "leave --flash_attn out" in str(raised.value)


def test_a_gpu_with_the_package_is_enough(monkeypatch):
    pretend(monkeypatch, (8, 0), True)
    require_flash_attention("flash_attention_2")


@pytest.mark.parametrize("flags", [("--flash_attn", "True"), ("--attn_implementation", "flash_attention_2")])
def test_a_run_without_a_gpu_never_falls_back_to_another_kernel(
    flags, tiny_model_dir, sft_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"{flags[0]}.*: flash_attention_2 runs on GPUs alone"):
        run_sft(tiny_model_dir, sft_file, tmp_path / "out", *LORA, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--attn_implementation", "eager"), "found beside --attn_implementation eager"),
        (("--shift_attn", "True"), "S2-Attn runs on sdpa"),
    ],
)
def test_two_kernels_at_once_are_refused(flags, message, tiny_model_dir, text_file, tmp_path):
    with pytest.raises(InputError, match=message):
        run_pt(tiny_model_dir, text_file, tmp_path / "out", *LORA, "--flash_attn", "True", *flags)


def test_the_kernel_in_use_is_logged(tiny_model_dir, text_file, tmp_path, capsys):
    run_pt(tiny_model_dir, text_file, tmp_path / "out", *LORA, "--attn_implementation", "eager", "--max_steps", "1")
    assert "attention kernel: eager" in capsys.readouterr().out


def varlen_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """What FlashAttention computes of borders: documents one by one, causal, rows laid end to end."""
    assert mask is None
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    rows, heads, length, width = query.shape
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    assert max(lengths) == kwargs["max_length_q"]
    flat = [x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (query, key, value)]
    outs = []
    for q, k, v in zip(*flat, strict=True):
        out, _ = sdpa_attention.sdpa_attention_forward(
            module, *(x.transpose(0, 1)[None] for x in (q, k, v)), None, scaling=scaling, is_causal=len(q) > 1
        )
        outs.append(out[0])
    return torch.cat(outs).view(rows, length, heads, width), None


@pytest.fixture
def pretended_kernel(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", varlen_attention)


def with_flash(name: str):
    model = tiny_model(name).eval()
    model.config._attn_implementation = "flash_attention_2"  # the setter would look for the package
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "mixtral", "qwen3_moe", "phi"])
def test_documents_of_several_packed_rows_stay_apart(name, pretended_kernel):
    model = with_flash(name)
    documents = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 12, 9, 15)]
    rows = [
        {"input_ids": torch.cat(documents[:2]), "seq_lengths": [20, 12]},
        {"input_ids": torch.cat(documents[2:]), "seq_lengths": [9, 15]},  # and 8 tokens of padding
    ]
    batch = CausalLMCollator(0, flash=True)(rows)
    inputs = {key: batch[key] for key in batch if key not in ("labels", "num_tokens", "dataset_id")}
    packed = model(**inputs, use_cache=False).logits
    found = [packed[0, :20], packed[0, 20:], packed[1, :9], packed[1, 9:24]]
    model.config._attn_implementation = "sdpa"
    for one, ids in zip(found, documents, strict=True):
        torch.testing.assert_close(one, model(input_ids=ids[None]).logits[0], atol=1e-5, rtol=1e-4)


def test_borders_cover_documents_and_padding():
    rows = [{"input_ids": [5] * 5, "seq_lengths": [3, 2]}, {"input_ids": [5] * 3, "seq_lengths": [3]}]
    batch = CausalLMCollator(0, flash=True)(rows)
    # the second row's padding: every token a document of its own
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 9, 10]
    assert batch["cu_seq_lens_k"] is batch["cu_seq_lens_q"]
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert "cu_seq_lens_q" not in CausalLMCollator(0)(rows)
    assert "cu_seq_lens_q" not in CausalLMCollator(0, flash=True)([{"input_ids": [5, 5]}])


@pytest.mark.parametrize(("dtype", "autocast", "refused"), [
    (torch.float32, False, True), (torch.float32, True, False), (torch.bfloat16, False, False),
])  # fmt: skip
def test_numbers_of_32_bits_are_refused(dtype, autocast, refused, pretended_kernel):
    model = with_flash("llama").to(dtype)
    if refused:
        with pytest.raises(InputError, match="--bf16 True"):
            check_kernel(model, autocast)
    else:
        check_kernel(model, autocast)


# Liger.


@pytest.mark.parametrize(
    ("installed", "gpu", "config", "message"),
    [
        (False, True, None, "pip install liger-kernel"),
        (True, False, None, "run on GPUs alone"),
        (True, True, {"fused_linear_cross_entropy": True}, "found fused_linear_cross_entropy"),
    ],
)
def test_liger_is_refused_with_the_remedy(installed, gpu, config, message, monkeypatch):
    monkeypatch.setattr(liger, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(InputError, match=message):
        liger.liger_config(config)


def test_ligers_kernels_leave_the_loss_alone(monkeypatch):
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger.liger_config(None) == off
    assert liger.liger_config({"rope": False}) == off | {"rope": False}


@pytest.fixture
def pretended_liger(monkeypatch):
    """A package that does to a model what Liger does: unless told not to, it gives it a language model's forward."""

    def apply(model, fused_linear_cross_entropy=True, **config):
        applied.append((type(model).__name__, config))
        if fused_linear_cross_entropy:
            model.forward = lambda *args, **kwargs: pytest.fail("the forward pass of a language model")

    applied: list = []
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = apply
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    for module in (ModuleType("liger_kernel"), package, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    monkeypatch.setattr(liger, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    return applied


def test_a_reward_model_keeps_its_scores_under_liger(pretended_liger, tiny_model_dir, preference_file, tmp_path):
    run_rm(tiny_model_dir, preference_file, tmp_path, *LORA, "--max_steps", "1", "--use_liger_kernel", "True")
    assert pretended_liger == [("LlamaForSequenceClassification", {"cross_entropy": False})]


def test_an_architecture_without_kernels_of_liger_is_refused(pretended_liger):
    liger.require_liger(None, "llama")
    with pytest.raises(InputError, match="--use_liger_kernel: Liger has no kernels for bloom"):
        liger.require_liger(None, "bloom")
