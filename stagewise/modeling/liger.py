"""Liger's fused kernels (arXiv 2410.10989) for norms, rotary positions and feed-forward parts, beside our own loss."""

from importlib.util import find_spec

import torch

from stagewise.errors import InputError

# Their cross-entropy kernels replace a model's forward pass, and with it the loss that weighs tokens as a run wants.
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def liger_config(found: dict | None) -> dict:
    """What --liger_kernel_config has to be, without the kernels of the loss.

    Raises:
        InputError: the package or a GPU is missing, or a kernel of the loss is asked for.
    """
    found = dict(found or {})
    asked = [name for name in LOSSES if found.get(name)]
    if asked:
        raise InputError(
            f"--liger_kernel_config: found {asked[0]}; the loss here never holds whole logits either, and "
            "weighs tokens as the run wants; leave it out"
        )
    if find_spec("liger_kernel") is None:
        raise InputError("--use_liger_kernel: the package is not installed: pip install liger-kernel, or leave it out")
    if not torch.cuda.is_available():
        raise InputError("--use_liger_kernel: its kernels run on GPUs alone, and none is found; leave it out")
    return found | dict.fromkeys(LOSSES, False)


def require_liger(found: dict | None, model_type: str) -> None:
    """Raises InputError as liger_config, or where Liger has no kernels for the architecture (it would do nothing)."""
    liger_config(found)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"--use_liger_kernel: Liger has no kernels for {model_type}; leave it out")
