"""Gradients in 16 bits are as near to the exact ones as autograd's through the same head, whatever is in a step.

A loss looks healthy with wrong gradients, so these are compared: relative to those of float64, and never worse than
1.5 times what plain operations in the same 16 bits give. What finds faults are the loss scale (it comes after
gradients were rounded), the tokens of a step (each gradient is divided by them), and how well they are predicted.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagewise.losses.logprobs import head_cross_entropy, linear_cross_entropy, token_logprobs
from stagewise.losses.policy_gradient import policy_loss
from stagewise.losses.preference import pairwise_reward_loss
from stagewise.modeling.precision import multiply_in_float32

ROWS = 96  # that are computed; a step of more tokens has others with them, which divide the gradient and no more
ALLOWED = 1.5
# How near the head's vectors are to the hidden states that they should answer: (loss, nearness).
NEARNESS = {11.1: 0.0, 5.9: 0.165, 0.9: 0.345, 0.05: 0.475}
PRECISIONS = {
    "fp16, scale 2**15": (torch.float16, None, 2.0**15),
    "fp16, scale 2**16": (torch.float16, None, 2.0**16),
    "bf16": (torch.bfloat16, None, 1.0),
    "autocast fp16": (torch.float32, torch.float16, 2.0**16),
    "autocast bf16": (torch.float32, torch.bfloat16, 1.0),
}


@dataclass
class Problem:
    """hidden (N, D), weight (V, D), labels (N,) in float32."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor


def make_problem(nearness: float, vocab: int = 65_536, width: int = 64) -> Problem:
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, width) * 8 / width**0.5, torch.randn(vocab, width) * 0.02
    labels = torch.randint(0, vocab, (ROWS,))
    weight[labels] += nearness * 4 * F.normalize(hidden, dim=1)
    return Problem(hidden, weight, labels)


@pytest.fixture(scope="module", params=NEARNESS)
def problem(request) -> Problem:
    found = make_problem(NEARNESS[request.param])
    loss = F.cross_entropy(found.hidden @ found.weight.t(), found.labels).item()
    assert loss == pytest.approx(request.param, rel=0.25), loss
    return found


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels, token weights


def by_autograd(h: Tensor, w: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return (F.cross_entropy(F.linear(h, w).float(), labels, reduction="none") * token_weights).sum()


def ours(h: Tensor, w: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return linear_cross_entropy(h, w, labels, token_weights, chunk_rows=40)[0]


def ours_of_any_head(h: Tensor, w: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    head, trained = lambda x: F.linear(x, w), [w] if w.requires_grad else []
    return head_cross_entropy(h, head, labels, token_weights, len(w), parameters=trained, chunk_rows=40)[0]


def errors(loss: Loss, problem: Problem, precision: str, tokens: int, trains_head: bool) -> list[float]:
    """Of the gradients of hidden states and, where it is trained, head: |g - exact| / |exact|."""
    dtype, autocast, scale = PRECISIONS[precision]
    weights = torch.full((ROWS,), 1 / tokens)
    h = problem.hidden.to(dtype, copy=True).requires_grad_()
    w = problem.weight.to(dtype, copy=True).requires_grad_(trains_head)
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        value = loss(h, w, problem.labels, weights)
    (value * scale).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (h, w)]
    (F.cross_entropy(exact[0] @ exact[1].t(), problem.labels, reduction="sum") / tokens).backward()
    pairs = zip((h, w), exact, strict=True)
    return [distance(a.grad.double() / scale, b.grad) for a, b in pairs if a.grad is not None]


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("loss", [ours, ours_of_any_head])
def test_a_language_models_gradients(loss, precision, trains_head, problem):
    for tokens in (100, 131_072):
        found = errors(loss, problem, precision, tokens, trains_head)
        plain = errors(by_autograd, problem, precision, tokens, trains_head)
        assert len(found) == len(plain) == 1 + trains_head
        for one, other in zip(found, plain, strict=True):
            assert one <= ALLOWED * other, (tokens, found, plain)
            assert one < 0.02


def test_weights_of_tokens_that_differ_a_thousandfold(problem):
    """As those of a mean over samples do: the rows of little weight keep what autograd would have left of theirs."""
    weights, scale = torch.logspace(0, -3, ROWS) / 131_072, 2.0**15
    light = slice(ROWS // 2, None)

    def error(loss: Loss) -> float:
        h, w = problem.hidden.half().requires_grad_(), problem.weight.half()
        (loss(h, w, problem.labels, weights) * scale).backward()
        exact = h.detach().double().requires_grad_()
        (F.cross_entropy(exact @ w.double().t(), problem.labels, reduction="none") * weights).sum().backward()
        return distance(h.grad[light].double() / scale, exact.grad[light])

    assert error(ours) <= ALLOWED * error(by_autograd)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tokens", [100, 131_072])
def test_ppos_gradients(precision, tokens, problem):
    """The clipped objective, through the log-probabilities of chunks that are computed again in backward."""
    dtype, autocast, scale = PRECISIONS[precision]
    advantages = torch.randn(1, ROWS, generator=torch.Generator().manual_seed(1))
    old = torch.log_softmax(problem.hidden @ problem.weight.t(), -1).gather(1, problem.labels[:, None]).t() + 0.05

    def gradient(logprobs: Callable[[Tensor, Tensor], Tensor], number: torch.dtype) -> Tensor:
        h, w = problem.hidden.to(dtype).to(number, copy=True).requires_grad_(), problem.weight.to(dtype).to(number)
        mixed = autocast is not None and number == dtype
        with torch.autocast("cpu", dtype=autocast) if mixed else contextlib.nullcontext():
            found = logprobs(h, w)
        mask = torch.ones(1, ROWS, dtype=torch.bool)
        loss, _ = policy_loss(found[None], old.to(found.dtype), advantages.to(found.dtype), mask, 0.2, tokens)
        (loss * scale).backward()
        return h.grad.double() / scale

    def plain(h: Tensor, w: Tensor) -> Tensor:
        logits = F.linear(h, w)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(logits, -1).gather(1, problem.labels[:, None]).squeeze(1)

    def chunked(h: Tensor, w: Tensor) -> Tensor:
        return token_logprobs(h, lambda x: F.linear(x, w), problem.labels, len(w), chunk_rows=40)[0]

    exact = gradient(plain, torch.float64)
    assert distance(gradient(chunked, dtype), exact) <= ALLOWED * distance(gradient(plain, dtype), exact)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_reward_models_gradients(precision):
    """Of hidden states and head, from scores in float32; autograd's are through a head that multiplies in 16 bits."""
    dtype, autocast, scale = PRECISIONS[precision]
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 256), torch.randn(1, 256) * 0.02

    def gradients(number: torch.dtype, in_float32: bool) -> list[Tensor]:
        head = nn.Linear(256, 1, bias=False, dtype=number)
        head.weight.data = weight.to(dtype).to(number)
        if in_float32:
            multiply_in_float32(head)
        h = hidden.to(dtype).to(number, copy=True).requires_grad_()
        mixed = autocast is not None and number == dtype
        with torch.autocast("cpu", dtype=autocast) if mixed else contextlib.nullcontext():
            scores = head(h)
        assert not in_float32 or scores.dtype == torch.float32
        scores = scores if number == torch.float64 else scores.float()
        (pairwise_reward_loss(*scores.squeeze(1).chunk(2), num_pairs=4096) * scale).backward()
        return [tensor.grad.double() / scale for tensor in (h, head.weight)]

    exact = gradients(torch.float64, False)
    for found, plain, wanted in zip(gradients(dtype, True), gradients(dtype, False), exact, strict=True):
        assert distance(found, wanted) <= ALLOWED * distance(plain, wanted)


def test_no_gradient_is_made_where_none_is_asked_for(monkeypatch, problem):
    """An evaluation multiplies hidden states with the head, and nothing else."""
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(args) or real(*args, **kwargs))
    h, w = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(h, w, problem.labels, torch.ones(ROWS), chunk_rows=ROWS)
    assert len(products) == 1
    assert not loss.requires_grad


def test_a_second_backward_is_an_error(problem):
    loss, _ = linear_cross_entropy(
        problem.hidden.clone().requires_grad_(), problem.weight, problem.labels, torch.ones(ROWS)
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
