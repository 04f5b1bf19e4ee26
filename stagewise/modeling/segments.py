"""Causal attention inside segments of rows: the layout of a batch, and the kernels. No mask is ever built.

A segment is a document of a packed row, or a part of one (S2-Attn). Inside a segment attention is plainly causal, and
padding stands behind every real token. So memory grows with the row length, and SDPA's fast kernels apply.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Arguments with which architectures change the attention scores in a way that is not done here.
SCORE_CHANGES = ("softcap", "position_bias", "s_aux")


class NoSegmentsError(ValueError):
    """A batch that segments cannot describe; the message says what was found, and what to do about it."""


def obstacle(model: PreTrainedModel) -> str | None:
    """Why this architecture's attention cannot be computed segment by segment; None where it can."""
    config = model.config
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return "does not take its attention from transformers' interface (Bloom, Falcon, GPT-J and others do not)"
    if not model._supports_sdpa or getattr(config, "attn_logit_softcapping", None):
        return "changes its attention scores in a way that the SDPA kernels cannot (soft-capping, sinks)"
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "has cross-attention, and segments are for decoders alone"
    if config.get_text_config() is not config:
        return "has an encoder beside the language model, and segments are for decoders alone"
    return None


def is_causal_without_cache(module: nn.Module, mask: "DeferredMask | Tensor | None", is_causal: bool | None) -> bool:
    """Whether queries and keys are the same tokens, and see no later ones."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    return causal and not (isinstance(mask, DeferredMask) and mask.has_cache)


def whole_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: "DeferredMask | Tensor | None",
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the attention function `sdpa` makes of the same arguments."""
    full = mask.full(query.device) if isinstance(mask, DeferredMask) else mask
    return sdpa_attention_forward(
        module, query, key, value, full, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


@dataclass
class Layout:
    """What a batch of rows is made of.

    keep: (B, L) bool, False at padding, which is on the right; None: no padding.
    starts: (B, L) bool on the CPU, True at the first token of a document; None: a row is one document.
    window: how many tokens back a token sees, itself included; None: all.
    """

    keep: Tensor | None = None
    starts: Tensor | None = None
    window: int | None = None
    _pieces: dict[tuple, "Pieces"] = field(default_factory=dict)
    _documents: "Documents | None" = None
    _borders: dict[torch.device, tuple[Tensor, int]] = field(default_factory=dict)

    def borders(self, device: torch.device) -> tuple[Tensor, int]:
        """(documents + 1,) int32, where each begins in the rows laid end to end, and their end; tokens of the longest.

        Found once for all layers.
        """
        assert self.starts is not None
        if device not in self._borders:
            begins = self.starts.flatten().nonzero().flatten()
            borders = torch.cat([begins, begins.new_tensor([self.starts.numel()])]).int()
            self._borders[device] = borders.to(device), int(borders.diff().max())
        return self._borders[device]

    def documents(self) -> "Documents":
        """Of all rows; found once for all layers."""
        assert self.starts is not None
        if self._documents is None:
            self._documents = find_documents(self.starts)
        return self._documents

    def pieces(self, group: int, shift: int, device: torch.device) -> "Pieces":
        """The segments of all documents; found once for all layers."""
        assert self.starts is not None
        key = (group, shift, device)
        if key not in self._pieces:
            self._pieces[key] = cut_into_pieces(self.starts, group, shift, device)
        return self._pieces[key]


@dataclass
class DeferredMask:
    """What transformers would build a mask from. The (L, L) mask itself is made where segments do not do.

    arguments: those of transformers' sdpa_mask.
    """

    arguments: dict[str, Any]
    _full: dict[torch.device, Tensor | None] = field(default_factory=dict)
    _layout: "Layout | NoSegmentsError | None" = None

    @property
    def has_cache(self) -> bool:
        """Whether there are keys from before this forward pass (or room for keys after it)."""
        offset = self.arguments["q_offset"]
        return isinstance(offset, Tensor) or offset != 0 or self.arguments["kv_length"] != self.arguments["q_length"]

    def full(self, device: torch.device) -> Tensor | None:
        """The mask of the attention function `sdpa`; layers share it."""
        if device not in self._full:
            mask = sdpa_mask(**self.arguments)
            self._full[device] = None if mask is None else mask.to(device)
        return self._full[device]

    def layout(self) -> Layout:
        """Padding, documents and window, read off the mask's rule in O(L).

        Raises:
            NoSegmentsError: padding that is not on the right, or tokens that see later ones.
        """
        if self._layout is None:
            try:
                self._layout = self._find_layout()
            except NoSegmentsError as error:
                self._layout = error
        if isinstance(self._layout, NoSegmentsError):
            raise self._layout
        return self._layout

    def _find_layout(self) -> Layout:
        keep = self.arguments["attention_mask"]
        if keep is not None and keep.all():
            keep = None
        if keep is not None and (keep[:, 1:] & ~keep[:, :-1]).any():
            raise NoSegmentsError("padding in front of tokens; pad on the right only")
        return Layout(keep, self._starts(), self.arguments.get("local_size"))

    def _starts(self) -> Tensor | None:
        """A document begins where a token does not see the one before it."""
        rows, length, rule = self.arguments["batch_size"], self.arguments["q_length"], self.arguments["mask_function"]
        index = torch.arange(length, device=self.arguments["device"])[None]
        row, before, after = torch.arange(rows, device=index.device)[:, None], index[:, :-1], index[:, 1:]
        # use_vmap: a rule of the architecture's own, which need not be a function of whole index tensors
        if self.arguments["use_vmap"] or rule(row, row[:1], before, after).any():
            raise NoSegmentsError("attention that is not causal alone; leave the flag out")
        starts = ~rule(row, row[:1], after, before).expand(rows, -1)
        return F.pad(starts, (1, 0), value=True).cpu() if starts.any() else None


def deferred_mask(**arguments: Any) -> DeferredMask:
    """The mask function that transformers calls, once in a forward pass for each kind of layer."""
    return DeferredMask(arguments)


# Segments as views of rows.

# Rows, heads and tokens of a (B, H, L, D) tensor.
Block = tuple[slice, slice, slice]


class Cut(torch.autograd.Function):
    """(B, H, L, D) -> views of blocks that cover it. Slices alone would add up whole gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.blocks = x.shape, blocks
        return tuple(x[block] for block in blocks)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return _join(ctx.shape, ctx.blocks, [g.transpose(1, 2) for g in gradients]).transpose(1, 2), None


class Join(torch.autograd.Function):
    """Blocks of (B, H, L, D), given as (b, l, h, D) -> (B, L, H, D), in one copy."""

    @staticmethod
    def forward(ctx, shape: Sequence[int], blocks: Sequence[Block], *parts: Tensor) -> Tensor:
        ctx.blocks = blocks
        return _join(shape, blocks, parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient[rows, tokens, heads] for rows, heads, tokens in ctx.blocks)


def _join(shape: Sequence[int], blocks: Sequence[Block], parts: Sequence[Tensor]) -> Tensor:
    rows, heads, length = shape[:3]
    out = parts[0].new_empty(rows, length, heads, parts[0].shape[-1])
    for (where, half, tokens), part in zip(blocks, parts, strict=True):
        out[where, tokens, half] = part
    return out


@dataclass
class Documents:
    """Where the documents of rows are, with all heads, in their order.

    blocks: a document each, or a run of documents of one token (as padding is); single says which are such runs.
    """

    blocks: list[Block]
    single: list[bool]


def find_documents(starts: Tensor) -> Documents:
    """The documents that begin where `starts` (B, L) says."""
    found = Documents([], [])
    for row, marks in enumerate(starts.tolist()):
        begins = [i for i, is_start in enumerate(marks) if is_start] + [len(marks)]
        for is_single, run in itertools.groupby(itertools.pairwise(begins), lambda ends: ends[1] - ends[0] == 1):
            spans = list(run)
            if is_single:
                spans = [(spans[0][0], spans[-1][1])]
            found.blocks += [(slice(row, row + 1), slice(None), slice(*span)) for span in spans]
            found.single += [is_single] * len(spans)
    return found


# Several documents a row: segments of all lengths are gathered, those of about one length go through SDPA as a batch.


@dataclass
class Reordering:
    """Rows of one tensor as rows of another: row i is the old row index[i], or zeros where i is in `empty`."""

    index: Tensor
    empty: Tensor


@dataclass
class Pieces:
    """Segments of documents, each padded on the right to one of a few sizes.

    shapes: (number of pieces, tokens of each) of what goes through SDPA in one call.
    from_tokens: (B * L, ...) -> the pieces' slots, (sum of number * tokens, ...).
    to_tokens: the way back.
    """

    shapes: list[tuple[int, int]]
    from_tokens: Reordering
    to_tokens: Reordering


def cut_into_pieces(starts: Tensor, group: int, shift: int, device: torch.device) -> Pieces:
    """The segments of documents that begin where `starts` (B, L) says, with further borders at shift + k * group."""
    starts = starts.flatten()
    index = torch.arange(len(starts))
    position = index - torch.where(starts, index, 0).cummax(0).values
    begins = ((position == 0) | ((position - shift) % group == 0)).nonzero().flatten()
    lengths = begins.diff(append=torch.tensor([len(starts)]))
    sizes = _size_ladder(group)[torch.bucketize(lengths, _size_ladder(group))]
    shapes, slots, real = [], [], []
    for size in sizes.unique().tolist():
        chosen = sizes == size
        within = torch.arange(size)
        shapes.append((int(chosen.sum()), size))
        slots.append((begins[chosen, None] + within).flatten())
        real.append((within < lengths[chosen, None]).flatten())
    token, is_real = torch.cat(slots), torch.cat(real)
    slot = torch.empty_like(index)
    slot[token[is_real]] = is_real.nonzero().flatten()
    empty = (~is_real).nonzero().flatten()
    return Pieces(
        shapes,
        Reordering(torch.where(is_real, token, 0).to(device), empty.to(device)),
        Reordering(slot.to(device), empty[:0].to(device)),
    )


def _size_ladder(group: int) -> Tensor:
    """1, 2, 3, ... 8, 10, 12, 14, 16, 20 ... group: a piece is padded by a quarter of its length at most."""
    steps = (size for k in range(group.bit_length()) for size in (4 * 2**k, 5 * 2**k, 6 * 2**k, 7 * 2**k))
    return torch.tensor(sorted({1, 2, 3} | {size for size in steps if size < group} | {group}))


class Reorder(torch.autograd.Function):
    """Rows of x in another order; `back` undoes `there`, so gradients are gathered and never added up."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Reordering, back: Reordering) -> Tensor:
        ctx.there, ctx.back = there, back
        return x.index_select(0, there.index).index_fill_(0, there.empty, 0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return Reorder.apply(gradient, ctx.back, ctx.there), None, None


def attend_pieces(pieces: Pieces, attend: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """Query, key and value of all tokens, (B * L, h, D) each -> (B * L, h, D)."""
    slots = [Reorder.apply(x, pieces.from_tokens, pieces.to_tokens) for x in tokens]
    counts = [number * size for number, size in pieces.shapes]
    outs = []
    for shape, *parts in zip(pieces.shapes, *(x.split(counts) for x in slots), strict=True):
        out = attend(*(x.unflatten(0, shape).transpose(1, 2) for x in parts))
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return Reorder.apply(torch.cat(outs), pieces.to_tokens, pieces.from_tokens)


# Attention inside segments.


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention of (N, h, S, D) and (N, kv, S, D) -> (N, h, S, D); a token sees at most `window` tokens."""
    repeats = query.shape[1] // key.shape[1]
    narrow = window if window is not None and window < query.shape[2] else None
    # without half precision, the kernels of accelerators that take fewer key heads build the whole matrix
    shares_heads = query.device.type == "cpu" or query.dtype != torch.float32
    if repeats > 1 and (narrow or not shares_heads):
        key, value, repeats = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), 1
    attend = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scale)
    if narrow:
        return _banded(query, key, value, narrow, attend)
    return attend(query, key, value, is_causal=True, enable_gqa=repeats > 1)


def _banded(query: Tensor, key: Tensor, value: Tensor, window: int, attend: Callable[..., Tensor]) -> Tensor:
    """Sliding-window attention in O(S * window): queries of a block see keys of it and of the last one."""
    number, _, length, _ = query.shape
    blocks = -(-length // window)
    q, k, v = (
        F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window)) for x in (query, key, value)
    )
    first = attend(q[:, :, 0], k[:, :, 0], v[:, :, 0], is_causal=True)
    pairs = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3) for x in (k, v))
    row, column = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    mask = (column > row) & (column <= row + window)
    rest = attend(*(x.transpose(1, 2).flatten(0, 1) for x in (q[:, :, 1:], *pairs)), attn_mask=mask)
    rest = rest.unflatten(0, (number, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :length]
