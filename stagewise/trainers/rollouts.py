"""Rollouts of PPO: prompts in, completions out, with what policy, reference, value model and scorer say of them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from stagewise.modeling.actor_critic import ActorCritic, CompletionBatch, completion_batch
from stagewise.modeling.reward import Sample, Scorer


@dataclass
class Rollouts:
    """N completions, one for each row; tensors on the CPU.

    index: (N,), the row's place in the iteration, on whatever process it was made.
    prompt_ids: (N, P) and completion_ids: (N, T), padded on the right; prompt_length: (N,).
    mask: (N, T) bool, True at the tokens of the completion, the stop token among them.
    finished: (N,) bool, the completion ends with a stop token.
    scores: (N,), as the scorer gave them.
    logprobs, ref_logprobs, values: (N, T), fp32, 0 outside the mask; values are 0 where none were asked for.
    """

    index: Tensor
    prompt_ids: Tensor
    prompt_length: Tensor
    completion_ids: Tensor
    mask: Tensor
    finished: Tensor
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def completion(self, row: int) -> list[int]:
        return self.completion_ids[row][self.mask[row]].tolist()

    def prompt(self, row: int) -> list[int]:
        return self.prompt_ids[row, : self.prompt_length[row]].tolist()

    def batch(self, rows: Sequence[int], pad_token_id: int) -> CompletionBatch:
        """Some rows for a model, with no more padding than they need; the mask has all T columns."""
        batch = completion_batch(
            [self.prompt(row) for row in rows], [self.completion(row) for row in rows], pad_token_id
        )
        batch.mask = self.mask[list(rows)]
        return batch


@dataclass(frozen=True)
class RolloutTimes:
    """Seconds of one process: for generating, and for the rest (scores, log-probabilities, values)."""

    generate_s: float
    evaluate_s: float


def sample_completions(
    actor: ActorCritic,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    batch_size: int,
    device: torch.device,
) -> list[list[int]]:
    """A completion for each prompt, up to and with its stop token. Prompts of like length are generated together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # the largest batch first
    stop_ids = set(config.eos_token_id)
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), config.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(rows):
            ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[line, width - len(prompts[i]) :] = 1
        output = actor.generate(ids.to(device), mask.to(device), config).tolist()
        for i, tokens in zip(rows, output, strict=True):
            end = next((at + 1 for at, token in enumerate(tokens) if token in stop_ids), len(tokens))
            completions[i] = tokens[:end]
    return completions


def collect(
    actor: ActorCritic,
    scorer: Scorer,
    rows: Sequence[dict],
    index: Sequence[int],
    config: GenerationConfig,
    batch_size: int,
    device: torch.device,
    with_values: bool = True,
) -> tuple[Rollouts, RolloutTimes]:
    """Sample one completion for each row (a dict with input_ids and text) and evaluate it, without dropout."""
    was_training = actor.training
    actor.eval()
    try:
        started = time.perf_counter()
        prompts = [row["input_ids"] for row in rows]
        completions = sample_completions(actor, prompts, config, batch_size, device)
        generated = time.perf_counter()
        finished = [completion[-1] in config.eos_token_id for completion in completions]
        samples = [
            Sample(row["text"], row["input_ids"], completion, done)
            for row, completion, done in zip(rows, completions, finished, strict=True)
        ]
        scores = scorer(samples)
        logprobs, ref_logprobs, values = _evaluate(
            actor, prompts, completions, batch_size, config.pad_token_id, device, with_values
        )
        times = RolloutTimes(generated - started, time.perf_counter() - generated)
    finally:
        actor.train(was_training)
    lengths = torch.tensor([len(completion) for completion in completions])
    rollouts = Rollouts(
        index=torch.tensor(index),
        prompt_ids=_pad(prompts, config.pad_token_id),
        prompt_length=torch.tensor([len(prompt) for prompt in prompts]),
        completion_ids=_pad(completions, config.pad_token_id),
        mask=torch.arange(int(lengths.max()))[None] < lengths[:, None],
        finished=torch.tensor(finished),
        scores=torch.tensor(scores, dtype=torch.float32),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
    )
    return rollouts, times


def _pad(rows: Sequence[list[int]], pad_token_id: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_token_id)


@torch.no_grad()
def _evaluate(actor, prompts, completions, batch_size, pad_token_id, device, with_values) -> list[Tensor]:
    """logprobs, ref_logprobs and values, (N, T) each, by the forward pass that training uses.

    A quarter of the rows at once that are generated at once: whole rows take more memory than a decoding step, and few
    rows of like length take little padding.
    """
    batch_size = math.ceil(batch_size / 4)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]), reverse=True)
    width = max(map(len, completions))
    results = [torch.zeros(len(prompts), width) for _ in range(3)]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = completion_batch([prompts[i] for i in rows], [completions[i] for i in rows], pad_token_id).to(device)
        if with_values:
            logprobs, values, _ = actor(**vars(batch))
            found = [logprobs, actor.reference_logprobs(batch), values]
        else:
            found = [actor.policy_logprobs(batch), actor.reference_logprobs(batch)]
        for result, part in zip(results, found, strict=False):
            result[torch.tensor(rows), : part.shape[1]] = part.float().cpu()
    return results


def gather(rollouts: Rollouts, accelerator, count: int) -> Rollouts:
    """The rollouts of all processes, on all of them: `count` rows in the order of their index, each once."""
    if accelerator.num_processes == 1:
        return rollouts
    columns = {}
    for field in fields(Rollouts):
        tensor = getattr(rollouts, field.name)
        # as numbers: accelerate makes those of bool tensors, but only where it pads
        numbers = (tensor.long() if tensor.dtype == torch.bool else tensor).to(accelerator.device).contiguous()
        padded = accelerator.pad_across_processes(numbers, dim=1) if numbers.dim() > 1 else numbers
        columns[field.name] = accelerator.gather(padded).cpu().to(tensor.dtype)
    # a process without a row of its own repeats one: of equal indices the first is taken
    order = torch.unique(columns["index"], return_inverse=True)[1]
    first = torch.stack([(order == place).nonzero()[0, 0] for place in range(count)])
    return Rollouts(**{name: column[first] for name, column in columns.items()})
