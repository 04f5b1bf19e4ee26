"""The attention kernel: whether the one that is asked for can run, and proof that it keeps packed documents apart."""

import inspect
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.hub_kernels import is_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

from stagewise.arguments import ModelArguments
from stagewise.errors import InputError, first_line
from stagewise.modeling.document_attention import enable_document_attention
from stagewise.modeling.s2_attention import enable_s2_attention
from stagewise.modeling.sequence_parallel import enable_sequence_parallel
from stagewise.modeling.small_copy import on_small_copy

logger = logging.getLogger(__name__)

# Largest |difference| of logits over the largest |logit|: rounding of the data type, far below any leak.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Lengths of the documents of two rows, the second of which has padding.
PACKED = ((20, 12, 1), (9, 15))
# What of a collator's batch is the model's.
INPUTS = (
    "input_ids", "position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
)  # fmt: skip


def is_flash(kernel: str | None) -> bool:
    """Whether a kernel works as FlashAttention does, under whatever name.

    transformers hands such a one no mask but that of padding, so that it has to be told the borders of documents, and
    numbers of 16 bits. It knows a kernel from the hub once a model was made with it.
    """
    return kernel is not None and ALL_MASK_ATTENTION_FUNCTIONS.get(kernel) is flash_attention_mask


def require_flash_attention(kernel: str, flag: str = "--flash_attn") -> None:
    """Raise InputError with the remedy unless FlashAttention can run here: a GPU that it knows, and its package.

    Of kernels from the hub transformers says itself what they need, when a model is made with one.

    flag: what asks for it.
    """
    if is_kernel(kernel):
        return
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


def settle_attention(model: PreTrainedModel, model_args: ModelArguments, args: TrainingArguments) -> None:
    """What PT and SFT compute attention with: rows by heads where several processes share them, S2-Attn where it is
    asked for, else `sdpa` document by document; nothing else under torch.compile, for which batches cut into documents
    would be new shapes time and again.

    Args:
        model: a causal LM, not yet wrapped by peft.

    Raises:
        InputError: as enable_sequence_parallel and enable_s2_attention.
    """
    if args.sp_size > 1:
        enable_sequence_parallel(model, args)
    elif model_args.shift_attn:
        enable_s2_attention(model, model_args.shift_attn_group)
    elif not args.torch_compile:
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


def check_packing(model: PreTrainedModel, collate: Callable[[list[dict]], dict[str, Any]], args: TrainingArguments):
    """Compare the logits of two rows of packed documents with those of each document alone, by a small copy of the
    model: with its kernel, on the device and in the precision of training, and with what the run's collator says
    about documents.

    Args:
        model: a causal LM, as loaded; it is not run.
        collate: the collator of packed rows.

    Returns:
        The largest difference relative to the largest logit.

    Raises:
        InputError: packed documents see each other (the architecture takes no position_ids, as Bloom, or its
            attention ignores them), or a small copy cannot show that they do not.
    """
    kernel, name = model.config._attn_implementation, type(model).__name__
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype

    def compare(copy: PreTrainedModel) -> tuple[float, float]:
        copy.to(args.device, model.dtype)
        with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
            return _compare_packed(copy, collate)

    try:
        difference, joined = on_small_copy(model, kernel, compare)
    except Exception as error:  # of the architecture's own code, or of the kernel
        raise InputError(
            f"--packing: whether {name} keeps packed documents apart could not be tried with {kernel} "
            f"({type(error).__name__}: {first_line(error)}); use another --attn_implementation, or --packing False"
        ) from error
    tolerance = TOLERANCE.get(dtype, 5e-2)
    if not difference <= tolerance:
        raise InputError(
            f"--packing: {name} does not keep packed documents apart (logits differ by {difference:.1%} with {kernel})"
            "; use --packing False"
        )
    if not joined > 2 * tolerance:
        raise InputError(
            f"--packing: {name} cannot be shown to keep packed documents apart (even documents that see each other "
            f"differ by {joined:.1%} alone); use --packing False"
        )
    return difference


@torch.no_grad()
def _compare_packed(model: PreTrainedModel, collate: Callable[[list[dict]], dict[str, Any]]) -> tuple[float, float]:
    """How far logits of packed documents are from those of each alone, and those of documents joined on purpose."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    rows = [[torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths] for lengths in PACKED]
    batch = collate([{"input_ids": torch.cat(row), "seq_lengths": [len(ids) for ids in row]} for row in rows])
    inputs = {name: batch[name] for name in batch if name in INPUTS}

    def logits(**inputs: Any) -> Tensor:
        there = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        return model(**there, use_cache=False).logits.float()

    def beside(row: list[Tensor], found: Tensor) -> float:
        wanted = torch.cat([logits(input_ids=ids[None])[0] for ids in row])
        return ((found[: len(wanted)] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()

    packed = logits(**inputs)
    joined = [logits(input_ids=torch.cat(row)[None])[0] for row in rows]
    differences = [beside(row, found) for row, found in zip(rows, packed, strict=True)]
    # max() would pass over a nan
    return float(np.max(differences)), min(beside(row, found) for row, found in zip(rows, joined, strict=True))
