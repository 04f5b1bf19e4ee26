"""An accelerator that is not there: tensors that carry its mark, and compute on the CPU.

Within `Accelerator()` the device ACCELERATOR ("cuda:0") can be asked for as any other. What is on it has numbers like
any tensor, so that masks, .item() and the like work; an operation, forward or backward, that mixes it with a tensor of
the CPU raises MixedDevicesError. Stricter than CUDA in one thing: an index tensor of the CPU, which CUDA would copy,
and wait for, is refused too. Only single numbers (tensors without dimensions) may be mixed, as there.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

ACCELERATOR = torch.device("cuda", 0)


class MixedDevicesError(AssertionError):
    """Tensors of two devices in one operation."""


class OnAccelerator(Tensor):
    """A tensor with the mark. For torch's own code it is a "meta" one, which needs no library of a device."""

    @staticmethod
    def __new__(cls, numbers: Tensor, requires_grad: bool = False):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device="meta", requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, numbers: Tensor, requires_grad: bool = False):
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return ACCELERATOR

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnAccelerator({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, Tensor) and not isinstance(x, OnAccelerator) and x.dim() > 0:
                raise MixedDevicesError(f"{func}: a tensor of {tuple(x.shape)} on {x.device} beside the accelerator's")
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        inside, outside = _numbers(args), _numbers(kwargs)
        out = tree_map_only(Tensor, OnAccelerator, func(*inside, **outside))
        return return_and_correct_aliasing(func, args, kwargs, out)


def _numbers(x: Any) -> Any:
    return tree_map_only(OnAccelerator, lambda tensor: tensor.numbers, x)


class Inside(TorchDispatchMode):
    """What torch itself makes for tensors of the accelerator, on the device that it takes them to be on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        made = not any(isinstance(x, Tensor) for x in tree_flatten((args, kwargs))[0])
        if made and kwargs.get("device") == torch.device("meta"):
            return tree_map_only(Tensor, OnAccelerator, func(*args, **{**kwargs, "device": torch.device("cpu")}))
        return func(*args, **kwargs)


class Accelerator(TorchFunctionMode):
    """Within it, what is asked for on ACCELERATOR, or moved there, has the mark.

    Args:
        loads: models are loaded, which transformers does by way of the device "meta"; a few operations, which would
            make constants there, are not possible then.
    """

    def __init__(self, loads: bool = False):
        super().__init__()
        self.inside = nullcontext() if loads else Inside()

    def __enter__(self):
        self.inside.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.inside.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            return _backward(*args)
        if func is F.scaled_dot_product_attention and isinstance(args[0], OnAccelerator):
            return _attention(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.numpy, Tensor.tolist):
            return self._move(func, args, kwargs)
        if _is_accelerator(kwargs.get("device")):
            marked = any(isinstance(x, OnAccelerator) for x in tree_flatten(args)[0])
            if not marked:  # made there
                gradient = kwargs.pop("requires_grad", False)
                return OnAccelerator(func(*args, **{**kwargs, "device": "cpu"}), gradient)
            kwargs.pop("device")
        return func(*args, **kwargs)

    def _move(self, func, args, kwargs):
        x, *rest = args
        if func in (Tensor.numpy, Tensor.tolist):
            if func is Tensor.numpy and isinstance(x, OnAccelerator):
                raise TypeError("can't convert a tensor of the accelerator to numpy; use Tensor.cpu() first")
            return func(_numbers(x), *rest, **kwargs)
        if func is Tensor.to:
            device, dtype = _target(*rest, **kwargs)
        else:
            device, dtype = (torch.device("cpu") if func is Tensor.cpu else ACCELERATOR), None
        if not isinstance(x, OnAccelerator) and not _is_accelerator(device):
            return func(*args, **kwargs)
        x = x if dtype in (None, x.dtype) else x.type(dtype)
        there, here = _is_accelerator(device or x.device), isinstance(x, OnAccelerator)
        if there == here:
            return x
        return OnAccelerator(x.detach(), x.requires_grad) if there else x.detach().numbers.clone()


def _backward(loss: Tensor) -> None:
    """As loss.backward(), which would turn the mode off, and backward passes are Python in part."""
    with Accelerator(loads=True):
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """What torch computes inside itself, where it would make masks on the device "meta"."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = OnAccelerator(torch.ones(scores.shape[-2:], dtype=torch.bool).tril())
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def _target(*args, copy: bool = False, **kwargs) -> tuple[torch.device | None, torch.dtype | None]:
    """What Tensor.to is asked for."""
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        return other.device, other.dtype
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype


def _is_accelerator(device: torch.device | str | int | None) -> bool:
    return device is not None and torch.device(device).type == ACCELERATOR.type
