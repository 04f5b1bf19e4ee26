"""Models whose parameters ZeRO-3 has shared out among processes: their shapes, and how to have them whole."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


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
