"""One row on several processes (Ulysses, arXiv 2309.14509): each has a part of the row's tokens, and in attention a
part of the heads.

What a decoder does to a token alone is done where the token is. Attention needs all tokens and no other head: before
it each process hands every other its tokens' share of the heads, and behind it gets its own tokens back. The loss of a
process is that of its tokens, so that the sum over the processes is the loss of the rows, and engines that average the
gradients of processes (DDP, ZeRO, FSDP) need not know of it.

accelerate's own way (its ParallelismConfig handed on to DeepSpeed) was tried and left: it drops every mask, so that
packed documents see each other under `sdpa` and windows are ignored; it evaluates whole rows; and it wants batches of
one size.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, TrainingArguments

from stagewise.arguments import ModelArguments
from stagewise.distributed import sequence_group
from stagewise.errors import InputError, first_line
from stagewise.modeling.document_attention import document_attention, document_attention_forward
from stagewise.modeling.experts import find_router_loss
from stagewise.modeling.segments import (
    SCORE_CHANGES,
    DeferredMask,
    Layout,
    deferred_mask,
    is_causal_without_cache,
    obstacle,
)
from stagewise.modeling.small_copy import on_small_copy

NAME = "sdpa_by_heads"
FLAG = "--parallelism_config"

# Whose frequencies depend on the largest position that a process sees.
GROWING_ROPE = ("dynamic", "longrope")
# Of hidden states, the largest |difference| over the largest |value|, on any device: TF32 rounds to 1e-3, and a token
# that sees what it should not, or not what it should, is off by far more.
TOLERANCE = 1e-2


class RowShards:
    """Cuts batches for this process, and knows of the attention function how the whole rows look.

    Args:
        group: the processes that share a row, in the order of its parts.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.is_cut = False  # whether the forward pass in hand, or the one whose gradients are, is of parts
        self._starts: Tensor | None = None
        self._layouts: dict[int | None, Layout] = {}

    def cut(self, inputs: dict[str, Any], per_token: Tensor, fill: int) -> tuple[dict[str, Any], Tensor]:
        """This process's part of a batch, and of what else there is for each of its tokens.

        Args:
            inputs: of a collator: input_ids (B, T), and attention_mask (B, T), 0 at padding on the right, or
                position_ids (B, T) that restart with each document. Other entries stay as they are.
            per_token: (B, T), and what to fill it up with.

        Returns:
            Inputs with (B, ceil(T / size)) input_ids and position_ids, no mask: what pads a row stands behind it, and
            no token sees what is behind it. And per_token, cut alike.
        """
        inputs = dict(inputs)
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        inputs.pop("attention_mask", None)
        rows, length = ids.shape
        missing = -length % self.size
        starts = None if positions is None else F.pad(positions == 0, (0, missing), value=True).cpu()
        if positions is None:
            positions = torch.arange(length, device=ids.device).expand(rows, -1)
        self.is_cut, self._starts, self._layouts = True, starts, {}
        share = (length + missing) // self.size
        here = slice(self.rank * share, (self.rank + 1) * share)
        inputs["input_ids"], inputs["position_ids"] = (F.pad(x, (0, missing))[:, here] for x in (ids, positions))
        return inputs, F.pad(per_token, (0, missing), value=fill)[:, here]

    def leave_whole(self) -> None:
        """The next forward passes are of whole rows, each process's own."""
        self.is_cut, self._starts, self._layouts = False, None, {}

    def layout(self, window: int | None) -> Layout:
        """Of whole rows, for layers whose tokens see `window` tokens; found once for all layers."""
        if window not in self._layouts:
            self._layouts[window] = Layout(starts=self._starts, window=window)
        return self._layouts[window]

    def batches(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The batches of all processes of the group, where each has rows of its own, in the order of their ranks."""
        device = inputs["input_ids"].device
        found: list = [None] * self.size
        on_host = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        dist.all_gather_object(found, on_host, group=self.group)
        return [{name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()} for batch in found]

    def total(self, part: Tensor) -> Tensor:
        """The sum over the group, on each of its processes."""
        dist.all_reduce(part, group=self.group)
        return part


@contextmanager
def sharing_rows(accelerator: Accelerator, shards: RowShards | None) -> Iterator[None]:
    """Within it accelerate prepares data loaders that give the processes of a group the same batches, and each group
    its own, as if a group were one process.
    """
    if shards is None:
        yield
        return

    def prepare(loader: DataLoader, device_placement: bool | None = None, **kwargs: Any) -> DataLoader:
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=accelerator.num_processes // shards.size,
            process_index=accelerator.process_index // shards.size,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=accelerator.rng_types.copy(),
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )

    accelerator.prepare_data_loader = prepare
    try:
        yield
    finally:
        del accelerator.prepare_data_loader


class _Exchange(torch.autograd.Function):
    """Cuts dimension `split` into a part for each process, and joins what comes from them on dimension `join`."""

    @staticmethod
    def forward(ctx, x: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.split, ctx.join, ctx.group = split, join, group
        parts = torch.stack(x.chunk(dist.get_world_size(group), split))
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=group)
        return torch.cat(found.unbind(), join)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradient, ctx.join, ctx.split, ctx.group), None, None, None


def _attention_by_heads(shards: RowShards) -> Any:
    """An attention function as transformers calls it, of this process's tokens: query (B, H, t, D), key and value
    (B, KV, t, D) -> (B, t, H, D).
    """

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if not shards.is_cut:
            return document_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        changed = [name for name in SCORE_CHANGES if kwargs.get(name) is not None]
        is_told = isinstance(attention_mask, DeferredMask)
        if changed or not is_told or not is_causal_without_cache(module, attention_mask, is_causal):
            raise NotImplementedError("attention that is not causal alone" + ", or has ".join(["", *changed]))
        if key.shape[1] % shards.size:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        query, key, value = (_Exchange.apply(x, 1, 2, shards.group) for x in (query, key, value))
        layout = shards.layout(attention_mask.arguments.get("local_size"))
        out = document_attention(query, key, value, layout, dropout, scaling)
        return _Exchange.apply(out, 1, 2, shards.group), None

    return forward


def enable_sequence_parallel(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Have the forward passes with labels (see stagewise.modeling.token_loss) compute this process's part of the rows,
    which all processes of its group call with the same batch.

    Args:
        model: a causal LM, not yet wrapped by peft.
        args: its sp_size is how many processes share a row.

    Raises:
        InputError: parts of rows, by a small copy of the model on the device of training, are not those of whole rows.
    """
    shards = RowShards(sequence_group(args.sp_size))
    AttentionInterface.register(NAME, _attention_by_heads(shards))
    AttentionMaskInterface.register(NAME, deferred_mask)
    name = type(model).__name__
    try:
        difference = on_small_copy(model, NAME, lambda copy: _compare(copy.to(args.device), shards))
    except Exception as error:  # of the architecture's own code
        raise InputError(
            f"{FLAG}: whether several processes can share rows of {name} could not be tried "
            f"({type(error).__name__}: {first_line(error)}); leave it out"
        ) from error
    finally:
        shards.leave_whole()
    if not difference <= TOLERANCE:
        raise InputError(
            f"{FLAG}: {name} computes other things of the parts of a row than of the whole (hidden states differ by "
            f"{difference:.1%}); leave it out"
        )
    model.set_attn_implementation(NAME)
    model.row_shards = shards


def shards_of(model: nn.Module) -> RowShards | None:
    """What enable_sequence_parallel gave a model; None where rows are whole."""
    return vars(model).get("row_shards")


@torch.no_grad()
def _compare(model: PreTrainedModel, shards: RowShards) -> float:
    """How far hidden states of parts of rows are from those of whole ones, on any process; packed rows and others."""
    generator = torch.Generator().manual_seed(0)
    length = 12 * shards.size + 1
    shape, vocabulary = (2, length), model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, shape, generator=generator).to(model.device)
    positions = torch.arange(length, device=model.device).expand(shape)
    worst = []
    for inputs in ({}, {"position_ids": positions % 10}):
        shards.leave_whole()
        whole = _hidden(model, {"input_ids": ids, **inputs})
        cut, where = shards.cut({"input_ids": ids, **inputs}, positions, -1)
        part = _hidden(model, cut)
        real = where >= 0
        wanted = whole.gather(1, where.clamp(min=0)[..., None].expand_as(part))
        worst.append(((part - wanted)[real].abs().amax() if real.any() else part.new_zeros(())) / whole.abs().max())
    found = torch.stack(worst).float().amax().nan_to_num(math.inf)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=shards.group)
    return found.item()


def _hidden(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state.float()


def check_shards(model: PreTrainedModel, size: int, args: ModelArguments) -> None:
    """Raises InputError for a model whose rows cannot be on `size` processes each, and for kernels and options that
    would not know of it.

    Args:
        model: also one without weights.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    kernel = model.config._attn_implementation
    problem = obstacle(model)
    if problem is not None:
        raise InputError(f"{FLAG}: {name} {problem}; leave it out")
    if kernel != "sdpa":
        raise InputError(
            f"{FLAG}: parts of rows were never shown right with the attention kernel {kernel}; leave "
            f"{args.kernel_flag if args.kernel else '--attn_implementation'} out: PyTorch's own kernels (sdpa) are "
            "used then"
        )
    if args.shift_attn:
        raise InputError(f"{FLAG}: --shift_attn cuts rows into groups of its own; give one of the two")
    if args.router_aux_loss_coef or find_router_loss(model, args.router_aux_loss_coef) is not None:
        raise InputError(
            f"{FLAG}: the load balance of {name}'s experts is a mean over whole rows, which no process has; pass "
            "--router_aux_loss_coef 0"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{FLAG}: {name} takes no position_ids, so no part could know its place; leave it out")
    heads = config.num_attention_heads
    if heads % size:
        fits = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0) or "none"
        raise InputError(
            f"{FLAG}: sp_size {size} does not divide the {heads} attention heads of {name}; take one of {fits}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    growing = next((part["rope_type"] for part in parts if part.get("rope_type") in GROWING_ROPE), None)
    if growing:
        raise InputError(
            f"{FLAG}: RoPE {growing} takes its frequencies from the length of a row, which no process sees; pass "
            "--rope_scaling yarn (or linear), or leave it out"
        )
    kinds = getattr(config, "layer_types", None) or ()
    odd = next((kind for kind in kinds if kind not in ("full_attention", "sliding_attention")), None)
    if odd:
        raise InputError(f"{FLAG}: {name} has layers of {odd}, which mix tokens in another way; leave it out")
