"""NEFTune: the bound of the noise for each text, where there is none, and that a run has it."""

import pytest
import torch

from stagewise.modeling.neftune import embedding_noise, text_lengths
from tests.architectures import ARCHITECTURES, tiny_model
from tests.stages import LORA, losses, run_pt, run_sft, weights

ALPHA = 5.0


def noise_of(model, inputs: dict, alpha: float | None = ALPHA) -> torch.Tensor:
    """(B, T, d), what the embedding gives with the noise on, less its rows."""
    seen = []
    embedding = model.get_input_embeddings()
    with embedding_noise(model, alpha):
        handle = embedding.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        model(**inputs, use_cache=False)
        handle.remove()
    return seen[0] - torch.nn.functional.embedding(inputs["input_ids"], embedding.weight) * getattr(
        embedding, "scalar_embed_scale", 1.0
    )


def assert_uniform(noise: torch.Tensor, bound: float) -> None:
    """Within the bound, and as far from 0 on average as uniform noise is."""
    assert noise.abs().max() <= bound * 1.0001
    assert noise.abs().max() > bound * 0.98
    assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(0))


def test_the_bound_of_the_paper():
    # alpha 5, L 512, d 2048: 5 / sqrt(512 * 2048)
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(8, 2048)
    with embedding_noise(_Bare(embedding), 5.0):
        noise = embedding(torch.zeros(1, 512, dtype=torch.long)) - embedding.weight[0]
    assert_uniform(noise.detach(), 0.0048828)


class _Bare(torch.nn.Module):
    """An embedding without a decoder that says what is padding."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self):
        return self.embedding


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_neither_counts_nor_has_noise(name):
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 40:] = 0
    noise = noise_of(tiny_model(name).train(), {"input_ids": ids(2, 64), "attention_mask": mask})
    assert_uniform(noise[0], ALPHA / (64 * 32) ** 0.5)
    assert_uniform(noise[1, :40], ALPHA / (40 * 32) ** 0.5)
    assert noise[1, 40:].abs().max() < 1e-6


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bloom"])  # which cannot be packed
def test_packed_documents_have_the_noise_of_their_own_length(name):
    positions = torch.cat([torch.arange(100), torch.arange(28)])[None]
    noise = noise_of(tiny_model(name).train(), {"input_ids": ids(1, 128), "position_ids": positions})[0]
    assert_uniform(noise[:100], ALPHA / (100 * 32) ** 0.5)
    assert_uniform(noise[100:], ALPHA / (28 * 32) ** 0.5)


def test_text_lengths():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
    assert text_lengths(mask, None).tolist() == [[3, 3, 3, 0], [0, 2, 2, 0]]
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    assert text_lengths(None, positions).tolist() == [[2, 2, 3, 3, 3, 1], [6] * 6]
    # what continues from another position is a text of its own
    assert text_lengths(None, torch.tensor([[7, 8, 0, 1]])).tolist() == [[2, 2, 2, 2]]
    assert text_lengths(None, None) is None


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_there_is_no_hook(alpha):
    model = tiny_model("llama").train()
    with embedding_noise(model, alpha):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_noise_in_evaluation_without_gradients_and_afterwards():
    model, inputs = tiny_model("llama").train(), {"input_ids": ids(1, 16)}
    noiseless = model(**inputs).logits
    with embedding_noise(model, ALPHA):
        assert (model(**inputs).logits - noiseless).abs().max() > 1e-3
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, noiseless)
        torch.testing.assert_close(model.eval()(**inputs).logits, noiseless)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_half_precision_embedding_stays_one():
    model = tiny_model("llama").train().to(torch.bfloat16)
    with embedding_noise(model, ALPHA):
        out = model.get_input_embeddings()(ids(1, 16))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("flags", [("--packing", "False"), ("--packing", "True")])
def test_sft_trains_with_noise_and_evaluates_without(flags, tiny_model_dir, sft_file, tmp_path):
    runs = {}
    for alpha in ("0", "0", "15"):
        out = tmp_path / f"{len(runs)}"
        run_sft(tiny_model_dir, sft_file, out, *LORA, *flags, "--neft_alpha", alpha, "--max_steps", "3")
        runs[out] = losses(out)
    plain, again, noisy = runs.values()
    assert plain == again
    assert plain[1] != noisy[1]


def test_evaluation_before_training_has_no_noise(tiny_model_dir, text_file, tmp_path):
    found = [
        run_pt(
            tiny_model_dir, text_file, tmp_path / alpha, *LORA, "--neftune_noise_alpha", alpha, "--max_steps", "1",
            "--validation_file_dir", text_file, "--eval_strategy", "steps", "--eval_steps", "1",
            "--learning_rate", "0",
        )["eval_loss"]
        for alpha in ("1", "100")
    ]  # fmt: skip
    assert found[0] == found[1]


def test_a_resumed_run_has_the_noise_of_the_uninterrupted_one(tiny_model_dir, sft_file, tmp_path):
    flags = (*LORA, "--neft_alpha", "5", "--packing", "True", "--max_steps", "6")
    run_sft(tiny_model_dir, sft_file, tmp_path / "whole", *flags)
    run_sft(
        tiny_model_dir, sft_file, tmp_path / "resumed", *flags,
        "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3"),
    )  # fmt: skip
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(first[name], second[name]) for name in first)
