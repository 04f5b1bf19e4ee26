"""Attention document by document: the numbers of sdpa, in memory and time that do not grow with the row."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen

from stagewise.data.collators import CausalLMCollator
from stagewise.modeling import document_attention, segments
from stagewise.modeling.document_attention import NAME, enable_document_attention
from tests.architectures import SEGMENTED, sharp_model, tiny_model
from tests.reference_attention import varlen_attn
from tests.stages import FULL, losses, run_pt, run_sft

ROWS = [(20, 12, 3), (1, 40), (9,)]  # lengths of the documents of packed rows


def packed_batch() -> dict:
    rows = [{"input_ids": torch.randint(3, 96, (sum(row),)), "seq_lengths": row} for row in ROWS]
    return inputs_of(CausalLMCollator(0)(rows))


def padded_batch() -> dict:
    return inputs_of(CausalLMCollator(0)([{"input_ids": torch.randint(3, 96, (n,))} for n in (31, 40, 7)]))


def inputs_of(batch: dict) -> dict:
    return {key: batch[key] for key in batch if key not in ("labels", "num_tokens", "dataset_id")} | {
        "use_cache": False
    }


def real(batch: dict) -> torch.Tensor:
    """(B, T) bool, tokens that are no padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    width = batch["input_ids"].shape[1]
    return torch.arange(width)[None] < torch.tensor([sum(row) for row in ROWS])[:, None]


def count_whole_rows(monkeypatch) -> list:
    calls: list = []
    original = segments.whole_rows
    monkeypatch.setattr(
        document_attention, "whole_rows", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs)
    )
    return calls


def pretend_varlen(monkeypatch) -> list:
    """As on a GPU, with a stand-in for torch's kernel; what it was called with."""
    calls: list = []

    def kernel(*args, **kwargs):
        calls.append((args, kwargs))
        return varlen_attn(*args, **kwargs)

    monkeypatch.setattr(document_attention, "_varlen_runs", lambda *inputs: True)
    monkeypatch.setattr(document_attention, "varlen_attention", lambda: kernel)
    return calls


@pytest.mark.parametrize("way", ["one by one", "together", "end to end"])  # on CPUs, on accelerators, on GPUs
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make", [packed_batch, padded_batch])
@pytest.mark.parametrize("name", SEGMENTED)
def test_logits_and_gradients_are_those_of_sdpa(name, make, mode, way, monkeypatch):
    if way == "together":
        monkeypatch.setattr(document_attention, "_calls_are_cheap", lambda query: False)
    calls = pretend_varlen(monkeypatch) if way == "end to end" else []
    torch.manual_seed(1)
    batch, model = make(), sharp_model(name)
    model.train(mode == "train")
    kept = real(batch)
    seed = torch.randn(int(kept.sum()), 96)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = model(**batch).logits[kept]
        return logits, torch.autograd.grad((logits * seed).sum(), list(model.parameters()))

    expected, gradients = run()
    assert enable_document_attention(model)
    fallbacks = count_whole_rows(monkeypatch)
    found, mine = run()
    assert not fallbacks
    assert bool(calls) == (way == "end to end" and make is packed_batch)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    for one, other in zip(mine, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


def test_what_torchs_kernel_is_given(monkeypatch):
    calls = pretend_varlen(monkeypatch)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    starts = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    for window, expected in ((None, (-1, 0)), (2, (1, 0)), (4, (-1, 0))):
        out = document_attention.document_attention(
            query, key, key, segments.Layout(starts=starts, window=window), scale=0.5
        )
        (tokens, _, _, borders, _, longest, _), kwargs = calls.pop()
        assert tokens.shape == (12, 4, 8)
        torch.testing.assert_close(tokens[7], query[1, :, 1])
        assert borders.tolist() == [0, 3, 6, 7, 11, 12]
        assert longest == 4
        assert kwargs == {"scale": 0.5, "window_size": expected, "enable_gqa": True}
        assert out.shape == (2, 6, 4, 8)


def test_products_under_autocast_are_of_16_bits(monkeypatch):
    """Norms of queries and keys (Qwen3) give float32, which the kernel would not take beside values of 16 bits."""
    calls = pretend_varlen(monkeypatch)
    model = sharp_model("qwen3")
    assert enable_document_attention(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**packed_batch())
    assert {x.dtype for x in calls[0][0][:3]} == {torch.bfloat16}


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_own_kernel_takes_what_it_is_given(window, monkeypatch):
    """Without a GPU only shapes and types are seen: it and its gradient run on tensors without numbers."""
    monkeypatch.setattr(document_attention, "_varlen_runs", lambda *inputs: True)
    query = torch.randn(2, 4, 6, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(2, 2, 6, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    starts = torch.tensor([[1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    out = document_attention.document_attention(query, key, key, segments.Layout(starts=starts, window=window))
    assert out.shape == (2, 6, 4, 8)
    out.sum().backward()
    assert query.grad.shape == query.shape
    assert key.grad.shape == key.shape


def test_torchs_kernel_has_the_parameters_that_are_used():
    """It is public and young. Where another version lacks them, document_attention falls back: change it then."""
    found = inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters
    assert list(found)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {name: found[name].default for name in ("scale", "window_size", "enable_gqa")} == {
        "scale": None, "window_size": (-1, -1), "enable_gqa": False
    }  # fmt: skip
    assert list(found) == list(inspect.signature(varlen_attn).parameters)
    assert document_attention.varlen_attention() is torch.nn.attention.varlen.varlen_attn


def test_an_older_torch_falls_back(monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, scale=None: None)
    document_attention.varlen_attention.cache_clear()
    try:
        assert document_attention.varlen_attention() is None
    finally:
        document_attention.varlen_attention.cache_clear()


def test_cpus_and_odd_heads_do_without_torchs_kernel(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda *args: True)
    query = torch.randn(1, 2, 4, 8)
    assert not document_attention._varlen_runs(query, query, query)
    for width, taken in ((12, False), (16, True)):
        on_gpu = SimpleNamespace(is_cuda=True, shape=(1, 2, 4, width))
        monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *args: args)
        assert document_attention._varlen_runs(on_gpu, on_gpu, on_gpu) == taken


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi", "gemma3_text"])
def test_left_padding_and_generation_are_those_of_sdpa(name, monkeypatch):
    model = sharp_model(name).eval()
    ids, mask = torch.randint(3, 96, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert enable_document_attention(model)
    fallbacks = count_whole_rows(monkeypatch)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
    assert fallbacks
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), answers)


def test_documents_and_runs_of_single_tokens():
    starts = torch.tensor([[1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    found = segments.find_documents(starts)
    spans = [(block[0].start, block[2].start, block[2].stop) for block in found.blocks]
    assert spans == [(0, 0, 3), (0, 3, 5), (0, 5, 7), (1, 0, 3), (1, 3, 6), (1, 6, 7)]
    assert found.single == [False, True, False, True, False, True]


def test_a_mask_of_the_callers_is_obeyed():
    model = sharp_model("llama").eval()
    ids = torch.randint(3, 96, (1, 10))
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    mask[:, :, 5:, :5] = False
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert enable_document_attention(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(1)
    batch, model = packed_batch(), sharp_model("llama").train()
    assert enable_document_attention(model)
    model(**batch).logits.square().sum().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).logits.square().sum().backward()
    for found, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(found.grad, expected)


@pytest.mark.parametrize(
    ("name", "kernel"), [("bloom", "eager"), ("falcon", "sdpa"), ("gemma2", "eager"), ("llama", "eager")]
)
def test_other_kernels_and_architectures_are_left_alone(name, kernel):
    model = tiny_model(name, kernel)
    before = model.config._attn_implementation
    assert not enable_document_attention(model)
    assert model.config._attn_implementation == before


def test_nothing_of_it_is_saved(tmp_path):
    model = sharp_model("llama")
    assert enable_document_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("flags", [("--packing", "True"), ("--packing", "False")])
def test_a_run_has_the_losses_of_the_run_on_eager_attention(flags, tiny_model_dir, sft_file, tmp_path, capsys):
    run_sft(tiny_model_dir, sft_file, tmp_path / "ours", *FULL, *flags, "--max_steps", "4")
    assert f"attention kernel: {NAME}" in capsys.readouterr().out
    run_sft(
        tiny_model_dir, sft_file, tmp_path / "eager", *FULL, *flags, "--max_steps", "4",
        "--attn_implementation", "eager",
    )  # fmt: skip
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_pretraining_takes_it_too(tiny_model_dir, text_file, tmp_path, capsys):
    run_pt(tiny_model_dir, text_file, tmp_path / "out", *FULL, "--max_steps", "1")
    assert f"attention kernel: {NAME}" in capsys.readouterr().out


def test_a_compiled_run_has_the_losses_of_one_that_is_not(tiny_model_dir, sft_file, tmp_path, capsys):
    """On whole rows: documents would be new shapes for the compiler in every batch. Traced, but not made into C++."""
    run_sft(tiny_model_dir, sft_file, tmp_path / "plain", *FULL, "--max_steps", "3")
    compiled = ("--torch_compile", "True", "--torch_compile_backend", "aot_eager")
    run_sft(tiny_model_dir, sft_file, tmp_path / "compiled", *FULL, *compiled, "--max_steps", "3")
    assert "attention kernel: sdpa\n" in capsys.readouterr().out
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
