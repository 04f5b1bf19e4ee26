"""Cross-entropy from hidden states, chunk by chunk, so that no (tokens, vocabulary) fp32 matrix ever exists whole.

Gradients are made in the forward pass, while a chunk's logits are there: the gradient of a weighted sum needs nothing
of what follows but one scalar. So backward computes nothing again, and, where the head's weights are shared out among
processes, asks for them no second time. (The idea is that of Liger Kernel's fused linear cross-entropy, arXiv
2410.10989. torch's own linear_cross_entropy, new in 2.13, has no label smoothing, and gives the losses of single
tokens only rounded to the weights' type and at the cost of another pass over the head in backward.)

That scalar, the loss scale of fp16 over the tokens of a step, comes after the gradients were rounded to 16 bits. So
they are made for weights of tokens that are 1 at most, not for 1/N, and multiplied by the rest in float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# One chunk's logits in fp32: 64 MiB, but at least so many rows that its matrix products are efficient.
MAX_LOGITS_ELEMENTS, MIN_CHUNK_ROWS = 2**24, 256
# Columns of a head's gradient that are multiplied at a time where the product has to be converted to fp32.
GRADIENT_COLUMNS = 2**14
# What gradients in fp16 are multiplied by on their way through the head. At a logit they are probabilities, many of
# them below fp16's smallest normal number, 6e-5. Behind a product with the head's matrix they are up to 2 * 2**8 times
# its largest weight, and fp16 ends at 65504.
FP16_SCALE = 2.0**8


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of `softmax(hidden @ weight.T + bias)`.

        loss = sum_i token_weights_i * l_i
        l_i  = (1 - e) * (lse(z_i) - z_i[y_i]) + e * (lse(z_i) - mean_v z_i[v])        e = label_smoothing

    Products are in the type of `weight`, or in autocast's; a gradient of `weight` is summed up in fp32. The result can
    go through backward once.

    Args:
        hidden: (N, D), the last hidden states of the N positions that predict a trained token.
        weight: (V, D), the language-model head.
        labels: (N,), the token that each position predicts; no IGNORE_INDEX among them.
        token_weights: (N,), 0 or more, for a token mean 1/N each; not differentiated.
        bias: (V,) or None.
        label_smoothing: e, in [0, 1).
        chunk_rows: positions in a chunk; None: see MAX_LOGITS_ELEMENTS.

    Returns:
        The loss (scalar, fp32) and the detached l_i (N,), fp32, without label smoothing: the true negative
        log-likelihoods.
    """
    wanted = torch.is_grad_enabled()
    chunks = _chunks(hidden.shape[0], weight.shape[0], chunk_rows)
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, token_weights, label_smoothing, chunks, wanted)


def head_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    token_weights: Tensor,
    vocab_size: int,
    label_smoothing: float = 0.0,
    parameters: Sequence[Tensor] = (),
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same loss for a head that is more than one plain matrix (an adapter on it, soft-capping, 4 bits).

    Its gradients are autograd's, chunk by chunk. :func:`linear_cross_entropy` needs two thirds of the memory for a
    chunk, and sums the matrix's gradient up in place.

    Args:
        head: maps (n, D) to logits (n, V).
        parameters: what of the head is trained.
    """
    wanted = torch.is_grad_enabled()
    chunks = _chunks(hidden.shape[0], vocab_size, chunk_rows)
    return _HeadCrossEntropy.apply(
        hidden, labels, token_weights, head, label_smoothing, chunks, wanted, *(parameters if wanted else ())
    )


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
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

    chunks = _chunks(hidden.shape[0], vocab_size, chunk_rows)
    if not chunks:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return hidden.float().sum() * 0.0 + empty, empty
    if len(chunks) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(of_chunk, hidden[rows], labels[rows], use_reentrant=False) for rows in chunks]
    else:
        parts = [of_chunk(hidden[rows], labels[rows]) for rows in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def rows_of_a_chunk(vocab_size: int) -> int:
    return max(MIN_CHUNK_ROWS, MAX_LOGITS_ELEMENTS // vocab_size)


def _chunks(n_tokens: int, vocab_size: int, chunk_rows: int | None) -> list[slice]:
    size = chunk_rows or rows_of_a_chunk(vocab_size)
    return [slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size)]


class _Summands:
    """The weighted sum of token losses, chunk by chunk, and its gradient at the logits.

    factor: what gradients must be multiplied by in the end, with that of the loss.
    """

    def __init__(self, labels: Tensor, token_weights: Tensor, label_smoothing: float, scale: float):
        weights = token_weights.float()
        largest = weights.max() if len(weights) else weights.new_zeros(())
        self._shares = weights / torch.where(largest > 0, largest, 1.0)  # 1 at most
        self.labels, self.label_smoothing, self.scale = labels, label_smoothing, scale
        self.factor = largest / scale
        self.nll = torch.empty_like(weights)
        self._loss = torch.zeros_like(largest)

    @property
    def loss(self) -> Tensor:
        return self._loss * self.factor * self.scale

    def add(self, rows: slice, logits: Tensor, wants_gradient: bool) -> Tensor:
        """Take in the logits (n, V), fp32, of `rows`; they are overwritten, by their gradient where it is wanted."""
        y, share, e = self.labels[rows, None], self._shares[rows, None], self.label_smoothing
        logits -= logits.amax(-1, keepdim=True)
        chosen = logits.gather(1, y)
        mean = logits.mean(-1, keepdim=True) if e else chosen
        total = logits.exp_().sum(-1, keepdim=True)
        lse = total.log()
        self.nll[rows] = (lse - chosen).squeeze(1)
        self._loss += ((lse - (1 - e) * chosen - e * mean) * share).sum()
        if wants_gradient:
            # share * scale * (softmax - (1 - e) onehot - e / V)
            share = share * self.scale
            logits *= share / total
            if e:
                logits -= share * (e / logits.shape[1])
            logits.scatter_add_(1, y, share * (e - 1))
        return logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, label_smoothing, chunks, wanted):
        need_hidden, need_weight, need_bias = (asked and wanted for asked in ctx.needs_input_grad[:3])
        needed = need_hidden or need_weight or need_bias
        dtype = _multiplied_in(hidden, weight.dtype)
        summands = _Summands(labels, token_weights, label_smoothing, FP16_SCALE if dtype == torch.float16 else 1.0)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)  # a bf16 model with an fp32 head multiplies in the head's precision
            # one buffer for all chunks: fresh memory costs a CPU as much time as all that is done to the logits
            buffer = hidden.new_empty((chunks[0].stop if chunks else 0, len(weight)), dtype=torch.float32)
            for rows in chunks:
                h = hidden[rows].to(dtype)
                logits = _product(h, matrix.t(), buffer[: len(h)])
                if bias is not None:
                    logits += bias
                grad = summands.add(rows, logits, needed)
                if not needed:
                    continue
                low = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = low @ matrix
                if grad_weight is not None:
                    _add_product(grad_weight, low, h)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(summands.factor, grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(summands.nll)
        return summands.loss, summands.nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        factor, *gradients = ctx.saved_tensors
        finished = _times(gradients, factor * grad_loss, ctx.dtypes)
        return *finished, None, None, None, None, None


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, token_weights, head, label_smoothing, chunks, wanted, *parameters):
        need_hidden = wanted and ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        # gradients of parameters are sums over rows, for which fp16 has no room to spare
        half = _multiplied_in(hidden, hidden.dtype) == torch.float16 and not parameters
        summands = _Summands(labels, token_weights, label_smoothing, FP16_SCALE if half else 1.0)
        for rows in chunks:
            with torch.enable_grad():
                h = hidden[rows].detach().requires_grad_(need_hidden)
                output = head(h)
            sources = [h, *parameters] if need_hidden else list(parameters)
            # a copy: what made the logits (a tanh) may need them once more
            grad = summands.add(rows, output.detach().to(torch.float32, copy=True), bool(sources))
            if not sources:
                continue
            gradients = torch.autograd.grad(output, sources, grad.to(output.dtype), allow_unused=True)
            if grad_hidden is not None:
                grad_hidden[rows], *gradients = gradients
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient
        ctx.dtypes = (hidden.dtype, *(p.dtype for p in parameters))
        ctx.save_for_backward(summands.factor, grad_hidden, *sums)
        ctx.mark_non_differentiable(summands.nll)
        return summands.loss, summands.nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        factor, *gradients = ctx.saved_tensors
        grad_hidden, *sums = _times(gradients, factor * grad_loss, ctx.dtypes)
        return grad_hidden, None, None, None, None, None, None, *sums


def _multiplied_in(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type of matrix products: autocast's where it is on, otherwise `dtype`."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b in fp32, not rounded to the type of a and b on the way where the device can do that."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out.copy_(a @ b)


def _add_product(total: Tensor, grad: Tensor, h: Tensor) -> None:
    """total += grad.T @ h, with total (V, D) in fp32."""
    if h.dtype == torch.float16 and not h.is_cuda:
        grad, h = grad.float(), h.float()  # a sum over many rows is soon more than fp16 holds
    if h.dtype == torch.float32:
        total.addmm_(grad.t(), h)
        return
    # a few columns of the gradient at a time: the product is a matrix of its own before it is added
    buffer = torch.empty_like(total[:GRADIENT_COLUMNS])
    for part, columns in zip(total.split(GRADIENT_COLUMNS), grad.split(GRADIENT_COLUMNS, dim=1), strict=True):
        part += _product(columns.t(), h, buffer[: len(part)])


def _times(gradients: Sequence[Tensor | None], factor: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """gradients * factor, multiplied in fp32, in the given types. Gradients in fp32 are overwritten (autograd notices
    when they are asked for once more)."""
    return [g if g is None else g.float().mul_(factor).to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
