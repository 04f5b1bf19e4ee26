"""S2-Attn: who sees whom, by the definition; training only; linear memory; the same in every architecture."""

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagewise.arguments import LoraArguments, ModelArguments
from stagewise.errors import InputError
from stagewise.modeling.lora import attach_adapter, trainable_params
from stagewise.modeling.s2_attention import default_group, enable_s2_attention, s2_attention
from stagewise.modeling.segments import Layout, cut_into_pieces
from tests.architectures import SEGMENTED, sharp_model
from tests.stages import FULL, LORA, losses, run_pt, run_sft, weights


def allow(length: int, group: int, shifted: bool, window: int | None = None) -> torch.Tensor:
    """(L, L) bool, the definition: query a sees key b in its own segment, not after itself."""
    i = torch.arange(length)
    segment = torch.div(i - group // 2 if shifted else i, group, rounding_mode="floor")
    seen = (segment[:, None] == segment) & (i <= i[:, None])
    return seen if window is None else seen & (i[:, None] - i < window)


def reference(query, key, value, group, window=None) -> torch.Tensor:
    """One document a row, head by head with whole score matrices: (B, H, L, D) -> (B, L, H, D)."""
    heads, length = query.shape[1:3]
    outs = []
    for h in range(heads):
        k, v = (x[:, h * x.shape[1] // heads] for x in (key, value))
        scores = query[:, h] @ k.transpose(1, 2) / query.shape[-1] ** 0.5
        seen = allow(length, group, h >= heads // 2, window)
        outs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v)
    return torch.stack(outs, dim=2)


def random_inputs(batch: int, heads: int, key_heads: int, length: int, dim: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, length, h, dim).transpose(1, 2).requires_grad_() for h in (heads, key_heads, key_heads)]


def starts_of(*rows: tuple[int, ...]) -> torch.Tensor:
    """(B, L) bool, True where a document begins; each row by the lengths of its documents."""
    return torch.stack([torch.cat([torch.arange(n) == 0 for n in documents]) for documents in rows])


def assert_same_with_gradients(out, expected, inputs) -> None:
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    seed = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5)


# Who sees whom.


def visible(length: int, group: int | None, layout: Layout | None = None) -> list[list[set[int]]]:
    """For each of two heads, what each token sees: equal scores, and values that are one-hot."""
    zeros = torch.zeros(1, 2, length, 8)
    value = torch.eye(length).expand(1, 2, -1, -1)
    out = s2_attention(zeros, zeros, value, group, layout)[0]
    return [[set(row.nonzero().flatten().tolist()) for row in out[:, h]] for h in (0, 1)]


def test_visible_sets_of_the_definition():
    plain, shifted = visible(16, 4)
    assert [plain[i] for i in (0, 3, 4, 15)] == [{0}, {0, 1, 2, 3}, {4}, {12, 13, 14, 15}]
    assert shifted[0] == {0}
    assert shifted[1] == {0, 1}
    assert shifted[2] == {2}
    assert shifted[5] == {2, 3, 4, 5}
    assert shifted[6] == {6}
    assert shifted[15] == {14, 15}


@pytest.mark.parametrize(("length", "group"), [(1, 2), (60, 16), (61, 16), (64, 16), (7, 16), (9, 16), (16, 2)])
def test_visible_sets_of_any_length(length, group):
    for found, shifted in zip(visible(length, group), (False, True), strict=True):
        assert found == [set(row.nonzero().flatten().tolist()) for row in allow(length, group, shifted)]


def test_the_default_group_is_a_quarter_of_the_length_padded_to_a_multiple_of_eight():
    assert [default_group(n) for n in (1, 8, 16, 17, 61, 8192)] == [2, 2, 4, 6, 16, 2048]
    assert visible(61, None) == visible(61, 16)


def test_packed_documents_are_counted_each_from_its_own_start():
    plain, shifted = visible(16, 4, Layout(starts=starts_of((3, 9, 4))))
    assert [plain[i] for i in (2, 3, 6, 7, 12, 15)] == [{0, 1, 2}, {3}, {3, 4, 5, 6}, {7}, {12}, {12, 13, 14, 15}]
    assert [shifted[i] for i in (1, 2, 4, 5, 8, 9, 13, 14)] == [
        {0, 1}, {2}, {3, 4}, {5}, {5, 6, 7, 8}, {9}, {12, 13}, {14}
    ]  # fmt: skip


def test_a_sliding_window_narrows_the_segments():
    plain, shifted = visible(16, 8, Layout(window=3))
    assert [plain[i] for i in (1, 7, 8, 9, 12)] == [{0, 1}, {5, 6, 7}, {8}, {8, 9}, {10, 11, 12}]
    assert [shifted[i] for i in (3, 4, 5, 10, 12)] == [{1, 2, 3}, {4}, {4, 5}, {8, 9, 10}, {12}]


# The numbers.


@pytest.mark.parametrize("length", [60, 61, 64])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (4, 2), (4, 4), (6, 2), (3, 3), (3, 1), (9, 3), (6, 3)])
def test_attention_and_gradients_are_the_references(length, heads, key_heads):
    inputs = random_inputs(2, heads, key_heads, length)
    assert_same_with_gradients(s2_attention(*inputs, 16), reference(*inputs, 16), inputs)


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_windows_are_the_references(window):
    inputs = random_inputs(2, 4, 2, 61)
    out = s2_attention(*inputs, 32, Layout(window=window))
    assert_same_with_gradients(out, reference(*inputs, 32, window), inputs)


@pytest.mark.parametrize(("heads", "key_heads", "window"), [(4, 1, None), (4, 2, 5), (3, 3, None), (6, 3, None)])
def test_packed_documents_are_the_documents_alone(heads, key_heads, window):
    rows = ((20, 37, 1, 3), (61,), (1, 1, 29, 30))
    inputs = random_inputs(3, heads, key_heads, 61)
    expected = torch.stack(
        [
            torch.cat(
                [
                    reference(*(x[b : b + 1, :, end - n : end] for x in inputs), 16, window)[0]
                    for n, end in zip(documents, torch.tensor(documents).cumsum(0).tolist(), strict=True)
                ]
            )
            for b, documents in enumerate(rows)
        ]
    )
    out = s2_attention(*inputs, 16, Layout(starts=starts_of(*rows), window=window))
    assert_same_with_gradients(out, expected, inputs)


def test_padding_changes_no_real_token_and_is_zeros():
    inputs = random_inputs(3, 4, 2, 40)
    lengths = (40, 23, 0)
    keep = torch.arange(40) < torch.tensor(lengths)[:, None]
    out = s2_attention(*inputs, 16, Layout(keep=keep))
    out.sum().backward()
    for b, n in enumerate(lengths):
        assert not out[b, n:].any()
        if n:
            torch.testing.assert_close(out[b, :n], s2_attention(*(x[b : b + 1, :, :n] for x in inputs), 16)[0])
    assert all(x.grad.isfinite().all() for x in inputs)
    assert not inputs[1].grad[1, :, 23:].any()


def test_pieces_are_padded_by_half_their_length_at_most():
    rows = tuple((n, 64 - n) for n in range(1, 64))
    pieces = cut_into_pieces(starts_of(*rows), 32, 16, torch.device("cpu"))
    assert sum(number * size for number, size in pieces.shapes) <= 1.5 * 63 * 64
    assert max(size for _, size in pieces.shapes) == 32


def test_attention_dropout_is_honoured():
    query, key, _ = random_inputs(4, 4, 2, 256)
    ones = torch.ones_like(key)
    assert torch.allclose(s2_attention(query, key, ones, 64), torch.ones(4, 256, 4, 8))
    dropped = s2_attention(query, key, ones, 64, dropout=0.5)
    assert (dropped[:, 64:] - 1).abs().mean() > 0.05
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)


# Models.


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(0))


def positions_of(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.fixture(params=SEGMENTED)
def architecture(request):
    return sharp_model(request.param)


def test_every_architecture_trains_on_segments(architecture):
    model, ids = architecture, token_ids(2, 61)
    full = model.train()(ids).logits.detach()
    enable_s2_attention(model, 16)
    with torch.no_grad():
        shifted = model(ids).logits
        # whole while only one segment is there in both halves
        assert torch.allclose(shifted[:, :8], full[:, :8], atol=1e-5)
        assert (shifted - full)[:, 8:].abs().max() > 1e-3
        changed = ids.clone()
        changed[:, 37] = ids[:, 37] % 90 + 3
        difference = (model(changed).logits - shifted).abs().amax(-1)
        assert difference[:, :37].max() == 0
        assert difference[:, 37:].max() > 1e-3

        # padded row == the row alone, packed documents == the documents alone
        alone = [model(ids[:1, :n], use_cache=False).logits[0] for n in (40, 61)]
        padded = model(
            torch.cat([ids[:1], ids[:1].masked_fill(torch.arange(61) >= 40, 0)]),
            attention_mask=torch.stack([torch.ones(61), (torch.arange(61) < 40).float()]).long(),
        ).logits
        torch.testing.assert_close(padded[0], alone[1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(padded[1, :40], alone[0], atol=1e-5, rtol=1e-4)
        documents = [model(part[None], use_cache=False).logits[0] for part in ids[0].split([7, 40, 14])]
        packed = model(ids[:1], position_ids=positions_of(7, 40, 14), use_cache=False).logits[0]
        torch.testing.assert_close(packed, torch.cat(documents), atol=1e-5, rtol=1e-4)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_eval_and_generation_are_those_of_sdpa(architecture, tmp_path):
    model, ids = architecture.eval(), token_ids(2, 61)
    left_padded = (torch.arange(61) >= torch.tensor([0, 20])[:, None]).long()
    batches = (
        {},
        {"attention_mask": left_padded.flip(1)},
        {"attention_mask": left_padded},
        {"position_ids": positions_of(30, 31).expand(2, -1), "use_cache": False},
    )

    def answers():
        logits = [model(ids, **batch).logits for batch in batches]
        return [*logits, model.generate(ids, attention_mask=left_padded, max_new_tokens=6, do_sample=False)]

    with torch.no_grad():
        before = answers()
        enable_s2_attention(model)
        assert all(torch.equal(a, b) for a, b in zip(before, answers(), strict=True))
    model.save_pretrained(tmp_path)
    assert "s2_attn" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(packed, reentrant):
    ids = token_ids(2, 61)
    batch = {"position_ids": positions_of(20, 41).expand(2, -1)} if packed else {}
    gradients = []
    for checkpointing in (False, True):
        model = sharp_model("llama").train()
        enable_s2_attention(model, 16)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False, **batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-6)


def test_a_cache_is_attended_to_as_a_whole():
    model, ids = sharp_model("llama").train(), token_ids(1, 33)
    enable_s2_attention(model, 8)
    with torch.no_grad():
        cache = model(ids[:, :32], use_cache=True).past_key_values
        step = model(ids[:, 32:], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(step, model.eval()(ids[:, 32:], past_key_values=cache).logits)


def test_training_refuses_left_padding_and_masks_of_the_callers_own():
    model, ids = sharp_model("llama").train(), token_ids(2, 16)
    enable_s2_attention(model, 8)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with pytest.raises(InputError, match="pad on the right only"):
        model(ids, attention_mask=mask)
    with pytest.raises(InputError, match="an attention mask made by the caller"):
        model(ids, attention_mask=torch.ones(2, 1, 16, 16, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bloom", {}, "BloomForCausalLM does not take its attention from transformers' interface"),
        ("falcon", {}, "FalconForCausalLM does not take its attention from transformers' interface"),
        ("gemma2", {"head_dim": 8}, "soft-capping"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "one attention head"),
    ],
)
def test_architectures_that_cannot_are_refused(name, settings, message):
    model = sharp_model(name, **settings)
    kind = model.config._attn_implementation
    with pytest.raises(InputError, match=message):
        enable_s2_attention(model)
    assert model.config._attn_implementation == kind


@pytest.mark.parametrize("group", [7, 0, 1, -2])
def test_odd_groups_are_refused(group):
    with pytest.raises(InputError, match=f"--shift_attn_group: found {group}"):
        enable_s2_attention(sharp_model("llama"), group)


# Memory.


class LargestTensor(TorchDispatchMode):
    """The most bytes that any tensor made in the block has."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return out


def largest_tensor(model, length: int, kind: str) -> int:
    model.zero_grad()
    batch: dict = {"input_ids": token_ids(1, length), "use_cache": False}
    if kind == "padded":
        batch["attention_mask"] = (torch.arange(length) < length - 5).long()[None]
    if kind == "packed":
        batch["position_ids"] = positions_of(length // 2, length // 4, length // 4)
    with LargestTensor() as largest:
        model(**batch, logits_to_keep=1).logits.sum().backward()
    return largest.size


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("window", [None, 64])
def test_memory_grows_with_the_length_and_not_with_its_square(kind, window):
    settings = {"max_position_embeddings": 4096, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = sharp_model("mistral", sliding_window=window, **settings).train()
    if kind != "plain" or window:  # the mask of full attention
        assert largest_tensor(model, 2048, kind) >= 2048 * 2048
    enable_s2_attention(model)
    short, long = (largest_tensor(model, length, kind) for length in (1024, 2048))
    assert long <= 2.05 * short
    assert long < 2048 * 2048


# Stages.


@pytest.fixture(scope="module")
def model_dirs(tiny_model_dir, tmp_path_factory):
    """Llama, and Qwen3 with tied embeddings; four heads each, and the tokenizer of the tests."""
    folders = {}
    for name, settings in {"llama": {}, "qwen3": {"tie_word_embeddings": True, "head_dim": 8}, "bloom": {}}.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        model = sharp_model(name, **{"vocab_size": 600, "max_position_embeddings": 1024, **settings})
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folders[name])
    return folders


SHIFT = ("--shift_attn", "True")
STEPS = ("--max_steps", "2", "--learning_rate", "1e-2", "--report_to", "none", "--plot_loss", "False")


@pytest.mark.parametrize(("name", "packing"), [("llama", "False"), ("qwen3", "True")])
def test_sft_trains_on_segments_and_evaluates_on_everything(name, packing, model_dirs, sft_file, tmp_path):
    flags = (*FULL, *STEPS, "--packing", packing, "--validation_file_dir", sft_file, "--eval_on_start", "True")
    flags = (*flags, "--eval_strategy", "steps", "--eval_steps", "9", "--max_eval_samples", "4")
    kinds = {"full": (), "wide": (*SHIFT, "--shift_attn_group", "256"), "narrow": SHIFT}
    untrained = set()
    for kind, shift in kinds.items():
        run_sft(model_dirs[name], sft_file, tmp_path / kind, *flags, *shift)
        history = json.loads((tmp_path / kind / "trainer_state.json").read_text())["log_history"]
        untrained.add(history[0]["eval_loss"])
    assert len(untrained) == 1
    full, wide, narrow = (losses(tmp_path / kind) for kind in kinds)
    # rows of at most 128 tokens: within half a group of 256 both halves of the heads see everything
    assert wide == pytest.approx(full, rel=1e-5)
    assert narrow[1] != pytest.approx(full[1], rel=1e-4)
    assert "s2_attn" not in (tmp_path / "narrow" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("packing", ["False", "True"])
def test_pt_trains_on_groups_of_the_size_asked_for(packing, model_dirs, text_file, tmp_path, monkeypatch):
    from stagewise.modeling import s2_attention as module

    groups, original = set(), module.s2_attention
    monkeypatch.setattr(module, "s2_attention", lambda *args: groups.add(args[3]) or original(*args))
    for kind, shift in {"full": (), "narrow": (*SHIFT, "--shift_attn_group", "10")}.items():
        run_pt(model_dirs["llama"], text_file, tmp_path / kind, *LORA, *STEPS, "--packing", packing, *shift)
    assert groups == {10}
    assert losses(tmp_path / "narrow")[1] != pytest.approx(losses(tmp_path / "full")[1], rel=1e-4)


def test_the_stage_refuses_bloom(model_dirs, sft_file, tmp_path):
    with pytest.raises(InputError, match="--shift_attn: BloomForCausalLM"):
        run_sft(model_dirs["bloom"], sft_file, tmp_path / "out", *LORA, *STEPS, *SHIFT)
    assert not (tmp_path / "out").exists()


# --trainable_params.

NORMS = {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")}
EMBEDDING_AND_NORMS = {*NORMS, "model.norm.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainable_params_trains_saves_and_merges_embeddings_and_norms(dtype, model_dirs, sft_file, tmp_path):
    import merge_peft_adapter

    # steps of 1e-4 are lost on bf16 weights around 1
    flags = (*LORA, *SHIFT, *STEPS, "--dtype", dtype, "--learning_rate", "1e-4", "--trainable_params", "embed,norm")
    run_sft(model_dirs["llama"], sft_file, tmp_path / "adapter", *flags)
    saved = {name.removeprefix("base_model.model."): x for name, x in weights(tmp_path / "adapter").items()}
    assert {name for name in saved if "lora_" not in name} == EMBEDDING_AND_NORMS
    assert len(saved) > len(EMBEDDING_AND_NORMS)
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=getattr(torch, dtype)).state_dict()
    for name in EMBEDDING_AND_NORMS:
        assert saved[name].dtype == torch.float32
        assert 5e-5 < (saved[name] - base[name].float()).abs().max() < 4e-4, name

    if dtype == "float32":
        merge_peft_adapter.main(
            ["--base_model", model_dirs["llama"], "--lora_model", str(tmp_path / "adapter")]
            + ["--output_dir", str(tmp_path / "merged")]
        )
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.config._attn_implementation == "sdpa"
        for name in EMBEDDING_AND_NORMS:
            torch.testing.assert_close(merged.state_dict()[name], saved[name])
    assert not any("s2_attn" in path.read_text() for path in tmp_path.glob("*/*config.json"))


@pytest.mark.parametrize("spec", ["norm", "embed,norm"])
def test_trainable_params_of_tied_embeddings(spec, model_dirs, recwarn):
    model = AutoModelForCausalLM.from_pretrained(model_dirs["qwen3"], dtype=torch.bfloat16)
    model = attach_adapter(model, LoraArguments(trainable_params=spec)).train()
    assert not [warning for warning in recwarn if "weight_tying" in str(warning.message)]
    ids = token_ids(2, 16)
    model(ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert sum("norm" in name for name in trained) == 2 * 4 + 1
    assert any("embed_tokens" in name for name in trained) == ("embed" in spec)
    if "embed" in spec:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert embedding.weight is head.weight
        assert embedding.weight.grad.abs().max() > 0


def test_trainable_params_are_parts_of_the_names_of_modules():
    assert trainable_params(sharp_model("llama"), "embed, norm") == [
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"--trainable_params embed,norn: no module has norn in its name; .*q_proj"):
        trainable_params(sharp_model("llama"), "embed,norn")


# Arguments.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift_attn_group": 8}, "--shift_attn_group: found 8, expected no group without --shift_attn True"),
        ({"shift_attn": True, "shift_attn_group": 7}, "--shift_attn_group: found 7, expected an even number"),
        ({"shift_attn": True, "shift_attn_group": 0}, "--shift_attn_group: found 0, expected an even number"),
        ({"shift_attn": True, "attn_implementation": "eager"}, "--shift_attn: found --attn_implementation eager"),
        ({"shift_attn": True, "attn_implementation": "flash_attention_2"}, "but S2-Attn runs on sdpa"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(InputError, match=message):
        ModelArguments(model_name_or_path="x", **settings)


def test_settings_that_go_together():
    ModelArguments(model_name_or_path="x", shift_attn=True, shift_attn_group=512, attn_implementation="sdpa")
    LoraArguments(trainable_params="embed,norm", modules_to_save="lm_head")
    with pytest.raises(InputError, match="--trainable_params: found 'norm', expected no adapter option beside"):
        LoraArguments(use_peft=False, trainable_params="norm")
    with pytest.raises(InputError, match="--trainable_params: found 'norm' beside --peft_path"):
        LoraArguments(peft_path="x", trainable_params="norm")
    with pytest.raises(InputError, match="--trainable_params: found 'norm,,embed'"):
        LoraArguments(trainable_params="norm,,embed")


@pytest.mark.parametrize("flags", [SHIFT, ("--trainable_params", "norm")])
@pytest.mark.parametrize("stage", ["reward_modeling", "dpo_training", "ppo_training"])
def test_other_stages_refuse_before_anything_is_loaded(stage, flags, tmp_path):
    import importlib

    arguments = ["--model_name_or_path", str(tmp_path / "none"), "--train_file_dir", str(tmp_path / "none")]
    arguments += ["--output_dir", str(tmp_path / "out"), *flags]
    if stage == "ppo_training":
        arguments += ["--reward_model_path", str(tmp_path / "none")]
    with pytest.raises(InputError, match=rf"{flags[0]}: not for {stage}.py; it is one of pretraining.py"):
        importlib.import_module(stage).main(arguments)
