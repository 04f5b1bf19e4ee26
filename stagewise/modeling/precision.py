"""Numbers that do not get lost: single modules in float32 inside a model of 16 bits, derivatives that are finite."""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)


def hold_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the module's weights float32; around it the data type stays `dtype`."""
    module.float()
    module.register_forward_pre_hook(_input_in_own_dtype)
    module.register_forward_hook(functools.partial(_output_in_dtype, dtype))


class Float32Linear(nn.Linear):
    """A linear layer that multiplies in float32, whatever its weights and inputs are in and whether autocast is on.

    What it gives is a score, or a value, that others are subtracted from: of bf16's eight bits little would be left.
    DeepSpeed rounds all weights of a model to 16 bits, this layer's too, and keeps float32 copies of what it trains.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def multiply_in_float32(module: nn.Module) -> None:
    """Make every plain linear layer of the module one that multiplies in float32."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Float32Linear


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


def keep_padding_off_zero(model: nn.Module) -> None:
    """Gemma 3n only: let its last norm not be taken of zeros, where the derivative of a root is infinite.

    A padding token that sees no other one (in packed rows, in S2-Attn's groups) is zero from the embedding on, where
    that has zeros for it. Its gradient, which is zero as well, would make all others NaN.
    """
    for module in model.modules():
        if hasattr(module, "altup_unembed_projections"):
            module.layers[-1].register_forward_hook(_off_zero)


def _off_zero(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return torch.where((output == 0).all(-1, keepdim=True), 1.0, output)


def _input_in_own_dtype(module: nn.Module, inputs: tuple) -> tuple:
    dtype = next(module.parameters()).dtype  # DeepSpeed may have changed it, and keeps float32 copies itself
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def _output_in_dtype(dtype: torch.dtype, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)
