"""Averages over tokens, samples and tasks as weights of single tokens, and task weights that follow validation losses.

l_jk is the cross-entropy of trained token k of sample j, N_j their number in the sample, t(j) its task, w_t the weight
of a task, and T the tasks that have trained tokens. The loss is a weighted sum over tokens, sum_jk weight_jk l_jk:

    token       (case1)  sum_jk l_jk / sum_j N_j
    sample      (case2)  mean_j ( sum_k l_jk / N_j )
    task_token  (case3)  sum_{t in T} w_t [ sum_{j in t, k} l_jk / sum_{j in t} N_j ]  / sum_{t in T} w_t
    task_sample (case4)  sum_{t in T} w_t [ mean_{j in t} ( sum_k l_jk / N_j ) ]       / sum_{t in T} w_t

Samples without trained tokens, and tasks without such samples, are as if they were not there.

A weight depends on the rest of its batch through counts alone. So the parts of a batch (micro-batches, processes)
share the counts of the whole, and their weighted sums add up to the loss of the whole, however it was cut.

Sources: MFTCoder and its self-paced weights, arXiv 2311.02303; CoBa, arXiv 2410.06741; MFTCoder's code where they are
silent.
"""

import math
from collections.abc import Sequence
from typing import Any

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


class SelfPacedWeights:
    """Task weights from the slopes of the last validation losses: little for a task whose loss rises (MFTCoder).

    With a_t the least-squares slope of task t's last H losses and K tasks:

        b = K a / sum|a|        s = -softmax(b) * b        w = softmax(scale * s)

    The weights are 1/K each until H losses are there, and where all slopes are 0. They are a function of the losses
    alone, computed in Python's floats: equal on all processes that give equal losses.

    Args:
        num_tasks: K.
        history_length: H, at least 2.
        scale: how sharply the weights differ.

    Attributes:
        weights: the w_t, which sum to 1.
    """

    def __init__(self, num_tasks: int, history_length: int = 100, scale: float = 50.0):
        if history_length < 2:
            raise ValueError(f"history_length is {history_length}: a slope needs at least 2 validations")
        self.num_tasks = num_tasks
        self.history_length = history_length
        self.scale = scale
        self.weights = [1 / num_tasks] * num_tasks
        self._losses: list[list[float]] = []  # the last H validations, num_tasks each

    def update(self, losses: Sequence[float]) -> list[float]:
        """Take in a validation's mean loss per token of each task; return the weights from now on.

        Raises:
            ValueError: not one finite loss for each task.
        """
        self._losses = [*self._losses, _checked(losses, self.num_tasks)][-self.history_length :]
        if len(self._losses) == self.history_length:
            slopes = [_slope(history) for history in zip(*self._losses, strict=True)]
            relative = _normalized(slopes, self.num_tasks)
            scores = [-share * b for share, b in zip(_softmax(relative), relative, strict=True)]
            self.weights = _softmax([self.scale * score for score in scores])
        return list(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """All that later weights depend on but the arguments; json keeps it exactly."""
        return {"weights": list(self.weights), "losses": [list(losses) for losses in self._losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is of another number of tasks."""
        _check_state(state, self.num_tasks)
        self.weights = list(state["weights"])
        self._losses = [list(losses) for losses in state["losses"]]


class CoBaWeights:
    """Task weights that even out how fast the tasks converge, and turn away from those that diverge (CoBa).

    Validation 0 is the reference point, r_i(s) = L_i(s) / L_i(0). After t validations, number 0 among them, with K
    tasks, W = warmup and H = history_length:

        a_i(t), A(t)    least-squares slopes of r_i and of max_i r_i over the last min(t-1, H) validations after 0
        RCS = softmax_i(K a_i(t) / sum_i |a_i(t)|)                                  relative convergence score
        ACS = softmax_i(-n a_i(t) / sum over the last n of |a_i|)                   absolute convergence score
        DF  = min(1, m * the last of softmax_s(-tau m A(s) / sum_s |A(s)|))         divergence factor
        w   = softmax_i(K (DF RCS_i + (1 - DF) ACS_i))

    where n = min(t-W+1, H-W+1), and m = t-W+1 is the number of all A so far. Where the slopes that a score divides by
    are all 0, it takes their quotients as 0. If one of the weights is below f = 1/(10 K), all become (1 - K f) w + f.

    The weights are 1/K each before t = W. They are a function of the losses alone, computed in Python's floats: equal
    on all processes that give equal losses.

    Args:
        num_tasks: K.
        warmup: W, at least 3: two points for the first slope.
        history_length: H, at least W.
        tau: how sharply DF tells a diverging step from a converging one.

    Attributes:
        weights: the w_i, which sum to 1.
    """

    def __init__(self, num_tasks: int, warmup: int = 100, history_length: int = 200, tau: float = 5.0):
        if warmup < 3:
            raise ValueError(f"warmup is {warmup}: a slope needs 2 validations after the first, so at least 3")
        if history_length < warmup:
            raise ValueError(f"history_length is {history_length}: must not be less than warmup, {warmup}")
        self.num_tasks = num_tasks
        self.warmup = warmup
        self.history_length = history_length
        self.tau = tau
        self.weights = [1 / num_tasks] * num_tasks
        self._first: list[float] = []  # L_i(0)
        self._ratios: list[list[float]] = []  # r of the last H validations, num_tasks each
        self._slopes: list[list[float]] = []  # a of the last H-W+1 validations, num_tasks each
        self._worst_slopes: list[float] = []  # all A

    def update(self, losses: Sequence[float]) -> list[float]:
        """Take in a validation's mean loss per token of each task; return the weights from now on.

        Raises:
            ValueError: not one finite loss for each task, or one in the first validation that is not above 0.
        """
        losses = _checked(losses, self.num_tasks)
        if not self._first:
            if min(losses) <= 0:
                raise ValueError(f"validation losses {losses}: later ones are divided by them, so all must be above 0")
            self._first = losses
            return list(self.weights)
        ratios = [loss / first for loss, first in zip(losses, self._first, strict=True)]
        self._ratios = [*self._ratios, ratios][-self.history_length :]
        if len(self._ratios) >= self.warmup - 1:
            slopes = [_slope(history) for history in zip(*self._ratios, strict=True)]
            self._slopes = [*self._slopes, slopes][-(self.history_length - self.warmup + 1) :]
            self._worst_slopes.append(_slope([max(ratios) for ratios in self._ratios]))
            self.weights = self._balance()
        return list(self.weights)

    def _balance(self) -> list[float]:
        tasks, steps = self.num_tasks, len(self._worst_slopes)
        rcs = _softmax(_normalized(self._slopes[-1], tasks))
        acs = _softmax([-_normalized(slopes, len(slopes))[-1] for slopes in zip(*self._slopes, strict=True)])
        worst = _softmax([-self.tau * slope for slope in _normalized(self._worst_slopes, steps)])
        df = min(1.0, steps * worst[-1])
        weights = _softmax([tasks * (df * r + (1 - df) * a) for r, a in zip(rcs, acs, strict=True)])
        floor = 1 / (10 * tasks)
        return [(1 - tasks * floor) * w + floor for w in weights] if min(weights) < floor else weights

    def state_dict(self) -> dict[str, Any]:
        """All that later weights depend on but the arguments; json keeps it exactly."""
        return {
            "weights": list(self.weights),
            "first": list(self._first),
            "ratios": [list(ratios) for ratios in self._ratios],
            "slopes": [list(slopes) for slopes in self._slopes],
            "worst_slopes": list(self._worst_slopes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is of another number of tasks."""
        _check_state(state, self.num_tasks)
        self.weights = list(state["weights"])
        self._first = list(state["first"])
        self._ratios = [list(ratios) for ratios in state["ratios"]]
        self._slopes = [list(slopes) for slopes in state["slopes"]]
        self._worst_slopes = list(state["worst_slopes"])


def _checked(losses: Sequence[float], num_tasks: int) -> list[float]:
    numbers = [float(loss) for loss in losses]
    if len(numbers) != num_tasks or not all(map(math.isfinite, numbers)):
        raise ValueError(f"validation losses {numbers}: must be {num_tasks} finite numbers, one for each task")
    return numbers


def _check_state(state: dict[str, Any], num_tasks: int) -> None:
    if len(state["weights"]) != num_tasks:
        raise ValueError(f"the state is of {len(state['weights'])} tasks, and there are {num_tasks}")


def _slope(values: Sequence[float]) -> float:
    """Slope of the least-squares line through (0, values[0]), (1, values[1]), ...; at least two of them.

    fsum, because the slope of equal values must be 0, not what rounding leaves: slopes are divided by their own size.
    """
    middle = (len(values) - 1) / 2
    steps = [i - middle for i in range(len(values))]
    products = [step * value for step, value in zip(steps, values, strict=True)]
    return math.fsum(products) / math.fsum(step * step for step in steps)


def _normalized(slopes: Sequence[float], total: float) -> list[float]:
    """Scaled so that the absolute values sum to `total`; zeros stay zeros."""
    size = math.fsum(map(abs, slopes))
    return [total * slope / size if size else 0.0 for slope in slopes]


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    exponentials = [math.exp(value - highest) for value in values]
    total = math.fsum(exponentials)
    return [exponential / total for exponential in exponentials]
