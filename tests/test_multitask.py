"""Averages over tokens, samples and tasks: by hand, and the same however a batch is cut; task weights of a schedule.

The tensors that a trainer would have are laid out from samples: (task, losses) where a loss of None is of a token that
is not trained. The first token of each sample is an untrained one too, as it is in the collators' batches.
"""

import json
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from stagewise.losses.logprobs import IGNORE_INDEX, linear_cross_entropy
from stagewise.losses.multitask import AVERAGES, CoBaWeights, SelfPacedWeights, task_counts, token_weights

A, B, C = 0, 1, 2
MODES = ("token", "sample", "task_token", "task_sample")
Sample = tuple[int, Sequence[float | None]]  # task, losses

EXAMPLE: list[Sample] = [(A, [1.0, 2.0]), (B, [3.0, 3.0, 3.0, 3.0]), (A, [0.5])]


class Batch(NamedTuple):
    """All (B, T); losses are 1000 where no token is trained, so that a weight there is seen."""

    labels: Tensor
    sample_ids: Tensor
    task_ids: Tensor
    losses: Tensor

    def counts(self, num_tasks: int = 3) -> Tensor:
        return task_counts(*self[:3], num_tasks)

    def loss(self, counts: Tensor, mode: str, task_weights: Sequence[float] | None = None) -> float:
        shares = None if task_weights is None else torch.tensor(task_weights)
        weights = token_weights(*self[:3], counts, mode, shares)
        assert weights.dtype == torch.float32
        assert (weights[self.labels == IGNORE_INDEX] == 0).all()
        assert (weights[:, 0] == 0).all()
        return (weights.double() * self.losses).sum().item()


def batch_of(rows: list[list[Sample]]) -> Batch:
    width = 1 + max((sum(1 + len(losses) for _, losses in row) for row in rows), default=0)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    # padding bears the ids of the first sample and of task B
    sample_ids, task_ids = (torch.full((len(rows), width), id, dtype=torch.int32) for id in (0, B))
    losses = torch.full((len(rows), width), 1000.0, dtype=torch.float64)
    for r, row in enumerate(rows):
        start = 0
        for number, (task, sample) in enumerate(row):
            end = start + 1 + len(sample)
            sample_ids[r, start:end] = number
            task_ids[r, start:end] = task
            for k, loss in enumerate(sample, start + 1):
                if loss is not None:
                    labels[r, k], losses[r, k] = 7, loss
            start = end
    return Batch(labels, sample_ids, task_ids, losses)


def direct(samples: Iterable[Sample], mode: str, task_weights: Sequence[float] = (1.0, 1.0, 1.0)) -> float:
    """The four formulas as they are written, on what is left without untrained tokens."""
    without_none = [(task, [loss for loss in losses if loss is not None]) for task, losses in samples]
    trained = [(task, losses) for task, losses in without_none if losses]

    def mean(numbers: list[float]) -> float:
        return sum(numbers) / len(numbers) if numbers else 0.0

    def inner(group: list[tuple[int, list[float]]]) -> float:
        if mode.endswith("token"):
            return mean([loss for _, losses in group for loss in losses])
        return mean([mean(losses) for _, losses in group])

    if not mode.startswith("task_"):
        return inner(trained)
    tasks = sorted({task for task, _ in trained})
    total = sum(task_weights[task] for task in tasks)
    means = {task: inner([sample for sample in trained if sample[0] == task]) for task in tasks}
    return sum(task_weights[task] * means[task] for task in tasks) / total if total else 0.0


def loss_of_parts(parts: list[Batch], mode: str, task_weights: Sequence[float] | None = None) -> float:
    counts = sum((part.counts() for part in parts), start=torch.zeros(2, 3, dtype=torch.long))
    return sum(part.loss(counts, mode, task_weights) for part in parts)


# The worked example: A [1, 2], B [3, 3, 3, 3], A [0.5]

WORKED = [
    ("case1", None, Fraction(31, 14)),  # (3 + 12 + 0.5) / 7
    ("case2", None, Fraction(5, 3)),  # (1.5 + 3 + 0.5) / 3
    ("case3", None, Fraction(25, 12)),  # (3.5 / 3 + 3) / 2
    ("case4", None, Fraction(2)),  # ((1.5 + 0.5) / 2 + 3) / 2
    ("case3", (3.0, 1.0, 1.0), Fraction(13, 8)),  # (3 * 3.5 / 3 + 3) / 4
    ("case4", (3.0, 1.0, 1.0), Fraction(3, 2)),  # (3 * 1 + 3) / 4
]
CUTS: dict[str, list[list[list[Sample]]]] = {
    "one batch": [[[EXAMPLE[0]], [EXAMPLE[1]], [EXAMPLE[2]]]],
    "one packed row": [[EXAMPLE]],
    "two processes": [[[EXAMPLE[0]], [EXAMPLE[1]]], [[EXAMPLE[2]]]],
    "three micro-batches": [[[EXAMPLE[1]]], [[EXAMPLE[2]]], [[EXAMPLE[0]]]],
    "two processes, two micro-batches each": [[[EXAMPLE[0]]], [[EXAMPLE[1]]], [[EXAMPLE[2]]], [[(C, [None])]]],
    "packed across tasks": [[[EXAMPLE[2], EXAMPLE[1]]], [[EXAMPLE[0]]]],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize(("mode", "task_weights", "expected"), WORKED)
def test_worked_example_however_it_is_cut(mode, task_weights, expected, cut):
    parts = [batch_of(rows) for rows in cut]
    for name in (mode, AVERAGES[mode]):
        assert loss_of_parts(parts, name, task_weights) == pytest.approx(float(expected), abs=1e-6)
    assert direct(EXAMPLE, AVERAGES[mode], task_weights or (1.0, 1.0, 1.0)) == pytest.approx(float(expected))


@pytest.mark.parametrize(("mode", "expected"), [("case1", 1.5), ("case2", 1.375), ("case3", 1.375)])
def test_worked_example_with_each_micro_batch_by_its_own_counts(mode, expected):
    parts = [batch_of(rows) for rows in CUTS["two processes"]]
    losses = [part.loss(part.counts(), mode) for part in parts]
    assert sum(losses) / len(losses) == pytest.approx(expected, abs=1e-6)


def test_counts_of_the_worked_example():
    batch = batch_of(CUTS["one packed row"][0])
    assert batch.counts().tolist() == [[3, 4, 0], [2, 1, 0]]
    assert batch.counts(num_tasks=2).tolist() == [[3, 4], [2, 1]]


def test_weights_of_the_worked_example():
    """Token by token: sample 2 of task A shares a row with B; its N is 1."""
    batch = batch_of([[EXAMPLE[0]], [EXAMPLE[1], EXAMPLE[2]]])
    ids = batch[:3]
    counts = batch.counts()
    none, a, b, last = 0.0, 1 / 6, 1 / 8, 1 / 6
    expected = [[none, a, a] + 5 * [none], [none, b, b, b, b, none, last, none]]
    assert_close(token_weights(*ids, counts, "task_token"), torch.tensor(expected))
    a, b, last = 1 / 8, 1 / 8, 1 / 4
    expected = [[none, a, a] + 5 * [none], [none, b, b, b, b, none, last, none]]
    assert_close(token_weights(*ids, counts, "task_sample"), torch.tensor(expected))


# What is not there


@pytest.mark.parametrize("mode", MODES)
def test_samples_without_trained_tokens_and_absent_tasks_are_skipped(mode):
    untrained: list[Sample] = [(B, [None, None]), (C, [None]), (A, [])]
    samples = [untrained[0], EXAMPLE[0], untrained[1], EXAMPLE[2], untrained[2]]
    expected = direct([EXAMPLE[0], EXAMPLE[2]], mode)
    for rows in ([samples], [[sample] for sample in samples]):
        batch = batch_of(rows)
        assert batch.counts().tolist() == [[3, 0, 0], [2, 0, 0]]
        assert batch.loss(batch.counts(), mode) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_part_without_trained_tokens_adds_nothing(mode):
    empty = batch_of([[(A, [None]), (B, [])]])
    assert empty.counts().tolist() == [[0, 0, 0], [0, 0, 0]]
    for counts in (empty.counts(), batch_of([EXAMPLE]).counts()):
        assert empty.loss(counts, mode) == 0.0


@pytest.mark.parametrize("mode", ["task_token", "task_sample"])
def test_a_task_that_weighs_nothing(mode):
    batch = batch_of([EXAMPLE])
    assert batch.loss(batch.counts(), mode, (0.0, 2.0, 5.0)) == pytest.approx(3.0)
    assert batch.loss(batch.counts(), mode, (0.0, 0.0, 5.0)) == 0.0


def test_the_first_label_of_a_row_is_not_trained():
    labels = torch.tensor([[5, 6], [5, IGNORE_INDEX]])
    ids = torch.zeros_like(labels)
    assert task_counts(labels, ids, ids, 1).tolist() == [[1], [1]]
    weights = token_weights(labels, ids, ids, torch.tensor([[1], [1]]), "sample")
    assert weights.tolist() == [[0, 1], [0, 0]]


def test_one_task_id_for_each_row():
    batch = batch_of([[EXAMPLE[0], EXAMPLE[2]], [EXAMPLE[1]]])
    rows = torch.tensor([[A], [B]])
    counts = task_counts(batch.labels, batch.sample_ids, rows, 3)
    assert_close(counts, batch.counts())
    for mode in MODES:
        assert_close(
            token_weights(batch.labels, batch.sample_ids, rows, counts, mode), token_weights(*batch[:3], counts, mode)
        )


def test_arguments_that_contradict_each_other_are_refused():
    batch = batch_of([EXAMPLE])
    with pytest.raises(ValueError, match=r"'case5'.*case1.*task_sample"):
        batch.loss(batch.counts(), "case5")
    with pytest.raises(ValueError, match="'case2' averages over no tasks"):
        batch.loss(batch.counts(), "case2", (1.0, 1.0, 1.0))


# Properties


@st.composite
def cut_batches(draw) -> tuple[list[Sample], list[Batch]]:
    """Samples of three tasks, some without trained tokens; packed into rows, the rows dealt to one or more parts."""
    loss = st.one_of(st.none(), st.floats(0, 20))
    samples = draw(st.lists(st.tuples(st.integers(0, 2), st.lists(loss, max_size=5)), min_size=1, max_size=8))
    rows: list[list[Sample]] = []
    for sample in samples:
        if rows and draw(st.booleans()):
            rows[-1].append(sample)
        else:
            rows.append([sample])
    parts: list[list[list[Sample]]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for row in rows:
        parts[draw(st.integers(0, len(parts) - 1))].append(row)
    return samples, [batch_of(part) for part in parts if part]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(cut_batches(), st.sampled_from(MODES), st.tuples(*[st.floats(0.1, 10)] * 3))
def test_any_cut_of_a_batch_has_the_loss_of_the_formula(cut, mode, task_weights):
    samples, parts = cut
    assert loss_of_parts(parts, mode) == pytest.approx(direct(samples, mode), rel=1e-5, abs=1e-6)
    if mode.startswith("task_"):
        expected = direct(samples, mode, task_weights)
        assert loss_of_parts(parts, mode, task_weights) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def formula(losses: dict[tuple[int, int], Tensor], mode: str, task_weights: tuple[float, float]) -> Tensor:
    """The four formulas on tensors: `losses[task, j]` holds the losses of one sample."""

    def inner(group: list[Tensor]) -> Tensor:
        if mode.endswith("token"):
            return torch.cat(group).mean()
        return torch.stack([sample.mean() for sample in group]).mean()

    if not mode.startswith("task_"):
        return inner(list(losses.values()))
    tasks = [inner([sample for (task, _), sample in losses.items() if task == t]) for t in (A, B)]
    return (task_weights[A] * tasks[A] + task_weights[B] * tasks[B]) / sum(task_weights)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_the_formula(mode):
    """Through the loss of the trainers, from packed rows: hidden states, labels one to the right."""
    shares = (3.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(11, 4, generator=generator)
    batch = batch_of([[(A, [0.0, 0.0]), (B, [0.0, None, 0.0, 0.0])], [(A, [0.0])], [(B, [None, 0.0, 0.0])]])
    noise = torch.randn(*batch.labels.shape, 4, generator=generator)
    labels = torch.randint(0, 11, batch.labels.shape, generator=generator)
    labels = labels.where(batch.labels != IGNORE_INDEX, IGNORE_INDEX)
    task_weights = torch.tensor(shares) if mode.startswith("task_") else None
    ids = batch.sample_ids, batch.task_ids
    weights = token_weights(labels, *ids, task_counts(labels, *ids, 2), mode, task_weights)

    hidden = noise.clone().requires_grad_()
    trained = labels[:, 1:] != IGNORE_INDEX
    loss, _ = linear_cross_entropy(hidden[:, :-1][trained], head, labels[:, 1:][trained], weights[:, 1:][trained])
    loss.backward()

    other = noise.clone().requires_grad_()
    nll = F.cross_entropy((other @ head.T)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    nll = F.pad(nll, (1, 0))
    samples = {
        (A, 0): nll[0, [1, 2]],
        (B, 0): nll[0, [4, 6, 7]],
        (A, 1): nll[1, [1]],
        (B, 1): nll[2, [2, 3]],
    }
    expected = formula(samples, mode, shares)
    expected.backward()
    assert_close(loss, expected)
    assert_close(hidden.grad, other.grad)
    assert (hidden.grad != 0).any()


# Task weights that follow validation losses


def slope_by_polyfit(values: Sequence[float]) -> float:
    return np.polyfit(np.arange(len(values)), np.asarray(values), 1)[0]


def softmax(values) -> np.ndarray:
    values = np.exp(np.asarray(values) - np.max(values))
    return values / values.sum()


def self_paced(losses: np.ndarray, scale: float = 50.0) -> np.ndarray:
    """(H, K) losses -> (K,) weights."""
    slopes = np.array([slope_by_polyfit(task) for task in losses.T])
    b = len(slopes) * slopes / np.abs(slopes).sum()
    return softmax(scale * -softmax(b) * b)


def coba(ratios: np.ndarray, warmup: int, history: int, tau: float) -> np.ndarray:
    """The weights after validations 0 .. len(ratios), where ratios[s - 1] is r(s): (t-1, K) -> (K,)."""
    tasks = ratios.shape[1]
    windows = [ratios[max(0, t - 1 - history) : t - 1] for t in range(warmup, len(ratios) + 2)]
    a = np.array([[slope_by_polyfit(task) for task in window.T] for window in windows])
    worst = np.array([slope_by_polyfit(window.max(1)) for window in windows])
    n = min(len(windows), history - warmup + 1)
    rcs = softmax(tasks * a[-1] / np.abs(a[-1]).sum())
    acs = softmax(-n * a[-1] / np.abs(a[-n:]).sum(0))
    df = min(1.0, len(worst) * softmax(-tau * len(worst) * worst / np.abs(worst).sum())[-1])
    weights = softmax(tasks * (df * rcs + (1 - df) * acs))
    floor = 1 / (10 * tasks)
    return weights if weights.min() >= floor else (1 - tasks * floor) * weights + floor


def test_self_paced_weights_of_worked_slopes():
    """Slopes -0.2 and -0.1."""
    weights = SelfPacedWeights(num_tasks=2, history_length=4)
    losses = [(1.5 - 0.2 * t, 1.5 - 0.1 * t) for t in range(4)]
    for early in losses[:3]:
        assert weights.update(early) == [0.5, 0.5]
    assert weights.update(losses[3]) == pytest.approx([0.643601, 0.356399], abs=1e-6)
    assert weights.update((0.7, 1.1)) == pytest.approx([0.643601, 0.356399], abs=1e-6)  # the lines go on
    # s = (.452325, .440504) at scale 50
    assert math.log(weights.weights[0] / weights.weights[1]) == pytest.approx(50 * (0.452325 - 0.440504), abs=1e-4)


def test_self_paced_weights_see_the_last_validations_alone():
    late = [(2.0, 1.0, 3.0), (1.8, 1.1, 2.5), (1.7, 0.7, 2.6)]
    weights, fresh = (SelfPacedWeights(num_tasks=3, history_length=3, scale=2.0) for _ in range(2))
    for losses in [(9.0, 1.0, 4.0), (1.0, 1.0, 4.0), *late]:
        weights.update(losses)
    for losses in late:
        fresh.update(losses)
    assert weights.weights == fresh.weights
    assert fresh.weights == pytest.approx(self_paced(np.array(late), scale=2.0))


RATIOS_A = [1, 0.9, 0.8, 0.7, 0.6, 0.5]
RATIOS_B = [1, 0.98, 0.96, 0.94, 0.98, 1.02]


def test_coba_weights_of_worked_ratios():
    """t counts the validations: number 0 is the reference point, and the ratios are those of numbers 1 to 6."""
    expected = dict.fromkeys((3, 4, 5), (0.237657, 0.762343))
    expected |= {1: (0.5, 0.5), 2: (0.5, 0.5), 6: (0.609155, 0.390845), 7: (0.742605, 0.257395)}
    weights = CoBaWeights(num_tasks=2, warmup=3, history_length=6, tau=5)
    first = (2.5, 0.4)
    for t, (a, b) in enumerate([(1, 1), *zip(RATIOS_A, RATIOS_B, strict=True)], 1):
        assert weights.update((a * first[0], b * first[1])) == pytest.approx(expected[t], abs=1e-6), t
        assert weights.weights == pytest.approx(expected[t], abs=1e-6)


def test_coba_by_hand_at_the_end_of_the_warm_up():
    """Slopes -0.1 and -0.02: 2 a / sum|a| = (-5/3, -1/3); the only A so far makes DF 1, so that w is of RCS alone."""
    rcs_a = 1 / (1 + math.exp(4 / 3))
    weight_a = 1 / (1 + math.exp(2 * (1 - 2 * rcs_a)))
    weights = CoBaWeights(num_tasks=2, warmup=3, history_length=3)
    for losses in [(1.0, 1.0), (0.95, 0.99), (0.85, 0.97)]:
        weights.update(losses)
    assert weights.weights == pytest.approx([weight_a, 1 - weight_a])


def test_coba_weights_have_a_floor():
    """One task of ten rises, the others are flat: RCS is about (1, 0, ...), so w would be about (1, e^-10, ...)."""
    weights = CoBaWeights(num_tasks=10, warmup=3, history_length=3)
    for step in range(3):
        weights.update([1.0 + step, *[1.0] * 9])
    rcs = 1 / (1 + 9 * math.exp(-10)), math.exp(-10) / (1 + 9 * math.exp(-10))
    others = 1 / (9 + math.exp(10 * (rcs[0] - rcs[1])))
    assert others < 0.01
    assert weights.weights[1:] == pytest.approx([0.9 * others + 0.01] * 9)
    assert min(weights.weights) > 0.01
    assert sum(weights.weights) == pytest.approx(1)


@st.composite
def histories(draw) -> tuple[np.ndarray, int, int, float]:
    """(validations, tasks) losses that wander, and CoBa's warmup, history_length and tau."""
    warmup = draw(st.integers(3, 5))
    history = draw(st.integers(warmup, 8))
    length = draw(st.integers(warmup, 20))
    tasks = draw(st.integers(2, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    steps = generator.normal(-0.02, 0.1, size=(length, tasks))
    return 2 * np.exp(np.cumsum(steps, axis=0)), warmup, history, draw(st.sampled_from([0.5, 5.0]))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(histories())
def test_coba_weights_are_those_of_the_formulas(history):
    losses, warmup, history_length, tau = history
    weights = CoBaWeights(losses.shape[1], warmup, history_length, tau)
    for t, row in enumerate(losses, 1):
        weights.update(row)
        if t < warmup:
            assert weights.weights == [1 / losses.shape[1]] * losses.shape[1]
    expected = coba(losses[1:] / losses[0], warmup, history_length, tau)
    assert weights.weights == pytest.approx(expected, abs=1e-9)
    assert sum(weights.weights) == pytest.approx(1)
    assert min(weights.weights) >= 1 / (10 * losses.shape[1])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(histories())
def test_self_paced_weights_are_those_of_the_formula(history):
    losses, _, history_length, _ = history
    weights = SelfPacedWeights(losses.shape[1], history_length)
    for row in losses:
        weights.update(row)
    if len(losses) < history_length:
        assert weights.weights == [1 / losses.shape[1]] * losses.shape[1]
    else:
        assert weights.weights == pytest.approx(self_paced(losses[-history_length:]), abs=1e-9)


SCHEDULES = {
    "selfpaced": lambda tasks=3: SelfPacedWeights(tasks, history_length=7),
    "coba": lambda tasks=3: CoBaWeights(tasks, warmup=3, history_length=7),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def test_flat_losses_leave_the_weights_equal(schedule):
    """1.1 and 0.7 are no floats: the slopes must be 0 all the same, not what rounding leaves of them."""
    weights = schedule()
    for _ in range(12):
        assert weights.update((1.1, 0.7, 0.3)) == pytest.approx([1 / 3] * 3, abs=1e-15)


def test_losses_that_become_flat(schedule):
    """Slopes of 0 beside others in the histories: no NaN, and equal weights once all of a window is flat."""
    weights = schedule()
    for step in range(4):
        assert sum(weights.update((1.1 - 0.1 * step, 0.7 + 0.1 * step, 0.3))) == pytest.approx(1)
    for _ in range(12):
        assert sum(weights.update((1.1, 0.7, 0.3))) == pytest.approx(1)
    assert weights.weights == pytest.approx([1 / 3] * 3, abs=1e-15)


def test_a_resumed_run_has_the_same_weights(schedule):
    """Resumed at each validation, through json, as the trainer's state is written."""
    generator = np.random.default_rng(1)
    losses = (2 + 0.3 * generator.normal(size=(15, 3))).tolist()
    whole = schedule()
    expected = [whole.update(row) for row in losses]
    assert expected[-1] != expected[-2]
    for stop in range(len(losses) + 1):
        before, after = schedule(), schedule()
        for row in losses[:stop]:
            before.update(row)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert after.weights == before.weights
        assert [after.update(row) for row in losses[stop:]] == expected[stop:]
        assert after.state_dict() == whole.state_dict()


def test_a_state_is_a_copy(schedule):
    weights = schedule()
    for step in range(8):
        weights.update((1.0, 2.0 + step, 3.0))
    state = weights.state_dict()
    saved = json.dumps(state)
    other = schedule()
    other.load_state_dict(state)
    for changed in (weights, other):
        changed.update((5.0, 1.0, 2.0))
    assert json.dumps(state) == saved


def test_wrong_losses_states_and_settings_are_refused(schedule):
    weights = schedule()
    for losses in ([1.0, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]):
        with pytest.raises(ValueError, match="must be 3 finite numbers"):
            weights.update(losses)
    with pytest.raises(ValueError, match="of 2 tasks, and there are 3"):
        weights.load_state_dict(schedule(2).state_dict())
    with pytest.raises(ValueError, match="at least 2"):
        SelfPacedWeights(2, history_length=1)
    with pytest.raises(ValueError, match="at least 3"):
        CoBaWeights(2, warmup=2)
    with pytest.raises(ValueError, match="must not be less than warmup, 5"):
        CoBaWeights(2, warmup=5, history_length=4)
    with pytest.raises(ValueError, match="must be above 0"):
        CoBaWeights(2).update((1.0, 0.0))
