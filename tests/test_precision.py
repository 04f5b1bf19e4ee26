"""--upcast_layernorm: norms compute in float32 inside a model of 16 bits; and other numbers that could get lost."""

import copy
from types import SimpleNamespace

import pytest
import torch

from stagewise.arguments import LoraArguments, ModelArguments, RunArguments, StageTrainingArguments, parse_arguments
from stagewise.errors import InputError
from stagewise.modeling.document_attention import enable_document_attention
from stagewise.modeling.loading import load_causal_lm
from stagewise.modeling.precision import keep_padding_off_zero, multiply_in_float32, upcast_norms
from tests.architectures import tiny_model
from tests.stages import LORA, losses, run_sft
from tests.zoo import models as zoo


def norms(model):
    return [module for module in model.modules() if "norm" in type(module).__name__.lower()]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "bloom", "phi"])
def test_norms_round_once(name):
    """Their output is that of the same norm in float32, rounded; without it products are rounded in between."""
    torch.manual_seed(1)
    model = tiny_model(name).to(torch.bfloat16)
    with torch.no_grad():
        for norm in norms(model):
            for parameter in norm.parameters():
                parameter.uniform_(0.5, 1.5)
    plain = copy.deepcopy(model)
    assert upcast_norms(model) == len(norms(model)) > 0
    differs = False
    for norm, before in zip(norms(model), norms(plain), strict=True):
        width = next(norm.parameters()).shape[0]
        x = torch.randn(64, width).to(torch.bfloat16)
        exact = copy.deepcopy(before).float()(x.float())
        assert norm(x).dtype == torch.bfloat16
        assert torch.equal(norm(x), exact.to(torch.bfloat16))
        differs |= not torch.equal(before(x), norm(x))
    assert differs or name in ("bloom", "phi", "gemma")  # which round once by themselves
    ids = torch.arange(1, 9)[None]
    assert model(input_ids=ids, use_cache=False).logits.isfinite().all()
    assert all(
        p.dtype == torch.bfloat16
        for m in model.modules()
        if m not in norms(model)
        for p in m._parameters.values()
        if p is not None
    )


def test_a_run_with_it(tiny_model_dir, sft_file, tmp_path, tokenizer):
    flags = ("--dtype", "bfloat16", "--max_steps", "2", "--do_train", "True", "--save_strategy", "no", *LORA)
    run_sft(tiny_model_dir, sft_file, tmp_path / "out", *flags, "--upcast_layernorm", "True")
    assert len(losses(tmp_path / "out")) == 2
    args = ModelArguments(model_name_or_path=tiny_model_dir, dtype="bfloat16", upcast_layernorm=True)
    model = load_causal_lm(args, tokenizer, trains_all=False)
    assert {norm.weight.dtype for norm in norms(model)} == {torch.float32}
    in_32 = ModelArguments(model_name_or_path=tiny_model_dir, dtype="float32", upcast_layernorm=True)
    assert not any(norm._forward_hooks for norm in norms(load_causal_lm(in_32, tokenizer, trains_all=False)))


def test_engines_with_one_data_type_refuse_it(monkeypatch):
    monkeypatch.setattr("stagewise.arguments.settle_engine", lambda args: None)
    monkeypatch.setattr(StageTrainingArguments, "__post_init__", lambda self: None)
    shared = ["--model_name_or_path", "m", "--output_dir", "o", "--upcast_layernorm", "True"]
    for flags in (["--deepspeed", "zero2.json"], ["--fsdp", "True"]):
        with pytest.raises(InputError, match=f"^--upcast_layernorm: found beside {flags[0]}"):
            parse_arguments(
                ModelArguments, LoraArguments, RunArguments, StageTrainingArguments, argv=[*shared, *flags]
            )


def test_what_goes_into_a_model_keeps_its_numbers_under_deepspeed():
    """The Trainer rounds them to 16 bits there: 1/1000 as the weight of a token, a log-probability of -12.345."""
    from transformers import Trainer

    from stagewise.trainers.stage import StageTrainerMixin

    class StageTrainer(StageTrainerMixin, Trainer):
        def __init__(self):
            self.args = SimpleNamespace(device=torch.device("cpu"))
            self.is_deepspeed_enabled = True
            settings = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
            self.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=settings))

    given = {"weights": torch.tensor([0.001]), "nested": [torch.tensor([-12.345])], "ids": torch.tensor([70_001])}
    assert Trainer._prepare_input(StageTrainer(), given["weights"]).dtype == torch.bfloat16
    found = StageTrainer()._prepare_input(given)
    assert torch.equal(found["weights"], given["weights"])
    assert torch.equal(found["nested"][0], given["nested"][0])
    assert torch.equal(found["ids"], given["ids"])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_is_multiplied_in_float32(dtype, autocast):
    """By hand: 256 + 1 is no number of bf16, which has 256 and 258."""
    head = torch.nn.Linear(2, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 1.0]]))
    multiply_in_float32(torch.nn.Sequential(head))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        score = head(torch.tensor([[256.0, 1.0]], dtype=dtype))
    assert score.dtype == torch.float32
    assert score.item() == 257.0


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "sdpa_by_document"])
def test_padding_that_is_zero_leaves_the_gradients_alone(kernel):
    """Gemma 3n takes a root of each token's square; the embedding of its padding is zero. The gradients are those
    that another token in the place of the padding leaves, which no real token sees."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0]])
    found = []
    for padding in (0, 7):
        model = zoo.tiny_model("gemma3n_text", vocab_size=600, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        assert model.get_input_embeddings().weight[0].eq(0).all()
        keep_padding_off_zero(model)
        if kernel == "sdpa_by_document":
            assert enable_document_attention(model)
        else:
            model.set_attn_implementation(kernel)
        ids[:, 6:] = padding
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :5], ids[0, 1:6]).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 50
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-7), name
