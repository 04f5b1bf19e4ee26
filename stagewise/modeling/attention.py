"""Proof, on the model in hand, that packed documents do not see each other."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from stagewise.errors import InputError
from stagewise.modeling.quantization import multiplied_in

# Largest |difference| of logits over the largest |logit|: rounding of the data type, far below any leak.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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
