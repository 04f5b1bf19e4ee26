"""Averages over tokens, samples and tasks as weights of single tokens.

l_jk is the cross-entropy of trained token k of sample j, N_j their number in the sample, t(j) its task, w_t the weight
of a task, and T the tasks that have trained tokens. The loss is a weighted sum over tokens, sum_jk weight_jk l_jk:

    token       (case1)  sum_jk l_jk / sum_j N_j
    sample      (case2)  mean_j ( sum_k l_jk / N_j )
    task_token  (case3)  sum_{t in T} w_t [ sum_{j in t, k} l_jk / sum_{j in t} N_j ]  / sum_{t in T} w_t
    task_sample (case4)  sum_{t in T} w_t [ mean_{j in t} ( sum_k l_jk / N_j ) ]       / sum_{t in T} w_t

Samples without trained tokens, and tasks without such samples, are as if they were not there.

A weight depends on the rest of its batch through counts alone. So the parts of a batch (micro-batches, processes)
share the counts of the whole, and their weighted sums add up to the loss of the whole, however it was cut.

Source: MFTCoder, arXiv 2311.02303.
"""

import torch
from torch import Tensor

from stagewise.losses.logprobs import IGNORE_INDEX

# Every name of --weighted_loss_mode, and what it averages. selfpaced and coba set the w_t of task_token.
AVERAGES = {
    "case1": "token",
    "case2": "sample",
    "case3": "task_token",
    "case4": "task_sample",
    "token": "token",
    "sample": "sample",
    "task_token": "task_token",
    "task_sample": "task_sample",
    "selfpaced": "task_token",
    "coba": "task_token",
}


def task_counts(labels: Tensor, sample_ids: Tensor, task_ids: Tensor, num_tasks: int) -> Tensor:
    """Trained tokens of each task, and its samples that have any: (2, num_tasks), int64.

    The counts of micro-batches and processes add up to those of an optimizer step. Those of a micro-batch alone make
    its loss independent of the rest of the step, as it is in MFTCoder.

    Args:
        labels: (B, T), IGNORE_INDEX where a token is not trained. The first of a row never is: nothing predicts it.
        sample_ids: (B, T), int, which sample of its row a token belongs to, 0 <= id < T. A packed row has several
            samples, its documents; one that goes on in the next row is another sample there.
        task_ids: (B, T), int, or (B, 1) where all of a row is of one task; 0 <= id < num_tasks. All tokens of a sample
            are of one task. Both ids are of no consequence where a token is not trained, as long as they are in range.
    """
    trained, lengths = _trained_and_lengths(labels, sample_ids)
    tasks = task_ids.long().expand_as(labels)
    # the maximum over a sample's trained tokens is the task they share; padding may bear the same sample id
    task_of_sample = torch.zeros_like(lengths).scatter_reduce_(1, sample_ids.long(), tasks * trained, "amax")
    counts = [torch.bincount(ids, minlength=num_tasks) for ids in (tasks[trained], task_of_sample[lengths > 0])]
    return torch.stack(counts)


def token_weights(
    labels: Tensor,
    sample_ids: Tensor,
    task_ids: Tensor,
    counts: Tensor,
    mode: str,
    task_weights: Tensor | None = None,
) -> Tensor:
    """The weight of each token's cross-entropy: (B, T), float32, aligned with `labels`, 0 where nothing is trained.

        token       1 / sum_t tokens_t
        sample      1 / (N_j sum_t samples_t)
        task_token  w_t / (tokens_t W)             W = sum_{t in T} w_t
        task_sample w_t / (N_j samples_t W)

    Where gradients are averaged over processes, as DistributedDataParallel does, and the counts are those of all of
    them, the weighted sum must be multiplied by their number.

    Args:
        labels, sample_ids, task_ids: as for task_counts.
        counts: (2, num_tasks), the sum of task_counts over all that the loss is an average of.
        mode: a key of AVERAGES.
        task_weights: (num_tasks,), w_t >= 0; 1 each if None. Only their ratios matter. Where all tasks present weigh
            0, so does every token.

    Raises:
        ValueError: the mode is unknown, or averages over no tasks and yet got weights for them.
    """
    if mode not in AVERAGES:
        raise ValueError(f"mode {mode!r}: must be one of {', '.join(AVERAGES)}")
    average = AVERAGES[mode]
    if task_weights is not None and not average.startswith("task_"):
        raise ValueError(f"mode {mode!r} averages over no tasks; leave task_weights out")
    trained, lengths = _trained_and_lengths(labels, sample_ids)
    by_sample = average.endswith("sample")
    count = counts[1 if by_sample else 0].to(labels.device)
    # where a count is 0 no token asks for its weight; 1 instead keeps NaN out of the tensors
    if average.startswith("task_"):
        shares = torch.ones(len(count)) if task_weights is None else task_weights
        shares = shares.to(count.device, torch.float32) * (count > 0)
        total = shares.sum()
        per_task = shares / (count.clamp(min=1) * torch.where(total > 0, total, 1.0))
    else:
        per_task = (1 / count.sum().clamp(min=1)).expand(len(count))
    weights = per_task[task_ids.long().expand_as(labels)]
    if by_sample:
        weights = weights / lengths.gather(1, sample_ids.long()).clamp(min=1)
    return weights * trained


def _trained_and_lengths(labels: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are trained, (B, T) bool, and N_j at [row, sample id], (B, T) int64."""
    trained = labels != IGNORE_INDEX
    trained[:, 0] = False
    ids = sample_ids.long()
    return trained, torch.zeros_like(ids).scatter_add_(1, ids, trained.long())
