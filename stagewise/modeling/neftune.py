"""NEFTune (arXiv 2310.05914): uniform noise on the input embeddings while training.

    noise ~ U(-1, 1) * alpha / sqrt(L * d)        d: width of the embedding

L is the length of the text that a token is part of, as in the authors' training code: padding does not count, and has
no noise; a document in a packed row has the noise that it would have alone. (transformers' own hook takes the length
of the whole row, so that the noise shrinks with the padding and with what a row is packed with.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def embedding_noise(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Within it, forward passes in train mode with gradients have noise. Without alpha there is no hook at all.

    Passes without gradients have none: a reference model that shares the policy's weights (DPO) stays what it is.

    Args:
        model: a transformers model with or without adapters. It is called with its masks by name.
    """
    if not alpha:
        yield
        return
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    noise = _EmbeddingNoise(alpha)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    handles = [
        decoder.register_forward_pre_hook(noise.read_lengths, with_kwargs=True),
        base.get_input_embeddings().register_forward_hook(noise.add),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _EmbeddingNoise:
    def __init__(self, alpha: float):
        self.alpha = alpha
        self.lengths: Tensor | None = None  # of the forward pass that is under way

    def read_lengths(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.lengths = text_lengths(kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def add(self, embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not (embedding.training and torch.is_grad_enabled()):
            return output
        width = output.shape[-1]
        if self.lengths is None:
            bound = torch.full(output.shape[:2], self.alpha / (output.shape[1] * width) ** 0.5, device=output.device)
        else:
            real = self.lengths > 0
            bound = self.alpha * real / (self.lengths.clamp(min=1) * width).sqrt()
        uniform = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (uniform * bound[..., None]).to(output.dtype)


def text_lengths(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """(B, T) float32, tokens of the text that each token is part of, 0 at padding; None where rows are whole texts.

    Args:
        attention_mask: (B, T), 0 at padding; one of more dimensions says nothing here.
        position_ids: (B, T), restarting at 0 with each document of a packed row.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask.float()
        return mask * mask.sum(1, keepdim=True)
    if position_ids is None or position_ids.dim() != 2:
        return None
    document = (position_ids == 0).long().cumsum(1)  # from 1; 0 in front of the first start
    counts = torch.zeros(len(document), document.shape[1] + 1, device=document.device)
    counts.scatter_add_(1, document, torch.ones_like(document, dtype=counts.dtype))
    return counts.gather(1, document)
