"""Cross-entropy from hidden states, chunk by chunk, so that no (tokens, vocabulary) fp32 matrix ever exists whole."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# One chunk's logits in fp32: 2**24 elements are 64 MiB, large enough to keep the matrix products efficient.
MAX_LOGITS_ELEMENTS = 2**24


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    max_elements: int = MAX_LOGITS_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of `softmax(hidden @ weight.T + bias)`.

        loss = sum_i token_weights_i * l_i
        l_i  = (1 - e) * (lse(z_i) - z_i[y_i]) + e * (lse(z_i) - mean_v z_i[v])        e = label_smoothing

    The gradients with respect to `hidden`, `weight` and `bias` are computed in the forward pass while a chunk's logits
    are there (the gradient of a weighted sum needs nothing of what follows but one scalar), so that backward
    recomputes nothing. The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989).

    Args:
        hidden: (N, D), the last hidden states of the N positions that predict a trained token.
        weight: (V, D), the language-model head.
        labels: (N,), the token that each position predicts; no IGNORE_INDEX among them.
        token_weights: (N,), for a token mean 1/N each; not differentiated.
        bias: (V,) or None.
        label_smoothing: e, in [0, 1).
        max_elements: the largest chunk of logits, in elements.

    Returns:
        The loss (scalar, fp32) and the detached l_i (N,), fp32, without label smoothing: the true negative
        log-likelihoods.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, token_weights, label_smoothing, max_elements)


def head_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    token_weights: Tensor,
    vocab_size: int,
    label_smoothing: float = 0.0,
    max_elements: int = MAX_LOGITS_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The same loss for a head that is more than one plain matrix (an adapter on it, soft-capping, sharded weights).

    `head` maps (n, D) to logits (n, V). Each chunk is recomputed in backward: a third more work in the head than
    :func:`linear_cross_entropy`, the same peak memory.
    """
    losses, nlls = [], []
    for rows in _chunks(hidden.shape[0], vocab_size, max_elements):

        def chunk_loss(h: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(h).float()
            nll = F.cross_entropy(logits, y, reduction="none")
            smooth = (
                nll
                if not label_smoothing
                else F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
            )
            return (smooth * w).sum(), nll.detach()

        loss, nll = checkpoint(chunk_loss, hidden[rows], labels[rows], token_weights[rows], use_reentrant=False)
        losses.append(loss)
        nlls.append(nll)
    if not losses:
        return hidden.float().sum() * 0.0, hidden.new_zeros(0, dtype=torch.float32)
    return torch.stack(losses).sum(), torch.cat(nlls)


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    max_elements: int = MAX_LOGITS_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """log softmax(head(hidden) / temperature) at `labels`, and the entropies of those distributions.

    Where gradients are wanted and there is more than one chunk, each chunk's logits are computed again in backward, so
    that one chunk is all that is ever in memory.

    Args:
        hidden: (N, D), the last hidden states of the positions that predict a token.
        head: maps (n, D) to logits (n, V).
        labels: (N,), the token that each position predicts.

    Returns:
        Log-probabilities (N,), differentiable, and entropies in nats (N,), detached; both fp32.
    """

    def of_chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(h).float() / temperature, dim=-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)  # 0 * -inf where a logit is masked out
        return log_p.gather(1, y[:, None]).squeeze(1), entropy

    chunks = _chunks(hidden.shape[0], vocab_size, max_elements)
    if not chunks:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return hidden.float().sum() * 0.0 + empty, empty
    if len(chunks) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(of_chunk, hidden[rows], labels[rows], use_reentrant=False) for rows in chunks]
    else:
        parts = [of_chunk(hidden[rows], labels[rows]) for rows in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunks(n_tokens: int, vocab_size: int, max_elements: int) -> list[slice]:
    size = max(1, max_elements // vocab_size)
    return [slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, label_smoothing, max_elements):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        nll = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for rows in _chunks(hidden.shape[0], weight.shape[0], max_elements):
            h, y, w = hidden[rows], labels[rows, None], token_weights[rows].float()
            # A bf16 model with an fp32 head (as k-bit preparation makes it) multiplies in the head's precision.
            logits = F.linear(h.to(weight.dtype), weight, bias).float()
            lse = logits.logsumexp(-1)
            nll[rows] = lse - logits.gather(1, y).squeeze(1)
            smooth = nll[rows]
            if label_smoothing:
                smooth = (1 - label_smoothing) * smooth + label_smoothing * (lse - logits.mean(-1))
            loss += (smooth * w).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d loss / d logits = w * (softmax - (1 - e) onehot - e / V), written over the logits
            grad = logits.sub_(lse[:, None]).exp_()
            if label_smoothing:
                grad -= label_smoothing / weight.shape[0]
            grad.scatter_add_(1, y, grad.new_full(y.shape, label_smoothing - 1.0))
            grad *= w[:, None]
            low = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = low @ weight
            if grad_weight is not None:
                grad_weight += (low.t() @ h.to(weight.dtype)).float()
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(bias_dtype),
            None,
            None,
            None,
            None,
        )
