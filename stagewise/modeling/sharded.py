"""Models whose parameters are shared out among processes: their shapes, how to have them whole, and soundness."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter; ZeRO-3 leaves nothing of it in place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(parameters: Iterable[nn.Parameter], changes: bool = False) -> AbstractContextManager:
    """The parameters whole on every process; every process has to come here.

    Args:
        changes: what the first process makes of them in the context is kept, for all.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(sharded, modifier_rank=0 if changes else None)


def settle_sharded(model: nn.Module) -> None:
    """Give all that is trained under ZeRO-3 one data type, the one of 16 bits; float32 copies are DeepSpeed's.

    Weights are loaded, and copied (modules_to_save), in the 16 bits of --bf16, and adapters are made in float32.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    halves = {parameter.dtype for parameter in trained} - {torch.float32}
    if is_deepspeed_zero3_enabled() and halves:
        for parameter in trained:
            parameter.data = parameter.data.to(*halves)


def gather_in_one_call(module: nn.Module) -> None:
    """Under ZeRO-3 the parameters of all modules inside of this one are whole while it is called.

    Otherwise each call of a module inside asks all processes for its parameters, and how often processes call it need
    not be equal: a head is used once for each chunk of the tokens that a process trains.
    """
    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_module

        set_z3_leaf_module(module, True)


def not_finite(model: nn.Module) -> list[str]:
    """The names of the parameters that hold a value which is not finite, in what this process has of them."""
    names = []
    for name, parameter in model.named_parameters():
        share = getattr(parameter, "ds_tensor", parameter).detach()
        if isinstance(share, DTensor):
            share = share.to_local()
        if share.is_floating_point() and not share.isfinite().all():
            names.append(name)
    return names
