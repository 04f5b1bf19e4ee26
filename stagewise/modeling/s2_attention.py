"""S2-Attn (LongLoRA, arXiv 2309.12307): attention in groups of tokens, half of the heads shifted by half a group.

For a document of tokens 0 .. L-1, heads h = 0 .. H-1 and groups of g tokens, a query sees the keys before it, and
itself, in its own segment. Segments of the first H // 2 heads begin at 0, g, 2g, ..., those of the other heads at 0,
g/2, 3g/2, ..., so that each border of one half lies inside a segment of the other. The paper rolls the shifted half,
which lets the first tokens see the last ones; here nothing wraps around.

Documents of a packed row are counted each from its own start, so that a document trains as it would alone. A padding
token is in no document: its output is zeros. Training only: in eval mode and with a cache attention is what `sdpa`
makes of it.

No segment needs a mask: inside one, attention is plainly causal, and padding stands behind every real token. So memory
grows with L, and SDPA's fast kernels apply.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stagewise.errors import InputError

# Arguments with which architectures change the attention scores in a way that is not done here.
SCORE_CHANGES = ("softcap", "position_bias", "s_aux")


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
    obstacle = _obstacle(model)
    if obstacle:
        raise InputError(f"--shift_attn: {type(model).__name__} {obstacle}; leave the flag out, or use another model")
    # The group is in the name: a setting in the configuration would be saved with the model.
    name = "s2_attn" if group is None else f"s2_attn_{group}"
    AttentionInterface.register(name, functools.partial(s2_attention_forward, group=group))
    AttentionMaskInterface.register(name, deferred_mask)
    model.set_attn_implementation(name)


def _obstacle(model: PreTrainedModel) -> str | None:
    config = model.config
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return "does not take its attention from transformers' interface (Bloom, Falcon, GPT-J and others do not)"
    if not model._supports_sdpa or getattr(config, "attn_logit_softcapping", None):
        return "changes its attention scores in a way that the SDPA kernels cannot (soft-capping, sinks)"
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "has cross-attention, and S2-Attn is for decoders alone"
    if config.get_text_config() is not config:
        return "has an encoder beside the language model, and S2-Attn is for decoders alone"
    if getattr(config, "num_attention_heads", 2) < 2:
        return "has one attention head, and S2-Attn needs two to shift one of them"
    return None


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
    if not _trains(module, attention_mask, is_causal):
        full = attention_mask.full(query.device) if isinstance(attention_mask, DeferredMask) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, full, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    changes = [name for name in SCORE_CHANGES if kwargs.get(name) is not None]
    if changes or not isinstance(attention_mask, DeferredMask):
        found = f"{type(module).__name__} with {changes[0]}" if changes else "an attention mask made by the caller"
        raise InputError(f"--shift_attn: found {found}, which S2-Attn does not know; leave the flag out")
    return s2_attention(query, key, value, group, attention_mask.layout(), dropout, scaling), None


def _trains(module: nn.Module, mask: "DeferredMask | Tensor | None", is_causal: bool | None) -> bool:
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    has_cache = isinstance(mask, DeferredMask) and mask.has_cache
    return module.training and causal and not has_cache


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

    def pieces(self, group: int, shift: int, device: torch.device) -> "Pieces":
        """The segments of all documents; found once for all layers."""
        assert self.starts is not None
        key = (group, shift, device)
        if key not in self._pieces:
            self._pieces[key] = cut_into_pieces(self.starts, group, shift, device)
        return self._pieces[key]


@dataclass
class DeferredMask:
    """What transformers would build a mask from. The (L, L) mask itself is made in eval mode only.

    arguments: those of transformers' sdpa_mask.
    """

    arguments: dict[str, Any]
    _full: dict[torch.device, Tensor | None] = field(default_factory=dict)
    _layout: Layout | None = None

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
            InputError: padding that is not on the right, or tokens that see later ones.
        """
        if self._layout is None:
            keep = self.arguments["attention_mask"]
            if keep is not None and keep.all():
                keep = None
            if keep is not None and (keep[:, 1:] & ~keep[:, :-1]).any():
                raise InputError("--shift_attn: found padding in front of tokens; pad on the right only")
            self._layout = Layout(keep, self._starts(), self.arguments.get("local_size"))
        return self._layout

    def _starts(self) -> Tensor | None:
        """A document begins where a token does not see the one before it."""
        rows, length, rule = self.arguments["batch_size"], self.arguments["q_length"], self.arguments["mask_function"]
        index = torch.arange(length, device=self.arguments["device"])[None]
        row, before, after = torch.arange(rows, device=index.device)[:, None], index[:, :-1], index[:, 1:]
        # use_vmap: a rule of the architecture's own, which need not be a function of whole index tensors
        if self.arguments["use_vmap"] or rule(row, row[:1], before, after).any():
            raise InputError("--shift_attn: this architecture's attention is not causal alone; leave the flag out")
        starts = ~rule(row, row[:1], after, before).expand(rows, -1)
        return F.pad(starts, (1, 0), value=True).cpu() if starts.any() else None


def deferred_mask(**arguments: Any) -> DeferredMask:
    """The mask function that transformers calls, once in a forward pass for each kind of layer."""
    return DeferredMask(arguments)


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
    attend = functools.partial(_causal, dropout=dropout, scale=scale, window=layout.window)
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
    return Join.apply(blocks[0], *outs)


def _blocks(heads: int, length: int, group: int) -> Iterator[tuple[slice, slice]]:
    """(heads, tokens) of what is attended to in one call: whole groups together, a shorter segment at either end."""
    for half, shift in _halves(heads, group):
        shift = min(shift, length)
        whole = shift + (length - shift) // group * group
        for start, end in itertools.pairwise((0, shift, whole, length)):
            if start < end:
                yield half, slice(start, end)


def _as_batch(x: Tensor, group: int) -> Tensor:
    """(B, h, n * group, D) -> (B * n, h, group, D); a shorter segment as it is."""
    return x if x.shape[2] <= group else x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)


class Cut(torch.autograd.Function):
    """(B, H, L, D) -> views of blocks (heads, tokens) that cover it. Slices alone would add up whole gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, blocks: list[tuple[slice, slice]]) -> tuple[Tensor, ...]:
        ctx.blocks = blocks
        return tuple(x[:, heads, tokens] for heads, tokens in blocks)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return _join(ctx.blocks, [g.transpose(1, 2) for g in gradients]).transpose(1, 2), None


class Join(torch.autograd.Function):
    """Blocks (B, l, h, D), given as (heads, tokens) -> (B, L, H, D), in one copy."""

    @staticmethod
    def forward(ctx, blocks: list[tuple[slice, slice]], *parts: Tensor) -> Tensor:
        ctx.blocks = blocks
        return _join(blocks, parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient[:, tokens, heads] for heads, tokens in ctx.blocks)


def _join(blocks: Sequence[tuple[slice, slice]], parts: Sequence[Tensor]) -> Tensor:
    heads, length = blocks[-1][0].stop, blocks[-1][1].stop
    out = parts[0].new_empty(len(parts[0]), length, heads, parts[0].shape[-1])
    for (where, tokens), part in zip(blocks, parts, strict=True):
        out[:, tokens, where] = part
    return out


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
    """1, 2, 3, 4, 6, 8, 12, 16 ... group: a piece is padded by half its length at most."""
    steps = (size for k in range(group.bit_length()) for size in (2**k, 3 * 2**k // 2))
    return torch.tensor(sorted({size for size in steps if size < group} | {group}))


class Reorder(torch.autograd.Function):
    """Rows of x in another order; `back` undoes `there`, so gradients are gathered and never added up."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Reordering, back: Reordering) -> Tensor:
        ctx.there, ctx.back = there, back
        return x.index_select(0, there.index).index_fill_(0, there.empty, 0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return Reorder.apply(gradient, ctx.back, ctx.there), None, None


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
        outs.append(_attend_pieces(pieces, attend, *tokens))
    return torch.cat(outs, dim=1).unflatten(0, (len(query), -1))


def _attend_pieces(pieces: Pieces, attend: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """Query, key and value of all tokens, (B * L, h, D) each -> (B * L, h, D)."""
    slots = [Reorder.apply(x, pieces.from_tokens, pieces.to_tokens) for x in tokens]
    counts = [number * size for number, size in pieces.shapes]
    outs = []
    for shape, *parts in zip(pieces.shapes, *(x.split(counts) for x in slots), strict=True):
        out = attend(*(x.unflatten(0, shape).transpose(1, 2) for x in parts))
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return Reorder.apply(torch.cat(outs), pieces.to_tokens, pieces.from_tokens)


# Attention inside segments.


def _causal(
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
