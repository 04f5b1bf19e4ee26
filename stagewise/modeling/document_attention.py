"""Attention document by document: what `sdpa` computes, without a mask and without the work of whole rows.

For packed rows transformers hands SDPA a mask of L x L, and the kernel computes scores of all pairs of tokens, most
of them in different documents. Here each document is by itself: on accelerators those of about one length go through
SDPA together, on CPUs each in a call of its own. Rows with padding on the right need no mask either: no real token
sees what stands behind it. What a padding token's output is, is left open. All else (padding on the left, a cache,
masks of the caller's) goes through `sdpa`.
"""

import functools
from collections.abc import Callable
from typing import Any

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
    if _calls_are_cheap(query) and not dropout:
        return _one_by_one(query, key, value, layout, attend)
    rows, length = query.shape[0], query.shape[2]
    pieces = layout.pieces(length, 0, query.device)
    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return attend_pieces(pieces, attend, *tokens).unflatten(0, (rows, length))


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
