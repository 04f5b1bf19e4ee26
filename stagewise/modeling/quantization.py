"""Base models with 4-bit weights."""

from transformers import PreTrainedModel


def keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Called once after loading; models without 4-bit layers are left alone.

    On CPUs with AVX512-BF16 a Linear4bit of bitsandbytes repacks its weights at the first forward pass in eval mode,
    and every backward pass, merge or dequantization after that is silently wrong. The flag prevents the repacking.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
