"""The attention kernel: whether the one that is asked for can run, and proof that it keeps packed documents apart."""

import inspect
import logging
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from stagewise.arguments import ModelArguments
from stagewise.errors import InputError
from stagewise.modeling.document_attention import enable_document_attention
from stagewise.modeling.quantization import multiplied_in
from stagewise.modeling.s2_attention import enable_s2_attention
from stagewise.modeling.sharded import module_by_module

logger = logging.getLogger(__name__)

# Largest |difference| of logits over the largest |logit|: rounding of the data type, far below any leak.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def is_flash(kernel: str | None) -> bool:
    return bool(kernel) and str(kernel).startswith("flash_attention")


def require_flash_attention(kernel: str, flag: str = "--flash_attn") -> None:
    """Raise InputError with the remedy unless FlashAttention can run here: a GPU that it knows, and its package.

    flag: what asks for it.
    """
    otherwise = f"or leave {flag} out: PyTorch's own kernels (sdpa) are used then"
    if not torch.cuda.is_available():
        raise InputError(f"{flag}: {kernel} runs on GPUs alone, and none is found; use one, {otherwise}")
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        raise InputError(
            f"{flag}: {kernel} needs compute capability 8.0 (Ampere) or newer, and "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; use another GPU, {otherwise}"
        )
    if kernel == "flash_attention_2" and find_spec("flash_attn") is None:
        raise InputError(
            f"{flag}: the package flash-attn is not installed: pip install --no-build-isolation -r "
            f"requirements-flash-attn.txt, {otherwise}"
        )


def settle_attention(model: PreTrainedModel, args: ModelArguments, compiled: bool) -> None:
    """What PT and SFT compute attention with: S2-Attn where it is asked for, else `sdpa` document by document.

    Args:
        model: a causal LM, not yet wrapped by peft.
        compiled: torch.compile is on, for which batches cut into documents would be new shapes time and again.

    Raises:
        InputError: as enable_s2_attention.
    """
    if args.shift_attn:
        enable_s2_attention(model, args.shift_attn_group)
    elif not compiled:
        enable_document_attention(model)


def check_kernel(model: nn.Module, autocast: bool) -> None:
    """Log the kernel that the model uses.

    Args:
        autocast: training multiplies in 16 bits (--bf16, --fp16).

    Raises:
        InputError: it is FlashAttention, which has no kernels for float32, and weights and products are in it.
    """
    kernel = model.config._attn_implementation
    logger.info("attention kernel: %s", kernel)
    if is_flash(kernel):
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        require_16_bits(kernel, dtype, autocast)


def require_16_bits(kernel: str, dtype: torch.dtype, autocast: bool) -> None:
    """Raises InputError where FlashAttention would get float32: dtype is that of the weights; see check_kernel."""
    if dtype == torch.float32 and not autocast:
        raise InputError(
            f"--flash_attn: {kernel} takes numbers of 16 bits, and the weights are float32; add --bf16 True (or, for "
            "an adapter, --dtype bfloat16)"
        )


def require_position_ids(model: PreTrainedModel) -> None:
    """Raises InputError for an architecture that cannot be told where a packed document begins."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"--packing: {type(model).__name__} takes no position_ids, so it could not keep packed documents apart; "
            "use --packing False"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, documents: Sequence[Sequence[int]], max_tokens: int = 64) -> float:
    """Compare the logits of packed documents with those of each document alone.

    Args:
        model: a causal LM, as loaded.
        documents: token ids; two are enough, each is used up to `max_tokens`.

    Returns:
        The largest difference relative to the largest logit.

    Raises:
        InputError: the architecture lets packed documents see each other (it takes no position_ids, as Bloom, or its
            attention ignores them).
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        return 0.0
    pieces = [torch.as_tensor(ids[:max_tokens], device=device) for ids in documents]
    if len(pieces) == 1:  # nothing to keep apart in this row: pack the document with itself
        pieces *= 2
    was_training = model.training
    model.eval()
    try:
        with module_by_module(model):
            alone = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in pieces]).float()
            packed = model(
                input_ids=torch.cat(pieces)[None],
                position_ids=torch.cat([torch.arange(len(ids), device=device) for ids in pieces])[None],
                use_cache=False,
            ).logits[0]
    finally:
        model.train(was_training)
    difference = ((packed.float() - alone).abs().max() / alone.abs().max().clamp(min=1e-6)).item()
    if difference > max(TOLERANCE.get(dtype, 5e-2) for dtype in (model.dtype, multiplied_in(model))):
        raise InputError(
            f"--packing: {type(model).__name__} does not keep packed documents apart (logits differ by "
            f"{difference:.1%}); use --packing False"
        )
    return difference
