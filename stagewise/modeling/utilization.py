"""Model FLOPs utilization (MFU): what a model takes in theory, over what its devices could have done."""

from stagewise.modeling.model_shape import ModelShape


def flops_per_token(shape: ModelShape, scores: bool = False, reference: bool = False) -> float | None:
    """Operations of a training step for each token of its rows.

    A weight of a matrix takes 2 in the forward pass, 2 for the gradient of what comes in and 2 for its own: 6 N, as in
    PaLM (arXiv 2204.02311, appendix B). A frozen weight has no gradient of its own, so that an adapter of n weights on
    a base of N takes 4 N + 6 n, and a reference takes 2 N more. N counts linear layers and the head; looking up an
    embedding multiplies nothing. Attention's products are left out (PaLM's 12 L H Q T: what packed documents and
    windows leave of it differs from row to row), as is what checkpointing computes again; the figure is a lower bound.

    Args:
        scores: there is a score in place of the head.
        reference: a frozen model, or the base without its adapter, reads the same rows.

    Returns:
        None for a mixture of experts, of whose weights a token meets a part.
    """
    if shape.experts_per_token:
        return None
    head = 0 if scores else shape.vocab * shape.hidden
    matrices = shape.linear + head
    if not shape.adapter:
        training = 6 * matrices
    else:
        training = 4 * matrices + 6 * shape.adapter + (2 * head if shape.trainable_head else 0)
    return float(training + (2 * matrices if reference else 0))
