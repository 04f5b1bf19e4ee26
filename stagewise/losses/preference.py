"""Losses that learn from pairs of answers, the better one first."""

import torch.nn.functional as F
from torch import Tensor


def pairwise_reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    center_coefficient: float = 0.0,
    num_pairs: Tensor | int | None = None,
) -> Tensor:
    """The negative log-likelihood of a Bradley-Terry model that the chosen answer wins, by a margin.

        loss = mean_i [ -log sigmoid(r_c - r_r - m) + center_coefficient * (r_c + r_r)^2 ]

    The margin m is that of Llama 2 (arXiv 2307.09288, equation 2). Only differences of scores count in the first term;
    the second one (arXiv 2312.09244) keeps the scores of a pair around 0.

    Args:
        chosen_scores, rejected_scores: r_c and r_r, (B,).
        margin: m, (B,); None is 0.
        num_pairs: what the sum over pairs is divided by, B when None; with the pairs of the whole accumulated batch
            the gradient does not depend on how that batch is cut.

    Returns:
        A scalar.
    """
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - margin
    losses = -F.logsigmoid(difference)
    if center_coefficient:
        losses = losses + center_coefficient * (chosen_scores + rejected_scores).square()
    return losses.sum() / (len(losses) if num_pairs is None else num_pairs)
