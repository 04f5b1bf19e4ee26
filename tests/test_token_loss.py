"""The chunked loss inside a model equals the architecture's own, on every architecture it is put on."""

import pytest
import torch
from transformers import LlamaForCausalLM

from stagewise.modeling.token_loss import install_token_loss


def configurations():
    from transformers import (
        BloomConfig,
        Cohere2Config,
        Gemma2Config,
        GPT2Config,
        GraniteConfig,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        PhiConfig,
        Qwen2Config,
        Qwen3Config,
    )

    small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**small, **heads),
        "llama tied": LlamaConfig(**small, **heads, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**small, **heads),
        "qwen3": Qwen3Config(**small, **heads, head_dim=8),
        "mistral": MistralConfig(**small, **heads),
        "mixtral": MixtralConfig(**small, **heads, num_local_experts=2, head_dim=8),
        "phi": PhiConfig(**small, num_attention_heads=4),  # its head has a bias
        "gemma2": Gemma2Config(**small, **heads, head_dim=8, final_logit_softcapping=5.0),  # soft-capped logits
        "cohere2": Cohere2Config(**small, **heads, logit_scale=0.25, pad_token_id=0),  # scaled logits
        "granite": GraniteConfig(**small, **heads, logits_scaling=4.0),  # divided logits
        "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    }


NAMES = sorted(configurations())


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(1, 97, (3, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 8:] = -100
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build(name, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = configurations()[name]
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the usual initialisation makes all logits nearly equal
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_architectures_own(name, batch):
    model = build(name)
    wanted = model(**batch)
    wanted.loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert install_token_loss(model), "the chunked loss should fit this architecture"
    out = model(**batch)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-6)
    # without labels the model is as it was
    torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits.shape, torch.Size([3, 12, 97]))


def test_rows_and_weights_by_hand(batch):
    model = build("llama")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    install_token_loss(model)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none", ignore_index=-100
    ).reshape(3, 11)
    out = model(**batch)
    torch.testing.assert_close(out.row_nll, losses.sum(1).detach())
    assert out.row_tokens.tolist() == [8, 4, 8]
    torch.testing.assert_close(model(**batch, num_items_in_batch=40).loss, losses.sum() / 40)
    weights = torch.rand(3, 12)
    torch.testing.assert_close(model(**batch, token_weights=weights).loss, (losses * weights[:, 1:]).sum())


class Doubled(LlamaForCausalLM):
    """Does more than head(decoder(x))."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_an_architecture_with_more_behind_its_head_keeps_its_own_logits(batch):
    model = build("llama")
    model.__class__ = Doubled
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not install_token_loss(model)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(model(**batch).loss, wanted)


def test_a_forward_pass_of_one_instance_is_not_taken_for_its_architectures(batch):
    model = build("llama")
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    assert not install_token_loss(model)


def test_a_decoder_that_gives_no_hidden_states_keeps_its_own_logits(caplog):
    model = build("llama")
    model.__class__ = type("NoDecoder", (LlamaForCausalLM,), {"get_decoder": lambda self: self.get_input_embeddings()})
    assert not install_token_loss(model)
    assert "NoDecoder: no small copy could be tried" in caplog.text


def test_adapters_on_the_head_and_saved_heads_give_the_same_loss(batch):
    from peft import LoraConfig, get_peft_model

    for kwargs in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ):
        model = build("llama")
        install_token_loss(model)
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **kwargs)).eval()
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05
        logits = peft_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        wanted = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        out = peft_model(**batch)
        torch.testing.assert_close(out.loss, wanted)
        out.loss.backward()
        assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


def test_no_logits_for_untrained_tokens():
    """The head sees the trained positions only, and peak memory holds no (rows, vocabulary) matrix of all tokens."""
    model = build("llama")
    install_token_loss(model)
    seen = []
    model.lm_head.register_forward_hook(
        lambda module, inputs, outputs: seen.append([tuple(tensor.shape) for tensor in (*inputs, *outputs)])
    )
    ids = torch.randint(1, 97, (4, 32))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    model(input_ids=ids, labels=labels).loss.backward()
    # 8 trained positions in; out come the loss and a number for each of them
    assert seen == [[(8, model.config.hidden_size), (), (8,)]]
