"""Single modules in float32 inside a model of 16 bits."""

import functools
import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)


def hold_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the module's weights float32; around it the data type stays `dtype`."""
    module.float()
    module.register_forward_pre_hook(_input_in_own_dtype)
    module.register_forward_hook(functools.partial(_output_in_dtype, dtype))


def upcast_norms(model: nn.Module) -> int:
    """--upcast_layernorm: normalise in float32, weights too, and round once, at the end; how many norms that are.

    A norm is a module whose class says so and whose parameters are vectors: LayerNorm, LlamaRMSNorm, ...
    """
    count = 0
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        is_norm = "norm" in type(module).__name__.lower() and all(p.dim() == 1 for p in parameters)
        if is_norm and parameters and parameters[0].dtype in HALVES:
            hold_in_float32(module, parameters[0].dtype)
            count += 1
    logger.info("--upcast_layernorm: %d norms are in float32 now", count)
    return count


def _input_in_own_dtype(module: nn.Module, inputs: tuple) -> tuple:
    dtype = next(module.parameters()).dtype  # DeepSpeed may have changed it, and keeps float32 copies itself
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def _output_in_dtype(dtype: torch.dtype, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)
