"""S2-Attn (LongLoRA, arXiv 2309.12307): attention in groups of tokens, half of the heads shifted by half a group.

For a document of tokens 0 .. L-1, heads h = 0 .. H-1 and groups of g tokens, a query sees the keys before it, and
itself, in its own segment. Segments of the first H // 2 heads begin at 0, g, 2g, ..., those of the other heads at 0,
g/2, 3g/2, ..., so that each border of one half lies inside a segment of the other. The paper rolls the shifted half,
which lets the first tokens see the last ones; here nothing wraps around.

Documents of a packed row are counted each from its own start, so that a document trains as it would alone. A padding
token is in no document: its output is zeros. Training only: in eval mode and with a cache attention is what `sdpa`
makes of it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from stagewise.errors import InputError
from stagewise.modeling.segments import (
    SCORE_CHANGES,
    Block,
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


def enable_s2_attention(model: PreTrainedModel, group: int | None = None) -> None:
    """Let `model` train with S2-Attn; nothing of it is saved with the model.

    Args:
        model: a causal LM, not yet wrapped by peft.
        group: tokens of a group, even; None: a quarter of each batch's row length (see default_group).

    Raises:
        InputError: an odd group, or an architecture that cannot be trained so: its attention does not go through
            transformers' interface, it has an encoder or cross-attention, or it changes the attention scores.
    """
    if group is not None and (group < 2 or group % 2):
        raise InputError(f"--shift_attn_group: found {group}, expected an even number of tokens, 2 or more")
    reason = obstacle(model)
    if not reason and getattr(model.config, "num_attention_heads", 2) < 2:
        reason = "has one attention head, and S2-Attn needs two to shift one of them"
    if reason:
        raise InputError(f"--shift_attn: {type(model).__name__} {reason}; leave the flag out, or use another model")
    # The group is in the name: a setting in the configuration would be saved with the model.
    name = "s2_attn" if group is None else f"s2_attn_{group}"
    AttentionInterface.register(name, functools.partial(s2_attention_forward, group=group))
    AttentionMaskInterface.register(name, deferred_mask)
    model.set_attn_implementation(name)


def default_group(length: int) -> int:
    """A quarter of `length` tokens, with `length` padded to a multiple of 8: an even number, at least 2."""
    return -(-length // 8) * 2


def s2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "DeferredMask | Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    group: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query (B, H, L, D), key and value (B, KV, L, D) -> (B, L, H, D).

    Raises:
        InputError: in training, a batch with padding on the left, or a mask that is more than causal.
    """
    if not (module.training and is_causal_without_cache(module, attention_mask, is_causal)):
        return whole_rows(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    changes = [name for name in SCORE_CHANGES if kwargs.get(name) is not None]
    if changes or not isinstance(attention_mask, DeferredMask):
        found = f"{type(module).__name__} with {changes[0]}" if changes else "an attention mask made by the caller"
        raise InputError(f"--shift_attn: found {found}, which S2-Attn does not know; leave the flag out")
    try:
        layout = attention_mask.layout()
    except NoSegmentsError as error:
        raise InputError(f"--shift_attn: found {error}") from error
    return s2_attention(query, key, value, group, layout, dropout, scaling), None


def s2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: int | None = None,
    layout: Layout | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """S2-Attn of whole rows.

    Args:
        query: (B, H, L, D); key, value: (B, KV, L, D), where H is a multiple of KV.
        group: even; None: default_group(L).
        layout: padding, documents, window; None: rows are whole documents.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        (B, L, H, D), zeros at padding.
    """
    layout = layout or Layout()
    heads, length = query.shape[1:3]
    group = group or default_group(length)
    key, value = (_for_halves(x, heads) for x in (key, value))
    attend = functools.partial(causal_attention, dropout=dropout, scale=scale, window=layout.window)
    if layout.starts is None:
        out = _attend_rows(query, key, value, group, attend)
    else:
        out = _attend_documents(query, key, value, group, layout, attend)
    return out if layout.keep is None else out * layout.keep[:, :, None, None].to(out)


def _for_halves(x: Tensor, heads: int) -> Tensor:
    """Key or value heads of which the first half is what the first heads // 2 query heads attend to."""
    repeats = heads // x.shape[1]
    if heads // 2 % repeats == 0:
        return x
    return x.expand(-1, 2, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(repeats, dim=1)


def _halves(heads: int, group: int) -> tuple[tuple[slice, int], tuple[slice, int]]:
    """(heads, where the second segment of a document begins) of both halves."""
    return (slice(0, heads // 2), 0), (slice(heads // 2, heads), group // 2)


# A document a row: segments are views, and the groups of a row go through SDPA as a batch.


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, group: int, attend: Callable[..., Tensor]) -> Tensor:
    inputs = (query, key, value)
    blocks = [list(_blocks(x.shape[1], x.shape[2], group)) for x in inputs]
    cuts = [Cut.apply(x, where) for x, where in zip(inputs, blocks, strict=True)]
    outs = []
    for parts in zip(*cuts, strict=True):
        out = attend(*(_as_batch(x, group) for x in parts)).transpose(1, 2)
        outs.append(out.reshape(len(query), -1, *out.shape[2:]))
    return Join.apply(query.shape, blocks[0], *outs)


def _blocks(heads: int, length: int, group: int) -> Iterator[Block]:
    """What is attended to in one call: whole groups together, a shorter segment at either end."""
    for half, shift in _halves(heads, group):
        shift = min(shift, length)
        whole = shift + (length - shift) // group * group
        for start, end in itertools.pairwise((0, shift, whole, length)):
            if start < end:
                yield slice(None), half, slice(start, end)


def _as_batch(x: Tensor, group: int) -> Tensor:
    """(B, h, n * group, D) -> (B * n, h, group, D); a shorter segment as it is."""
    return x if x.shape[2] <= group else x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)


def _attend_documents(
    query: Tensor, key: Tensor, value: Tensor, group: int, layout: Layout, attend: Callable[..., Tensor]
) -> Tensor:
    halves = zip(*(_halves(x.shape[1], group) for x in (query, key, value)), strict=True)
    outs = []
    for parts in halves:
        pieces = layout.pieces(group, parts[0][1], query.device)
        tokens = (
            x[:, heads].transpose(1, 2).flatten(0, 1) for x, (heads, _) in zip((query, key, value), parts, strict=True)
        )
        outs.append(attend_pieces(pieces, attend, *tokens))
    return torch.cat(outs, dim=1).unflatten(0, (len(query), -1))
