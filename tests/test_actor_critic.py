"""PPO's models: policy, value model, reference and reward model on one base; rollouts; what scores them."""

import copy
import functools
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import merge_peft_adapter
from stagewise.arguments import LoraArguments, ModelArguments
from stagewise.errors import InputError
from stagewise.losses.logprobs import token_logprobs
from stagewise.modeling import actor_critic
from stagewise.modeling.actor_critic import (
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    ActorCritic,
    completion_batch,
    load_actor_critic,
    log_memory,
)
from stagewise.modeling.generation import load_for_inference, sampling_config, score
from stagewise.modeling.loading import prompt_limit
from stagewise.modeling.lora import attach_adapter
from stagewise.modeling.quantization import keep_weights_unpacked
from stagewise.modeling.reward import (
    RewardFunction,
    RewardModel,
    Sample,
    load_reward_function,
    load_reward_model,
    load_scorer,
)
from stagewise.trainers.rollouts import collect, sample_completions
from tests.stages import run_rm
from tests.test_token_loss import build

PAD = 0
NO_STOP = [97]  # no token of the vocabulary
# ids below 97, the vocabulary of tests.test_token_loss.build
PROMPTS = [[11, 12, 13], [21, 22, 23, 24, 25, 26, 27], [31, 32, 33, 34, 35]]
COMPLETIONS = [[41, 42, 43, 44], [51], [61, 62, 63]]
MASK = [[True] * 4, [True, False, False, False], [True] * 3 + [False]]
# rotary positions; with norms on queries and keys; learned positions; alibi; sliding windows and soft-capped logits
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "bloom", "gemma2"]


def lora(**options) -> LoraArguments:
    return LoraArguments(**{"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options)


def actor_of(name: str, temperature: float = 1.0, **options) -> ActorCritic:
    return ActorCritic(attach_adapter(build(name), lora(**options)), temperature=temperature).eval()


def perturb(actor: ActorCritic, *adapters: str, scale: float = 0.1) -> ActorCritic:
    """Noise on all weights of these adapters, as if they had been trained; each adapter's own."""
    for adapter in adapters:
        generator = torch.Generator().manual_seed(sum(map(ord, adapter)))
        for name, parameter in actor.named_parameters():
            if f".{adapter}." in name or (adapter == "value_head" and name.startswith("value_head.")):
                parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return actor


def batch(prompts=PROMPTS, completions=COMPLETIONS):
    return completion_batch(prompts, completions, PAD)


@torch.no_grad()
def logprobs_by_hand(model, prompts=PROMPTS, completions=COMPLETIONS, temperature=1.0) -> torch.Tensor:
    """Each row alone, without padding, from the whole logits of a model; (B, T), 0 behind the completions."""
    result = torch.zeros(len(prompts), max(map(len, completions)))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        log_p = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0].float() / temperature, -1)
        for t, token in enumerate(completion):
            result[row, t] = log_p[len(prompt) - 1 + t, token]
    return result


@torch.no_grad()
def outputs(actor: ActorCritic) -> dict[str, torch.Tensor]:
    """What policy, value model and reference say of the batch."""
    logprobs, values, _ = actor(**vars(batch()))
    return {"policy": logprobs, "values": values, "reference": actor.reference_logprobs(batch())}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def sampling(max_new_tokens=6, temperature=1.0, top_p=1.0, stop_ids=NO_STOP):
    return sampling_config(SimpleNamespace(pad_token_id=PAD), stop_ids, max_new_tokens, temperature, top_p)


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def upto_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    stops = [at for at, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[0] + 1] if stops else tokens


def gradients(actor: ActorCritic, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a loss in which every token's log-probability and value counts differently, as training computes it."""
    actor.train()
    actor.zero_grad()
    torch.manual_seed(seed)
    logprobs, values, _ = actor(**vars(batch()))
    steps = torch.arange(1.0, logprobs.numel() + 1).view_as(logprobs)
    ((logprobs / steps).sum() + (values * steps).sum()).backward()
    actor.eval()
    return {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}


def trainable(actor: ActorCritic) -> set[str]:
    return {name for name, parameter in actor.named_parameters() if parameter.requires_grad}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerance) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture
def log():
    """What the package says, whether or not a stage has set its loggers up before."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("stagewise")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_and_entropy_of_two_tokens_by_hand():
    """Logits (ln 9, 0) at temperature 2 are the odds 3 to 1; (0, 0) are even odds."""
    head = torch.tensor([[9.0, 1.0], [1.0, 1.0]]).log()
    logprobs, entropies = token_logprobs(torch.eye(2), lambda h: h @ head, torch.tensor([0, 1]), 2, temperature=2.0)
    torch.testing.assert_close(logprobs, torch.tensor([0.75, 0.5]).log())
    by_hand = [-(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()), torch.tensor(2.0).log()]
    torch.testing.assert_close(entropies, torch.stack(by_hand))


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_logprobs_are_those_of_whole_logits_in_any_chunks(chunk_rows):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels, token_weights = torch.randint(0, 50, (37,)), torch.rand(37)
    log_p = torch.log_softmax(hidden @ weight.t() / 0.7, -1)
    wanted = log_p[range(37), labels]
    logprobs, entropies = token_logprobs(hidden, lambda h: h @ weight.t(), labels, 50, 0.7, chunk_rows)
    torch.testing.assert_close(logprobs, wanted)
    torch.testing.assert_close(entropies, -(log_p.exp() * log_p).sum(-1).detach())
    assert not entropies.requires_grad
    found = torch.autograd.grad((logprobs * token_weights).sum(), [hidden, weight])
    for one, other in zip(found, torch.autograd.grad((wanted * token_weights).sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_token_that_cannot_be_drawn_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, 0.0, float("-inf")]], requires_grad=True)
    logprobs, entropies = token_logprobs(logits, torch.nn.Identity(), torch.tensor([1]), 3)
    torch.testing.assert_close(entropies, torch.tensor([2.0]).log())
    assert torch.autograd.grad(logprobs.sum(), logits)[0].isfinite().all()


def test_no_token_gives_no_logprob_and_a_gradient_of_nothing():
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, entropies = token_logprobs(hidden, torch.nn.Identity(), torch.zeros(0, dtype=torch.long), 4)
    assert (logprobs.shape, entropies.shape, logprobs.dtype) == ((0,), (0,), torch.float32)
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].shape == (0, 4)


def test_a_batch_is_compact_and_knows_what_predicts_what():
    rows = completion_batch([[5, 6], [7, 8, 9]], [[1, 2, 3], [4]], pad_token_id=0)
    assert rows.input_ids.tolist() == [[5, 6, 1, 2, 3], [7, 8, 9, 4, 0]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert rows.mask.tolist() == [[True, True, True], [True, False, False]]
    assert rows.source[0].tolist() == [1, 2, 3]
    assert rows.source[1, 0].item() == 2
    assert rows.labels[rows.mask].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_a_batch_have_the_logprobs_that_each_has_alone(name):
    wanted = logprobs_by_hand(build(name), temperature=0.7)
    actor = actor_of(name, temperature=0.7)
    torch.testing.assert_close(actor.policy_logprobs(batch()), wanted, atol=1e-5, rtol=1e-5)
    wide = batch()
    wide.mask = torch.nn.functional.pad(wide.mask, (0, 3))  # as the rows of a larger batch of rollouts
    torch.testing.assert_close(actor.policy_logprobs(wide)[:, :4], wanted, atol=1e-5, rtol=1e-5)
    assert actor.policy_logprobs(wide)[:, 4:].eq(0).all()


def test_entropies_are_those_of_the_policy_at_the_temperature():
    actor = perturb(actor_of("gemma2", temperature=0.7), POLICY)
    _, _, entropies = actor(**vars(batch()))
    with torch.no_grad(), actor.adapters.use(POLICY):
        log_p = torch.log_softmax(actor.base(torch.tensor([PROMPTS[2] + COMPLETIONS[2]])).logits[0] / 0.7, -1)
    by_hand = -(log_p.exp() * log_p).sum(-1)[4:7]
    torch.testing.assert_close(entropies[2], torch.cat([by_hand, torch.zeros(1)]), atol=1e-5, rtol=1e-5)


def test_an_architecture_with_more_behind_its_head_keeps_its_own_logits():
    model = build("llama")
    original = model.forward

    def doubled(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    wanted = logprobs_by_hand(model)
    actor = ActorCritic(attach_adapter(model, lora())).eval()
    torch.testing.assert_close(actor.policy_logprobs(batch()), wanted, atol=1e-5, rtol=1e-5)


# --- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_are_those_that_generation_sampled_from(name):
    """Left-padded prompts, the cache and one token at a time give what the training forward gives of compact rows."""
    actor = perturb(actor_of(name, temperature=0.7), POLICY)
    stop_ids = list(range(40, 60))
    config = sampling(8, temperature=0.7, stop_ids=stop_ids)
    ids, mask = left_padded(PROMPTS)
    torch.manual_seed(3)
    with torch.no_grad(), actor.adapters.use(POLICY):
        out = actor.base.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    completions = [upto_stop(tokens, stop_ids) for tokens in out.sequences[:, ids.shape[1] :].tolist()]
    steps = torch.log_softmax(torch.stack(out.logits, 1) / 0.7, -1)
    wanted = torch.zeros(3, max(map(len, completions)))
    for row, completion in enumerate(completions):
        for t, token in enumerate(completion):
            wanted[row, t] = steps[row, t, token]
    rows = batch(completions=completions)
    torch.testing.assert_close(actor.policy_logprobs(rows), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(actor(**vars(rows))[0], wanted, atol=1e-4, rtol=0)
    torch.manual_seed(3)
    assert torch.equal(actor.generate(ids, mask, config), out.sequences[:, ids.shape[1] :])
    assert (actor.policy_logprobs(rows) - actor.reference_logprobs(rows)).abs().max() > 1e-2


def test_tokens_are_as_frequent_as_their_logprobs_say():
    actor = perturb(actor_of("llama", temperature=0.7), POLICY)
    n = 4000
    torch.manual_seed(0)
    drawn = sample_completions(actor, [PROMPTS[0]] * n, sampling(1, temperature=0.7), n, torch.device("cpu"))
    tokens = list(range(97))
    p = actor.policy_logprobs(batch([PROMPTS[0]] * 97, [[token] for token in tokens])).exp().squeeze(1)
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    counts = Counter(completion[0] for completion in drawn)
    frequencies = torch.tensor([counts[token] / n for token in tokens])
    # no token of 97 is off by five standard deviations (or by two draws, where it is rare)
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 2 / n).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_left_padding_changes_no_completion(name):
    """A nucleus that holds one token leaves no choice: the token of the highest logit, looked up without a cache."""
    actor = perturb(actor_of(name), POLICY)
    stop_ids = list(range(90, 97))
    config = sampling(6, top_p=1e-6, stop_ids=stop_ids)
    prompts = [*PROMPTS, [5], list(range(60, 72))]
    wanted = []
    for prompt in prompts:
        tokens = list(prompt)
        with torch.no_grad(), actor.adapters.use(POLICY):
            for _ in range(6):
                tokens.append(int(actor.base(torch.tensor([tokens])).logits[0, -1].argmax()))
        wanted.append(upto_stop(tokens[len(prompt) :], stop_ids))
    assert len({tuple(completion) for completion in wanted}) > 1
    for batch_size in (1, 2, 8):
        assert sample_completions(actor, prompts, config, batch_size, torch.device("cpu")) == wanted


def test_completions_end_with_their_stop_token():
    actor = perturb(actor_of("llama"), POLICY)
    torch.manual_seed(0)
    stop_ids = list(range(1, 40))
    completions = sample_completions(actor, PROMPTS * 5, sampling(8, stop_ids=stop_ids), 4, torch.device("cpu"))
    assert all(1 <= len(completion) <= 8 for completion in completions)
    assert all(token not in stop_ids for completion in completions for token in completion[:-1])
    assert len({len(completion) for completion in completions}) > 2
    assert all(completion[-1] in stop_ids or len(completion) == 8 for completion in completions)


ROWS = [{"input_ids": prompt, "text": f"prompt {i}"} for i, prompt in enumerate(PROMPTS)]


def positions_of(actor: ActorCritic) -> list[int]:
    """A list that gets the length of the rows whenever the decoder is entered."""
    lengths: list[int] = []
    embedding = actor.base.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    return lengths


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_token_enters_the_decoder_once(checkpointing):
    """The longest prompt has 7 tokens; 10 new ones need 9 more positions. Then three models read each row."""
    actor = actor_of("llama").train()
    if checkpointing:
        actor.activation_checkpointing_enable()
    lengths = positions_of(actor)
    collect(actor, lambda samples: [0.0] * 3, ROWS, [0, 1, 2], sampling(10), 3, torch.device("cpu"))
    assert lengths[:10] == [7, *[1] * 9]
    assert sorted(lengths[10:]) == sorted(3 * [len(ids) + 10 for ids in PROMPTS])
    assert actor.training


def test_rollouts_hold_what_each_part_says_of_the_completions():
    actor = actor_of("llama", temperature=0.7, lora_dropout=0.5)  # off while samples are made
    perturb(actor, POLICY, VALUE, "value_head").train()
    seen = []

    def scorer(samples):
        seen.extend(samples)
        return [float(len(sample.completion_ids)) for sample in samples]

    torch.manual_seed(0)
    stop_ids = list(range(1, 30))
    rollouts, times = collect(
        actor, scorer, ROWS, [4, 7, 9], sampling(8, 0.7, stop_ids=stop_ids), 2, torch.device("cpu")
    )
    completions = [rollouts.completion(row) for row in range(3)]
    assert [rollouts.prompt(row) for row in range(3)] == PROMPTS
    assert rollouts.index.tolist() == [4, 7, 9]
    assert len(set(map(len, completions))) > 1
    assert seen == [
        Sample(f"prompt {row}", PROMPTS[row], completions[row], completions[row][-1] in stop_ids) for row in range(3)
    ]
    assert rollouts.finished.tolist() == [sample.finished for sample in seen]
    assert rollouts.scores.tolist() == [float(len(completion)) for completion in completions]
    assert min(times.generate_s, times.evaluate_s) > 0
    actor.eval()
    rows = batch(completions=completions)
    with torch.no_grad():
        logprobs, values, _ = actor(**vars(rows))
    for found, wanted in (
        (rollouts.logprobs, logprobs),
        (rollouts.values, values),
        (rollouts.ref_logprobs, logprobs_by_hand(build("llama"), PROMPTS, completions, 0.7)),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    part = rollouts.batch([1, 0], PAD)
    torch.testing.assert_close(actor(**vars(part))[0], rollouts.logprobs[[1, 0]], atol=1e-5, rtol=1e-5)


def test_the_models_own_generation_settings_do_not_shape_samples():
    actor = perturb(actor_of("llama"), POLICY)
    ids, mask = left_padded(PROMPTS)
    own = actor.base.generation_config

    def samples():
        torch.manual_seed(0)
        return actor.generate(ids, mask, sampling(8))

    plain = samples()
    own.update(repetition_penalty=5.0, top_k=1, temperature=0.01, eos_token_id=int(plain[0, 0]), do_sample=True)
    before = own.to_dict()
    assert torch.equal(samples(), plain)
    assert actor.base.generation_config is own
    with pytest.raises(IndexError):
        actor.generate(torch.full_like(ids, 1000), mask, sampling(8))
    assert actor.base.generation_config is own
    assert own.to_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0.0: expected a number above 0"),
        ({"top_p": 1.5}, "--top_p 1.5: expected a share above 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: expected 1 or more"),
    ],
)
def test_sampling_that_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        sampling(**options)


# --- who reads which weights -----------------------------------------------------------------------------------------


def test_a_fresh_policy_is_the_reference_is_the_bare_base():
    wanted = logprobs_by_hand(build("qwen3"), temperature=0.7)
    found = outputs(actor_of("qwen3", temperature=0.7))
    torch.testing.assert_close(found["policy"], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["reference"], wanted, atol=1e-5, rtol=1e-5)
    assert found["values"].eq(0).all()
    assert found["values"].shape == (3, 4)


def test_adapters_are_on_within_their_context_alone():
    actor = actor_of("llama")
    layer = actor.base.model.layers[0].self_attn.q_proj
    assert layer.active_adapters == []
    with actor.adapters.use(POLICY):
        with actor.adapters.use(VALUE):
            assert layer.active_adapters == [VALUE]
        assert layer.active_adapters == [POLICY]
    with pytest.raises(IndexError):  # there is no such token
        actor.policy_logprobs(batch(completions=[[1000]] * 3))
    assert layer.active_adapters == []


@pytest.mark.parametrize(
    ("adapters", "wanted"),
    [
        ([POLICY], {"policy"}),
        ([VALUE], {"values"}),
        (["value_head"], {"values"}),
        ([REWARD], set()),
    ],
)
def test_each_adapter_is_read_by_its_own_model_alone(adapters, wanted):
    actor = perturb(actor_of("llama"), "value_head")
    actor.policy.add_adapter(REWARD, copy.deepcopy(actor.policy.peft_config[POLICY]))
    actor.share_adapters()
    before = outputs(actor)
    assert changed(before, outputs(perturb(actor, *adapters))) == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_value_is_the_head_of_the_state_that_predicts_the_token(name):
    actor = perturb(actor_of(name), POLICY, VALUE, "value_head")
    alone = attach_adapter(build(name), lora()).eval()
    weights = dict(actor.policy.named_parameters())
    for key, parameter in alone.named_parameters():
        parameter.data.copy_(weights[key.replace(f".{POLICY}.", f".{VALUE}.")])
    _, values, _ = actor(**vars(batch()))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            states = alone(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[-1][0]
            wanted = states @ actor.value_head.weight[0] + actor.value_head.bias
        start = len(prompt) - 1
        found = values[row, : len(completion)]
        torch.testing.assert_close(found, wanted[start : start + len(completion)], atol=1e-5, rtol=1e-5)
    assert values[~torch.tensor(MASK)].eq(0).all()


def test_each_policy_gradient_is_that_of_the_policy_alone():
    """The value model's part of the loss reaches no weight of the policy's, and the other way round."""
    actor = perturb(actor_of("llama"), POLICY, VALUE, "value_head")
    both = gradients(actor)
    actor.zero_grad()
    logprobs, _, _ = actor(**vars(batch()))
    (logprobs / torch.arange(1.0, 13).view(3, 4)).sum().backward()
    alone = {name: p.grad for name, p in actor.named_parameters() if p.grad is not None and p.grad.any()}
    assert alone.keys() == {name for name in both if f".{POLICY}." in name}
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, both[name])


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": "embed_tokens,lm_head"}, {"target_modules": "q_proj,lm_head"}],
    ids=["lora", "dora", "modules to save", "adapter on the head"],
)
def test_all_that_is_trained_gets_a_gradient_and_nothing_else(options):
    """What got none would leave the other processes of a run waiting."""
    actor = actor_of("llama", **options)
    actor.policy.add_adapter(REWARD, LoraConfig(target_modules=["q_proj"], r=2))
    actor.share_adapters()
    perturb(actor, POLICY, VALUE, "value_head", REWARD)
    found = gradients(actor)
    assert found.keys() == trainable(actor)
    assert all(gradient.any() for gradient in found.values())
    owners = {"value_head.weight", "value_head.bias"}
    owners |= {name for name, _ in actor.named_parameters() if f".{POLICY}." in name or f".{VALUE}." in name}
    assert found.keys() == {name for name in owners if not (f".{VALUE}." in name and "lm_head" in name)}
    assert any(f".{REWARD}." in name for name, _ in actor.named_parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_equal_those_of_kept_activations(dropout):
    plain, checkpointed = (
        perturb(actor_of("llama", lora_dropout=dropout), POLICY, VALUE, "value_head") for _ in range(2)
    )
    checkpointed.activation_checkpointing_enable()
    calls = []
    for layer in checkpointed.base.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    wanted = gradients(plain)
    assert_same(gradients(checkpointed), wanted, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2 * 2 * 2  # two layers, for policy and value model, once more in backward
    other = gradients(plain, seed=1)
    assert dropout == 0 or any(not torch.equal(other[name], wanted[name]) for name in wanted)


def test_an_adapter_that_comes_after_checkpointing_does_not_mix_it_up():
    plain, checkpointed = (perturb(actor_of("llama"), POLICY, VALUE, "value_head") for _ in range(2))
    checkpointed.activation_checkpointing_enable()
    checkpointed.policy.add_adapter(REWARD, LoraConfig(target_modules=["q_proj"], r=2))
    checkpointed.share_adapters()
    assert_same(gradients(checkpointed), gradients(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"target_modules": "q_proj,lm_head"}, {"modules_to_save": "lm_head"}], ids=["adapter", "saved"]
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_head_in_chunks_is_computed_again_with_its_own_adapter(name, options, monkeypatch):
    policy = attach_adapter(build(name, tie_word_embeddings=False), lora(**options))
    actor = perturb(ActorCritic(policy).eval(), POLICY, VALUE, "value_head")
    wanted, logprobs = gradients(actor), actor(**vars(batch()))[0]
    chunked = functools.partial(token_logprobs, chunk_rows=3)
    monkeypatch.setattr(actor_critic, "token_logprobs", chunked)
    assert_same(gradients(actor), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actor(**vars(batch()))[0], logprobs)
    reference = actor.reference_logprobs(batch())
    by_hand = logprobs_by_hand(build(name, tie_word_embeddings=False))
    torch.testing.assert_close(reference, by_hand, atol=1e-5, rtol=1e-5)


def test_reentrant_checkpointing_is_refused():
    actor, given = actor_of("llama"), {"use_reentrant": True}
    with pytest.raises(InputError, match="use_reentrant would compute layers again with the wrong adapter"):
        actor.activation_checkpointing_enable(activation_checkpointing_kwargs=given)
    with pytest.raises(InputError, match="use_reentrant would compute layers again with the wrong adapter"):
        actor.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)  # the Trainer before 5.20


class OneStep(Trainer):
    """The Trainer's own way to switch checkpointing on."""

    def compute_loss(self, model, inputs, **_):
        logprobs, values, _ = model(**inputs)
        return logprobs.sum() + values.sum()


def test_the_trainer_can_switch_checkpointing_on(tmp_path):
    actor = actor_of("llama")
    layers = []
    actor.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: layers.append(1))
    flag = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else None
    args = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], save_strategy="no", remove_unused_columns=False, use_cpu=True,
        disable_tqdm=True, **{flag or "gradient_checkpointing": True},
    )  # fmt: skip
    OneStep(actor, args, train_dataset=[batch()], data_collator=lambda rows: dict(vars(rows[0]))).train()
    assert len(layers) == 2 * 2


def test_a_policy_that_starts_from_an_adapter_has_it_as_reference(tiny_model_dir, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)).eval()
    torch.manual_seed(0)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    start = logprobs_by_hand(adapter, temperature=0.7)
    with adapter.disable_adapter():
        bare = logprobs_by_hand(adapter, temperature=0.7)
    assert (start - bare).abs().max() > 1e-2
    adapter.save_pretrained(tmp_path)
    actor = load_actor_critic(
        ModelArguments(model_name_or_path=tiny_model_dir), LoraArguments(peft_path=str(tmp_path)), tokenizer, 0.7
    ).eval()
    for found in (outputs(actor)["policy"], outputs(actor)["reference"]):
        torch.testing.assert_close(found, start, atol=1e-5, rtol=1e-5)
    perturb(actor, "value_head")
    before = outputs(actor)
    assert changed(before, outputs(perturb(actor, POLICY))) == {"policy"}
    assert changed(outputs(actor), outputs(perturb(actor, VALUE))) == {"values"}
    found = gradients(actor)
    assert found.keys() == trainable(actor)
    assert not any(f".{REFERENCE}." in name for name in found)
    sizes = actor.weights_gib()
    assert sizes["reference"] == sizes["policy"] == sizes["value_model"] - (64 + 1) * 4 / 2**30


@pytest.mark.parametrize("tied", [True, False])
def test_modules_that_the_policy_trains_whole_are_the_policys_alone(tied, tiny_model_dir, tokenizer, tmp_path):
    """Embedding and head of the policy change; reference and values still read the base's."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    if not tied:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.1)
        model.save_pretrained(folder)
    bare = logprobs_by_hand(AutoModelForCausalLM.from_pretrained(folder))
    actor = load_actor_critic(
        ModelArguments(model_name_or_path=str(folder)), lora(modules_to_save="embed_tokens,lm_head"), tokenizer, 1.0
    ).eval()
    perturb(actor, "value_head")
    before = outputs(actor)
    torch.testing.assert_close(before["policy"], bare, atol=1e-5, rtol=1e-5)
    for name, parameter in actor.named_parameters():
        if f"modules_to_save.{POLICY}." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert changed(before, outputs(actor)) == {"policy"}
    torch.testing.assert_close(outputs(actor)["reference"], bare, atol=1e-5, rtol=1e-5)
    assert gradients(perturb(actor, POLICY, VALUE)).keys() == trainable(actor)
    actor.save_policy(str(tmp_path / "policy"))
    goes_on = load_actor_critic(
        ModelArguments(model_name_or_path=str(folder)),
        LoraArguments(peft_path=str(tmp_path / "policy")),
        tokenizer,
        1.0,
    ).eval()
    for found in (outputs(goes_on)["policy"], outputs(goes_on)["reference"]):
        torch.testing.assert_close(found, outputs(actor)["policy"], atol=1e-5, rtol=1e-5)
    before = outputs(goes_on)
    assert changed(before, outputs(perturb(goes_on, POLICY))) == {"policy"}
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "policy").eval()
    wanted = logprobs_by_hand(saved)
    torch.testing.assert_close(actor.policy_logprobs(batch()), wanted, atol=1e-5, rtol=1e-5)
    greedy = sample_completions(actor, PROMPTS, sampling(3, top_p=1e-6, stop_ids=[600]), 3, torch.device("cpu"))
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        with torch.no_grad():
            logits = saved(torch.tensor([prompt + completion])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == completion


# --- all weights trained ---------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tiny_model_dir, tokenizer):
    arguments = ModelArguments(model_name_or_path=tiny_model_dir)
    return load_actor_critic(arguments, LoraArguments(use_peft=False), tokenizer, 0.7).eval()


def test_without_adapters_there_are_three_models(whole, tiny_model_dir):
    bare = logprobs_by_hand(AutoModelForCausalLM.from_pretrained(tiny_model_dir), temperature=0.7)
    found = outputs(perturb(whole, "value_head"))
    torch.testing.assert_close(found["policy"], bare, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["reference"], bare, atol=1e-5, rtol=1e-5)
    gradient = gradients(whole)
    assert gradient.keys() == trainable(whole)
    assert all(value.any() for value in gradient.values())
    kinds = Counter(name.split(".")[0] for name in gradient)
    count = len(list(whole.base.parameters()))
    assert kinds == {"policy": count, "value_model": count, "value_head": 2}  # the head is the embedding's matrix
    assert not any(parameter.requires_grad for parameter in whole.reference.parameters())
    with torch.no_grad():
        whole.base.model.norm.weight.mul_(1.5)
    assert changed(found, outputs(whole)) == {"policy"}
    before = outputs(whole)
    with torch.no_grad():
        whole.value_model.norm.weight.mul_(1.5)
    assert changed(before, outputs(whole)) == {"values"}


def test_checkpointing_without_adapters_covers_policy_and_value_model(whole):
    perturb(whole, "value_head")
    wanted = gradients(whole)
    calls = []
    for decoder in (whole.base.model, whole.value_model):
        decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    whole.activation_checkpointing_enable()
    assert_same(gradients(whole), wanted, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2 * 2


def test_whole_models_are_saved_and_loaded(whole, tiny_model_dir, tokenizer, tmp_path):
    with torch.no_grad():
        whole.base.model.norm.weight.mul_(1.5)
        whole.value_model.norm.weight.mul_(0.5)
    perturb(whole, "value_head")
    whole.save_policy(str(tmp_path))
    assert not (tmp_path / "adapter_config.json").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = outputs(whole)
    torch.testing.assert_close(logprobs_by_hand(saved, temperature=0.7), wanted["policy"], atol=1e-5, rtol=1e-5)
    whole.save_value_model(str(tmp_path))
    arguments = ModelArguments(model_name_or_path=tiny_model_dir)
    other = load_actor_critic(arguments, LoraArguments(use_peft=False), tokenizer, 0.7).eval()
    other.load_value_model(str(tmp_path))
    assert torch.equal(outputs(other)["values"], wanted["values"])
    assert wanted["values"].any()
    other.load_policy(str(tmp_path))
    assert torch.equal(outputs(other)["policy"], wanted["policy"])
    assert gradients(other).keys() == trainable(other)


def test_a_policy_trained_whole_needs_models_beside_it():
    with pytest.raises(InputError):
        ActorCritic(build("llama"))
    with pytest.raises(InputError):
        ActorCritic(build("llama"), reference=build("llama"))


# --- the reward model ------------------------------------------------------------------------------------------------

STEPS = ("--max_steps", "6", "--do_train", "True", "--save_strategy", "no")
SMALL = ("--lora_rank", "8", "--lora_dropout", "0")


@pytest.fixture(scope="module")
def rm_dir(tiny_model_dir, preference_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo-rm") / "out"
    run_rm(tiny_model_dir, preference_file, folder, *SMALL, *STEPS)
    return folder


@pytest.fixture(scope="module")
def embedding_rm_dir(tiny_model_dir, preference_file, tmp_path_factory):
    """An adapter that brings an embedding of its own."""
    folder = tmp_path_factory.mktemp("ppo-rm") / "out"
    run_rm(tiny_model_dir, preference_file, folder, *SMALL, *STEPS, "--modules_to_save", "embed_tokens,score")
    return folder


@pytest.fixture(scope="module")
def merged_rm_dir(tiny_model_dir, rm_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo-merged-rm") / "out"
    merge_peft_adapter.main(["--base_model", tiny_model_dir, "--lora_model", str(rm_dir), "--output_dir", str(folder)])
    return folder


@pytest.fixture
def actor(tiny_model_dir, tokenizer):
    arguments = ModelArguments(model_name_or_path=tiny_model_dir)
    return load_actor_critic(arguments, LoraArguments(lora_rank=4), tokenizer, 0.7).eval()


ANSWERS = ["Gladly: it is 4.", "No.", "Who cares, count yourself. Leave me alone now, will you?", "4"]


def chat_samples(tokenizer, finished: bool) -> tuple[list[Sample], list[str]]:
    """Samples of several lengths, and the text that a reward model should read of each (chatml)."""
    samples, texts = [], []
    for i, answer in enumerate(ANSWERS):
        prompt = "<|im_start|>user\n" + "What is 2 plus 2? " * (1 + i % 3) + "<|im_end|>\n<|im_start|>assistant\n"
        completion = answer + ("<|im_end|>" if finished else "")
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
        whole = prompt + completion + ("\n" if finished else "")
        suffix = tokenizer("\n", add_special_tokens=False)["input_ids"] if finished else []
        assert [*ids[0], *ids[1], *suffix] == tokenizer(whole, add_special_tokens=False)["input_ids"]
        samples.append(Sample(prompt, *ids, finished))
        texts.append(whole)
    return samples, texts


def newline(tokenizer) -> list[int]:
    return tokenizer("\n", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["rm_dir", "embedding_rm_dir"])
def test_the_reward_adapter_on_the_policys_base_scores_as_it_did_alone(kind, actor, tokenizer, log, request):
    folder = request.getfixturevalue(kind)
    base = dict(actor.base.named_parameters())
    scorer = load_reward_model(str(folder), actor, tokenizer, newline(tokenizer), batch_size=3)
    assert f"reward model: the adapter {folder}, on the policy's own base" in " ".join(log)
    assert scorer.weights_gib == 0
    shared = {id(p) for p in actor.base.parameters()}
    assert all(id(p) in shared for p in scorer.model.base_model.parameters())
    assert all(id(p) in shared for p in base.values())
    model, own_tokenizer = load_for_inference(str(folder), scores=True)
    before = outputs(perturb(actor, "value_head"))
    trained = trainable(actor)
    for finished in (True, False):
        samples, texts = chat_samples(tokenizer, finished)
        wanted = score(model, own_tokenizer, texts)
        assert max(wanted) - min(wanted) > 1e-2
        assert scorer(samples) == pytest.approx(wanted, abs=1e-5)
        # neither the policy's adapter nor the value model's is seen by the reward model
        perturb(actor, POLICY, VALUE)
        assert scorer(samples) == pytest.approx(wanted, abs=1e-5)
        for each, value in zip(samples, wanted, strict=True):
            assert scorer([each]) == pytest.approx([value], abs=1e-5)
    after = outputs(actor)
    assert changed(before, after) == {"policy", "values"}
    perturb(actor, REWARD)
    assert changed(after, outputs(actor)) == set()
    assert scorer(samples) != pytest.approx(wanted, abs=1e-3)
    assert trainable(actor) == trained
    assert gradients(actor).keys() == trained
    assert not any(f".{REWARD}." in name for name in trained)


@pytest.mark.parametrize("kind", ["rm_dir", "embedding_rm_dir"])
def test_a_shared_reward_model_lives_with_a_policy_that_has_an_embedding_of_its_own(
    kind, tiny_model_dir, tokenizer, request
):
    folder, arguments = request.getfixturevalue(kind), ModelArguments(model_name_or_path=tiny_model_dir)
    actor = load_actor_critic(arguments, lora(modules_to_save="embed_tokens,lm_head"), tokenizer, 1.0).eval()
    scorer = load_reward_model(str(folder), actor, tokenizer, newline(tokenizer), batch_size=2)
    assert scorer.weights_gib == 0
    perturb(actor, POLICY)
    samples, texts = chat_samples(tokenizer, True)
    wanted = score(*load_for_inference(str(folder), scores=True), texts)
    assert scorer(samples) == pytest.approx(wanted, abs=1e-5)
    bare = logprobs_by_hand(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    torch.testing.assert_close(outputs(actor)["reference"], bare, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [{}, {"modules_to_save": "embed_tokens,lm_head"}], ids=["lora", "own embedding"])
@pytest.mark.parametrize("kind", ["rm_dir", "embedding_rm_dir"])
def test_the_value_model_starts_as_the_reward_model(kind, policy, tiny_model_dir, tokenizer, tmp_path, request):
    """The value before a token is the score of what is there already."""
    folder, arguments = str(request.getfixturevalue(kind)), ModelArguments(model_name_or_path=tiny_model_dir)
    actor = load_actor_critic(arguments, lora(**policy), tokenizer, 1.0).eval()
    bare = outputs(actor)
    scorer = load_scorer(folder, None, actor, tokenizer, newline(tokenizer), 3)
    found = outputs(actor)
    assert changed(bare, found) == {"values"}
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        begun = [Sample("", prompt, completion[:t], False) for t in range(len(completion))]
        assert found["values"][row, : len(completion)].tolist() == pytest.approx(scorer(begun), abs=1e-5)
    samples, texts = chat_samples(tokenizer, True)
    wanted = score(*load_for_inference(folder, scores=True), texts)
    gradient = gradients(actor)
    assert gradient.keys() == trainable(actor)
    assert not any(f".{REWARD}." in name for name in gradient)
    assert changed(found, outputs(perturb(actor, VALUE, "value_head"))) == {"values"}
    assert changed(found, outputs(perturb(actor, POLICY))) == {"policy", "values"}
    assert scorer(samples) == pytest.approx(wanted, abs=1e-5)
    assert sum(actor.weights_gib().values()) == pytest.approx(distinct_gib(actor))
    actor.save_value_model(str(tmp_path))
    resumed = load_actor_critic(arguments, lora(**policy), tokenizer, 1.0).eval()
    load_scorer(folder, None, resumed, tokenizer, newline(tokenizer), 3)
    resumed.load_value_model(str(tmp_path))
    assert torch.equal(outputs(resumed)["values"], outputs(actor)["values"])


def test_the_value_model_can_start_at_nothing(actor, rm_dir, merged_rm_dir, tokenizer):
    load_scorer(str(rm_dir), None, actor, tokenizer, [], 3, "zero")
    assert outputs(actor)["values"].eq(0).all()
    with pytest.raises(InputError, match="--value_init reward_model: needs .* on the policy's own base"):
        load_scorer(str(merged_rm_dir), None, actor, tokenizer, [], 3, "reward_model")
    load_scorer(str(merged_rm_dir), None, actor, tokenizer, [], 3)
    assert outputs(actor)["values"].eq(0).all()


def test_scoring_between_forward_and_backward_changes_no_gradient(actor, rm_dir, tokenizer):
    perturb(actor, POLICY, VALUE, "value_head")
    scorer = load_reward_model(str(rm_dir), actor, tokenizer, newline(tokenizer), batch_size=4)
    actor.activation_checkpointing_enable()
    samples, _ = chat_samples(tokenizer, True)
    policy = [p for name, p in actor.named_parameters() if f".{POLICY}." in name]
    actor.train()
    torch.manual_seed(0)
    wanted = torch.autograd.grad(actor(**vars(batch()))[0].sum(), policy)
    torch.manual_seed(0)
    loss = actor(**vars(batch()))[0].sum()
    scorer(samples)
    for found, gradient in zip(torch.autograd.grad(loss, policy), wanted, strict=True):
        assert torch.equal(found, gradient)


def test_paths_of_one_folder_are_one_base(tiny_model_dir, rm_dir, tokenizer, tmp_path):
    """A reward adapter joins the base also where another spelling of the same folder was given."""
    link = tmp_path / "link"
    link.symlink_to(Path(tiny_model_dir), target_is_directory=True)
    actor = load_actor_critic(ModelArguments(model_name_or_path=str(link)), lora(), tokenizer, 1.0).eval()
    assert load_reward_model(str(rm_dir), actor, tokenizer, [], 3).weights_gib == 0


def test_a_merged_reward_model_is_one_of_its_own_with_the_same_scores(actor, rm_dir, merged_rm_dir, tokenizer, log):
    samples, texts = chat_samples(tokenizer, True)
    wanted = score(*load_for_inference(str(rm_dir), scores=True), texts)
    scorer = load_reward_model(str(merged_rm_dir), actor, tokenizer, newline(tokenizer), batch_size=3)
    log_memory(actor, scorer)
    assert f"reward model: {merged_rm_dir}, a model of its own in memory" in " ".join(log)
    assert scorer(samples) == pytest.approx(wanted, abs=1e-4)
    size = sum(tensor.numel() for tensor in load_file(merged_rm_dir / "model.safetensors").values()) * 4 / 2**30
    assert scorer.weights_gib == pytest.approx(size)
    assert actor.weights_gib()["reward_model"] == 0
    assert f"reward_model {size:.3f}" in " ".join(log)
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


def test_a_reward_adapter_of_another_base_is_a_model_of_its_own(actor, rm_dir, tiny_model_dir, tokenizer, tmp_path):
    samples, texts = chat_samples(tokenizer, True)
    wanted = score(*load_for_inference(str(rm_dir), scores=True), texts)
    base, folder = tmp_path / "base", tmp_path / "rm"
    shutil.copytree(tiny_model_dir, base)
    shutil.copytree(rm_dir, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    scorer = load_reward_model(str(folder), actor, tokenizer, newline(tokenizer), batch_size=3)
    assert scorer.weights_gib > 0
    assert not any(REWARD in name for name, _ in actor.named_parameters())
    assert scorer(samples) == pytest.approx(wanted, abs=1e-5)


def test_a_reward_adapter_that_does_not_fit_the_policys_base_leaves_nothing_on_it(
    actor, rm_dir, tokenizer, tmp_path, log
):
    folder = tmp_path / "rm"
    shutil.copytree(rm_dir, folder)
    weights = load_file(rm_dir / "adapter_model.safetensors")
    more = weights | {"base_model.model.other.weight": torch.zeros(8, 64)}
    save_file(more, folder / "adapter_model.safetensors")
    perturb(actor, POLICY, VALUE, "value_head")
    before, trained = outputs(actor), trainable(actor)
    samples, texts = chat_samples(tokenizer, True)
    scorer = load_reward_model(str(folder), actor, tokenizer, newline(tokenizer), batch_size=3)
    assert "a model of its own in memory" in log[-1]
    assert scorer(samples) == pytest.approx(score(*load_for_inference(str(rm_dir), scores=True), texts), abs=1e-5)
    assert not any(REWARD in name for name, _ in actor.named_parameters())
    assert changed(before, outputs(actor)) == set()
    assert gradients(actor).keys() == trainable(actor) == trained


def test_a_policy_trained_whole_gets_a_reward_model_of_its_own(whole, rm_dir, tokenizer):
    samples, texts = chat_samples(tokenizer, True)
    scorer = load_scorer(str(rm_dir), None, whole, tokenizer, newline(tokenizer), 3)
    assert isinstance(scorer, RewardModel)
    wanted = score(*load_for_inference(str(rm_dir), scores=True), texts)
    with torch.no_grad():
        whole.base.model.norm.weight.mul_(1.5)
    assert scorer(samples) == pytest.approx(wanted, abs=1e-5)


def test_what_follows_a_stop_token_is_added_to_finished_samples_alone(actor, rm_dir, tokenizer):
    plain = load_reward_model(str(rm_dir), actor, tokenizer, [], batch_size=3)
    suffixed = RewardModel(plain.model, [7, 8], plain.on, batch_size=3)
    samples = [Sample("", [10, 11, 12], [20 + i, 30], finished) for i, finished in enumerate((True, False, True))]
    longer = [Sample("", s.prompt_ids, s.completion_ids + ([7, 8] if s.finished else []), s.finished) for s in samples]
    assert suffixed(samples) == pytest.approx(plain(longer), abs=1e-6)
    assert suffixed(samples)[0] != pytest.approx(plain(samples)[0], abs=1e-4)


def test_a_reward_model_with_another_tokenizer_is_refused(actor, rm_dir, merged_rm_dir, tokenizer, tmp_path):
    for source in (rm_dir, merged_rm_dir):
        folder = tmp_path / source.parent.name
        shutil.copytree(source, folder)
        other = AutoTokenizer.from_pretrained(source)
        other.add_tokens(["unheard-of"])
        other.save_pretrained(folder)
        with pytest.raises(InputError) as error:
            load_reward_model(str(folder), actor, tokenizer, [], 3)
        for part in (f"--reward_model_path {folder}", "601 and 600 entries", "run_rm.sh", "--reward_function"):
            assert part in str(error.value)
        assert not any(REWARD in name for name, _ in actor.named_parameters())


def test_a_language_model_is_no_reward_model(actor, tiny_model_dir, tokenizer, tmp_path):
    actor.save_policy(str(tmp_path))
    for folder in (tiny_model_dir, tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=r"--reward_model_path .* is no reward model.*reward_modeling\.py"):
            load_reward_model(str(folder), actor, tokenizer, [], 3)


def test_a_reward_adapter_on_other_experts_is_a_model_of_its_own(tokenizer, tmp_path, log):
    base, folder = tmp_path / "base", tmp_path / "rm"
    build("mixtral").save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    attach_adapter(model, lora(target_modules="down_proj"), "SEQ_CLS").save_pretrained(folder)
    actor = ActorCritic(attach_adapter(AutoModelForCausalLM.from_pretrained(base), lora())).eval()
    load_reward_model(str(folder), actor, tokenizer, [], batch_size=3)
    assert "on the policy's own base" not in " ".join(log)


@pytest.mark.parametrize(
    "name", ["llama tied", "mistral", "qwen2", "qwen3", "phi", "mixtral", "gemma2", "gpt2", "bloom"]
)
def test_reward_adapters_of_other_architectures_score_as_they_did_alone(name, tokenizer, tmp_path, log):
    base, folder = tmp_path / "base", tmp_path / "rm"
    build(name).save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    alone = attach_adapter(model, lora(), "SEQ_CLS").eval()
    for parameter in alone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    alone.save_pretrained(folder)
    policy = attach_adapter(AutoModelForCausalLM.from_pretrained(base), lora())
    actor = perturb(ActorCritic(policy).eval(), POLICY)
    scorer = load_reward_model(str(folder), actor, tokenizer, [], batch_size=3)
    assert "on the policy's own base" in " ".join(log)
    samples = [Sample("", *ids, False) for ids in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        wanted = [alone(torch.tensor([s.prompt_ids + s.completion_ids])).logits.item() for s in samples]
    assert max(wanted) - min(wanted) > 1e-2
    assert scorer(samples) == pytest.approx(wanted, abs=1e-5, rel=1e-5)


def test_the_score_head_stays_in_float32_on_a_bf16_base(tiny_model_dir, rm_dir, tokenizer):
    arguments = ModelArguments(model_name_or_path=tiny_model_dir, dtype="bfloat16")
    actor = load_actor_critic(arguments, lora(), tokenizer, 1.0).eval()
    scorer = load_reward_model(str(rm_dir), actor, tokenizer, newline(tokenizer), batch_size=3)
    assert torch.equal(scorer.model.score.weight, load_file(rm_dir / "adapter_model.safetensors")[
        "base_model.model.score.weight"
    ])  # fmt: skip
    samples, texts = chat_samples(tokenizer, True)
    own = load_for_inference(str(rm_dir), dtype="bfloat16", scores=True)
    assert scorer(samples) == pytest.approx(score(*own, texts), abs=2e-2)
    logprobs, values, entropies = actor(**vars(batch()))
    assert logprobs.dtype == values.dtype == entropies.dtype == torch.float32
    assert {p.dtype for name, p in actor.named_parameters() if p.requires_grad} == {torch.float32}


# --- a function that scores ------------------------------------------------------------------------------------------


def word_samples(tokenizer) -> list[Sample]:
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("It is 4.<|im_end|>", "No")]
    return [
        Sample("<|im_start|>user\nHi<|im_end|>\n", [1, 2], completions[0], True),
        Sample("<|im_start|>user\nBye<|im_end|>\n", [1, 2], completions[1], False),
    ]


def test_a_function_reads_the_rendered_prompt_and_the_bare_completion(tokenizer):
    seen = []

    def length(prompts, completions):
        seen.append((prompts, completions))
        return torch.tensor([len(text) for text in completions])

    assert RewardFunction(length, tokenizer, "length")(word_samples(tokenizer)) == [8.0, 2.0]
    prompts = ["<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>user\nBye<|im_end|>\n"]
    assert seen == [(prompts, ["It is 4.", "No"])]


def test_functions_are_found_in_modules_and_files(tokenizer, tmp_path, monkeypatch, actor):
    file = tmp_path / "my_rewards.py"
    file.write_text("def digits(prompts, completions):\n    return [sum(map(str.isdigit, c)) for c in completions]\n")
    for spec in (f"{file}:digits", "my_rewards:digits"):
        if spec.startswith("my_rewards"):
            monkeypatch.syspath_prepend(tmp_path)
        assert load_reward_function(spec, tokenizer)(word_samples(tokenizer)) == [1.0, 0.0]
    scorer = load_scorer(None, f"{file}:digits", actor, tokenizer, [], 4)
    assert scorer(word_samples(tokenizer)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "--reward_function mine: gave 1 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "--reward_function mine: gave 3 scores for 2 completions"),
        ([1.0, float("nan")], "--reward_function mine: gave nan for the completion 'No'"),
        ([float("inf"), 1.0], r"--reward_function mine: gave inf for the completion 'It is 4\.'"),
    ],
)
def test_scores_that_cannot_be_are_refused(scores, message, tokenizer):
    with pytest.raises(InputError, match=message):
        RewardFunction(lambda prompts, completions: scores, tokenizer, "mine")(word_samples(tokenizer))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rewards", r"expected module:function, or .*file\.py:function"),
        ("rewards:", r"expected module:function, or .*file\.py:function"),
        ("no_such_module_at_all:f", r"No module named 'no_such_module_at_all'.*folder/file\.py:f"),
        ("./rewards:f", r"file\.py:f"),
        ("{folder}/none.py:f", "no such file"),
        ("{folder}/there.py:g", "there.py has no function g"),
        ("{folder}/there.py:CONSTANT", "there.py has no function CONSTANT"),
        ("math:no_such_function", "math has no function no_such_function"),
    ],
)
def test_functions_that_are_not_there_are_named(spec, message, tokenizer, tmp_path):
    (tmp_path / "there.py").write_text("CONSTANT = 3\n\n\ndef f(prompts, completions):\n    return [0.0]\n")
    spec = spec.replace("{folder}", str(tmp_path))
    with pytest.raises(InputError, match=f"--reward_function .*{message}"):
        load_reward_function(spec, tokenizer)


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_the_policy_is_saved_as_a_plain_adapter(actor, rm_dir, tiny_model_dir, tokenizer, tmp_path):
    load_reward_model(str(rm_dir), actor, tokenizer, [], 3)
    perturb(actor, POLICY, VALUE)
    actor.save_policy(str(tmp_path))
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert names - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any(word in name for name in saved for word in (VALUE, REWARD, "score", "value_head"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path).eval()
    wanted = logprobs_by_hand(model, temperature=0.7)
    torch.testing.assert_close(actor.policy_logprobs(batch()), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - actor.reference_logprobs(batch())).abs().max() > 1e-2
    arguments = ModelArguments(model_name_or_path=tiny_model_dir)
    other = load_actor_critic(arguments, LoraArguments(lora_rank=4), tokenizer, 0.7).eval()
    before = outputs(other)
    other.load_policy(str(tmp_path))
    assert changed(before, outputs(other)) == {"policy"}
    assert torch.equal(other.policy_logprobs(batch()), actor.policy_logprobs(batch()))


def test_the_value_model_is_saved_and_loaded(actor, tiny_model_dir, tokenizer, tmp_path):
    perturb(actor, POLICY, VALUE, "value_head")
    actor.save_value_model(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["value_model.safetensors"]
    arguments = ModelArguments(model_name_or_path=tiny_model_dir)
    other = load_actor_critic(arguments, LoraArguments(lora_rank=4), tokenizer, 0.7).eval()
    before = outputs(other)
    other.load_value_model(str(tmp_path))
    assert changed(before, outputs(other)) == {"values"}
    assert torch.equal(outputs(other)["values"], outputs(actor)["values"])
    assert gradients(other).keys() == trainable(other)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_value_model_of_another_shape_is_refused(rank, actor, tiny_model_dir, tokenizer, tmp_path):
    arguments = ModelArguments(model_name_or_path=tiny_model_dir)
    other = load_actor_critic(arguments, LoraArguments(lora_rank=rank), tokenizer, 0.7)
    other.save_value_model(str(tmp_path))
    with pytest.raises(InputError, match=r"value_model\.safetensors"):
        actor.load_value_model(str(tmp_path))


def test_a_value_model_that_is_missing_or_another_is_refused(actor, tmp_path):
    with pytest.raises(InputError, match=r"value_model\.safetensors is missing"):
        actor.load_value_model(str(tmp_path))
    save_file({"value_head.weight": torch.zeros(1, 64)}, tmp_path / "value_model.safetensors")
    with pytest.raises(InputError, match="is of another value model"):
        actor.load_value_model(str(tmp_path))


# --- 4-bit weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_bit_dir(tiny_model_dir, tokenizer, tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("4-bit") / "model"
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=quantization).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def logprobs_by_hand_of(actor: ActorCritic, *adapters: str) -> torch.Tensor:
    with actor.adapters.use(*adapters):
        return logprobs_by_hand(actor.base, temperature=actor.temperature)


def test_training_on_a_4_bit_base_is_not_changed_by_rollouts(four_bit_dir, tokenizer):
    """Where the CPU has AVX512-BF16, a forward pass in eval mode would repack the weights and spoil all gradients."""
    actor = load_actor_critic(ModelArguments(model_name_or_path=four_bit_dir), lora(), tokenizer, 0.7)
    assert actor.base.is_loaded_in_4bit
    perturb(actor, POLICY, VALUE, "value_head", scale=0.05)
    wanted = gradients(actor)
    assert wanted.keys() == trainable(actor)
    completions = sample_completions(actor, PROMPTS, sampling(4, stop_ids=[600]), 3, torch.device("cpu"))
    assert list(map(len, completions)) == [4, 4, 4]
    with torch.no_grad():
        logprobs = actor.policy_logprobs(batch())
        reference = actor.reference_logprobs(batch())
        torch.testing.assert_close(logprobs, logprobs_by_hand_of(actor, POLICY), atol=1e-4, rtol=0)
        torch.testing.assert_close(reference, logprobs_by_hand_of(actor), atol=1e-4, rtol=0)
    assert_same(gradients(actor), wanted, atol=0, rtol=0)


def test_a_reward_adapter_joins_a_4_bit_base(four_bit_dir, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(four_bit_dir, num_labels=1)
    keep_weights_unpacked(model)
    model.config.pad_token_id = tokenizer.pad_token_id
    alone = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4)).eval()
    for parameter in alone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    alone.save_pretrained(tmp_path)
    actor = load_actor_critic(ModelArguments(model_name_or_path=four_bit_dir), lora(), tokenizer, 1.0).eval()
    scorer = load_reward_model(str(tmp_path), perturb(actor, POLICY), tokenizer, [], batch_size=3)
    assert scorer.weights_gib == 0
    samples = [Sample("", *ids, False) for ids in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        wanted = [alone(torch.tensor([s.prompt_ids + s.completion_ids])).logits.item() for s in samples]
    assert max(wanted) - min(wanted) > 1e-2
    assert scorer(samples) == pytest.approx(wanted, abs=1e-4)


# --- memory ----------------------------------------------------------------------------------------------------------


def distinct_gib(*modules: torch.nn.Module) -> float:
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values()) / 2**30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_roles_take_little_more_than_one_base(dtype, tokenizer, tmp_path, log):
    base, folder = tmp_path / "base", tmp_path / "rm"
    AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=8000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8
        ),
        dtype=getattr(torch, dtype),
    ).save_pretrained(base)  # fmt: skip
    tokenizer.save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=8)).save_pretrained(folder)
    actor = load_actor_critic(ModelArguments(model_name_or_path=str(base)), lora(lora_rank=8), tokenizer, 1.0)
    scorer = load_reward_model(str(folder), actor, tokenizer, [], 4)
    sizes = actor.weights_gib()
    # embedding and head; per layer four attention matrices, three of the MLP, two norms; the last norm
    elements = 2 * 8000 * 512 + 4 * (4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512) + 512
    assert sizes["base"] == pytest.approx(elements * (4 if dtype == "float32" else 2) / 2**30)
    # an adapter of rank 8, in float32: (inputs + outputs) of each matrix
    adapter = 4 * 8 * (4 * (512 + 512) + 3 * (512 + 1376)) * 4 / 2**30
    head = (512 + 1) * 4 / 2**30
    assert sizes["policy"] == sizes["reward_model"] == pytest.approx(adapter)
    assert sizes["value_model"] == pytest.approx(adapter + head)
    assert sizes["reference"] == scorer.weights_gib == 0
    assert sum(sizes.values()) == pytest.approx(distinct_gib(actor))
    assert distinct_gib(actor, scorer.model) <= 1.25 * sizes["base"]
    log_memory(actor, scorer)
    assert f"in all {sum(sizes.values()):.3f}, where four models would take {4 * sizes['base']:.3f}" in " ".join(log)


def test_three_models_are_counted_as_three(whole):
    sizes = whole.weights_gib()
    one = distinct_gib(whole.base)
    assert sizes["base"] + sizes["policy"] == sizes["reference"] == pytest.approx(one)
    assert sizes["value_model"] == pytest.approx(one + (64 + 1) * 4 / 2**30)
    assert sum(sizes.values()) == pytest.approx(distinct_gib(whole))


# --- how long a prompt may be ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def position_models(tmp_path_factory) -> dict[int | None, str]:
    """Configurations with so many positions; bloom's alibi has no limit."""
    folder = tmp_path_factory.mktemp("positions")
    for positions in (512, 4096):
        LlamaConfig(max_position_embeddings=positions).save_pretrained(folder / str(positions))
    build("bloom").config.save_pretrained(folder / "None")
    return {positions: str(folder / str(positions)) for positions in (512, 4096, None)}


@pytest.mark.parametrize(
    ("positions", "requested", "max_new_tokens", "wanted"),
    [
        (4096, None, 256, 1024),  # the default
        (512, None, 100, 412),  # what an answer leaves
        (512, None, 511, 1),
        (512, 412, 100, 412),
        (512, 7, 100, 7),
        (4096, 3840, 256, 3840),  # more than the default, where there is room
        (None, None, 10_000, 1024),
        (None, 5000, 10_000, 5000),
    ],
)
def test_a_prompt_has_what_an_answer_leaves_of_the_positions(
    positions, requested, max_new_tokens, wanted, position_models
):
    arguments = ModelArguments(model_name_or_path=position_models[positions])
    assert prompt_limit(arguments, requested, max_new_tokens) == wanted


@pytest.mark.parametrize(("requested", "max_new_tokens"), [(413, 100), (None, 512), (None, 600), (1, 512)])
def test_prompt_and_answer_beyond_the_positions_are_refused(requested, max_new_tokens, position_models):
    arguments = ModelArguments(model_name_or_path=position_models[512])
    with pytest.raises(InputError, match=f"--max_new_tokens {max_new_tokens}: with --max_prompt_length .*512 pos"):
        prompt_limit(arguments, requested, max_new_tokens)
