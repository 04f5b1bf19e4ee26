"""The chunked cross-entropy against worked numbers and against torch's own on whole logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from stagewise.losses.logprobs import head_cross_entropy, linear_cross_entropy


def test_two_tokens_by_hand():
    # hidden picks a column of the head: logits (ln 3, 0) for token 0 and (0, 0) for token 1
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    loss, nll = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), torch.tensor([0.5, 0.25]))
    # -ln(3/4) and -ln(1/2)
    torch.testing.assert_close(nll, torch.tensor([math.log(4 / 3), math.log(2.0)]))
    assert loss.item() == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2.0), abs=1e-6)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    n, d, v = 37, 16, 50
    hidden = torch.randn(n, d, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(v, d).requires_grad_()
    bias = torch.randn(v).requires_grad_()
    labels = torch.randint(0, v, (n,))
    token_weights = torch.rand(n)
    return hidden, weight, bias, labels, token_weights


def reference(problem, label_smoothing):
    hidden, weight, bias, labels, token_weights = problem
    per_token = F.cross_entropy(
        F.linear(hidden, weight, bias), labels, reduction="none", label_smoothing=label_smoothing
    )
    loss = (per_token * token_weights).sum()
    return loss, torch.autograd.grad(3.0 * loss, [hidden, weight, bias])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_equals_torch_on_whole_logits(problem, label_smoothing, chunk_rows):
    hidden, weight, bias, labels, token_weights = problem
    want, want_grads = reference(problem, label_smoothing)
    for loss, nll in (
        linear_cross_entropy(hidden, weight, labels, token_weights, bias, label_smoothing, chunk_rows),
        head_cross_entropy(
            hidden,
            lambda h: F.linear(h, weight, bias),
            labels,
            token_weights,
            weight.shape[0],
            label_smoothing,
            [weight, bias],
            chunk_rows,
        ),
    ):
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(nll, F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none"))
        grads = torch.autograd.grad(3.0 * loss, [hidden, weight, bias])
        for got, expected in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_frozen_head_gets_no_gradient(problem):
    hidden, weight, _, labels, token_weights = problem
    loss, _ = linear_cross_entropy(hidden, weight.detach(), labels, token_weights)
    (grad,) = torch.autograd.grad(loss, [hidden])
    want = (F.cross_entropy(hidden @ weight.detach().t(), labels, reduction="none") * token_weights).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(want, [hidden])[0], atol=1e-5, rtol=1e-5)


def test_no_trained_token_gives_zero_loss_and_zero_gradient():
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    for loss, nll in (
        linear_cross_entropy(hidden, weight, empty, torch.zeros(0)),
        head_cross_entropy(hidden, lambda h: h @ weight.t(), empty, torch.zeros(0), 6),
    ):
        assert loss.item() == 0.0
        assert nll.numel() == 0
        assert torch.autograd.grad(loss, [hidden])[0].shape == (0, 4)


def test_bf16_hidden_states_keep_an_fp32_loss(problem):
    hidden, weight, bias, labels, token_weights = problem
    loss, nll = linear_cross_entropy(
        hidden.detach().bfloat16(), weight.detach().bfloat16(), labels, token_weights, bias.detach().bfloat16()
    )
    assert loss.dtype == nll.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(problem, 0.0)[0].item(), rel=0.02)


def test_no_whole_logits_matrix_is_allocated():
    """The largest tensor made on the way has at most one chunk's elements (or the head's)."""
    n, d, v, rows = 512, 8, 64, 16
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        loss, _ = linear_cross_entropy(
            hidden, weight, torch.zeros(n, dtype=torch.long), torch.ones(n), None, 0.0, rows
        )
        loss.backward()
    assert largest <= max(rows * v, n * d, v * d)
