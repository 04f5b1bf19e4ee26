"""Attention document by document: what `sdpa` computes, without a mask and without the work of whole rows.

For packed rows transformers hands SDPA a mask of L x L, and the kernel computes scores of all pairs of tokens, most
of them in different documents. Here each document is by itself: on GPUs by torch's own kernel for sequences of all
lengths, where it runs; otherwise those of about one length go through SDPA together, and on CPUs each in a call of its
own. Rows with padding on the right need no mask either: no real token sees what stands behind it. What a padding
token's output is, is left open. All else (padding on the left, a cache, masks of the caller's) goes through `sdpa`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from stagewise.modeling.segments import (
    SCORE_CHANGES,
    Cut,
    DeferredMask,
    Join,
    Layout,
    NoSegmentsError,
    attend_pieces,
    causal_attention,
    deferred_mask,
    is_causal_without_cache,
    obstacle,
    whole_rows,
)

NAME = "sdpa_by_document"


def enable_document_attention(model: PreTrainedModel) -> bool:
    """Let a model on the kernel `sdpa` compute it document by document; nothing of it is saved with the model.

    Returns:
        False where the model has another kernel, or its architecture does not lend itself to it.
    """
    if model.config._attn_implementation != "sdpa" or obstacle(model):
        return False
    AttentionInterface.register(NAME, document_attention_forward)
    AttentionMaskInterface.register(NAME, deferred_mask)
    model.set_attn_implementation(NAME)
    return True


def document_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "DeferredMask | Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, L, D), key and value (B, KV, L, D) -> (B, L, H, D)."""
    layout = None
    unchanged = all(kwargs.get(name) is None for name in SCORE_CHANGES)
    if isinstance(attention_mask, DeferredMask) and unchanged:
        layout = _layout(attention_mask) if is_causal_without_cache(module, attention_mask, is_causal) else None
    if layout is None:
        return whole_rows(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return document_attention(query, key, value, layout, dropout, scaling), None


def _layout(mask: DeferredMask) -> Layout | None:
    try:
        return mask.layout()
    except NoSegmentsError:
        return None


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Causal attention inside the documents of rows.

    Args:
        query: (B, H, L, D); key, value: (B, KV, L, D), where H is a multiple of KV.
        layout: documents and window; padding stands behind all else, and is not looked at.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        (B, L, H, D).
    """
    attend = functools.partial(causal_attention, dropout=dropout, scale=scale, window=layout.window)
    if layout.starts is None:
        return attend(query, key, value).transpose(1, 2)
    if not dropout:
        inputs = _multiplied(query, key, value)
        if _varlen_runs(*inputs):
            return _end_to_end(*inputs, layout, scale)
        if _calls_are_cheap(query):
            return _one_by_one(query, key, value, layout, attend)
    rows, length = query.shape[0], query.shape[2]
    pieces = layout.pieces(length, 0, query.device)
    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return attend_pieces(pieces, attend, *tokens).unflatten(0, (rows, length))


@functools.cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """torch.nn.attention.varlen.varlen_attn; None where this torch's takes no windows, or no grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if known.keys() >= {"scale", "window_size", "enable_gqa"} else None


def _varlen_runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether varlen_attn takes such tensors: it is the flash kernel of SDPA, which torch knows the demands of, but
    without the padding of head sizes that SDPA sees to. Never run on AMD's GPUs, so left alone there.
    """
    if not query.is_cuda or torch.version.hip is not None or query.shape[-1] % 8 or varlen_attention() is None:
        return False
    grouped = query.shape[1] != key.shape[1]
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, grouped)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def _multiplied(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What SDPA would multiply: autocast does not know varlen_attn."""
    device = query.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _end_to_end(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """All documents in one call, their tokens laid end to end."""
    attend = varlen_attention()
    assert attend is not None
    borders, longest = layout.borders(query.device)
    narrow = layout.window if layout.window is not None and layout.window < longest else 0
    window = (narrow - 1, 0)  # how many tokens are seen before the token itself (-1: all), and behind it
    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = attend(
        *tokens, borders, borders, longest, longest, scale=scale, window_size=window, enable_gqa=grouped
    )  # fmt: skip
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _calls_are_cheap(query: Tensor) -> bool:
    """On CPUs a call costs less than copies and padding."""
    return query.device.type == "cpu"


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, layout: Layout, attend: Callable[..., Tensor]) -> Tensor:
    """A call for each document, on views of the rows."""
    documents = layout.documents()
    repeats = query.shape[1] // key.shape[1]
    outs = []
    cuts = (Cut.apply(x, documents.blocks) for x in (query, key, value))
    for single, q, k, v in zip(documents.single, *cuts, strict=True):
        out = v.repeat_interleave(repeats, 1) if single else attend(q, k, v)  # one token sees itself alone
        outs.append(out.transpose(1, 2))
    return Join.apply(query.shape, documents.blocks, *outs)
