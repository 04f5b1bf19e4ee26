"""Proximal policy optimization for language models, as tensors in and tensors out.

All tensors are (B, T): B completions of up to T tokens, aligned at their first token. `mask` is 1 (True) at the tokens
that were sampled, the stop token among them, and 0 at the padding behind them, where all other tensors are finite;
every row has a token. Time step t is the choice of token t, so values[:, t] is the expected return before that token
is chosen. Log-probabilities are float32.

Sources: PPO, arXiv 1707.06347; generalized advantage estimation (GAE), arXiv 1506.02438; the KL penalty and its
controller, arXiv 1909.08593; the estimators of KL, http://joschu.net/blog/kl-approx.html.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k3")


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """sum(values * mask) / count, a scalar.

    Args:
        count: what to divide by; the sum of `mask` if None. A part of a larger batch gives the number of tokens of
            the whole, so that the parts' results add up to the whole's mean.
    """
    return (values * mask).sum() / (mask.sum() if count is None else count)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8) over the tokens of the mask, 0 elsewhere; the variance is the unbiased one.

    With `shift_mean` False the mean is added again: only the scale changes. A single token becomes 0, or its mean.
    """
    mean = masked_mean(values, mask)
    variance = ((values - mean).square() * mask).sum() / (mask.sum() - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def kl_estimates(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Literal["k1", "k3"] = "k1"
) -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens that the policy sampled, 0 outside the mask.

        k1 = log pi(a) - log ref(a)               unbiased, may be negative
        k3 = ref(a)/pi(a) - 1 - log(ref(a)/pi(a))    unbiased, never negative

    Args:
        logprobs, ref_logprobs: (B, T), of the sampled tokens under policy and reference.
    """
    log_ratio = ((ref_logprobs - logprobs) * mask).float()
    return (-log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio) * mask


def shape_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, score_index: Tensor | None = None
) -> Tensor:
    """Rewards of each token, (B, T): -kl_coef * kl, and the row's score added at its last token.

    Args:
        scores: (B,), one for each completion.
        kl: (B, T), as kl_estimates gives them.
        score_index: (B,), the time step that gets the score, if not the row's last token. (trl's PPO puts it on the
            first padding position, a state of its own behind the stop token.)
    """
    last = mask.long().sum(1) - 1 if score_index is None else score_index
    rewards = -kl_coef * kl * mask
    return rewards.scatter_add(1, last[:, None], scores.to(rewards.dtype)[:, None])


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE: (advantages, returns), (B, T) each, 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t        V = 0 behind the last token
    A_t     = delta_t + gamma lam A_{t+1}
    R_t     = A_t + V_t
    """
    mask = mask.to(values.dtype)
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


@dataclass(frozen=True)
class LossStatistics:
    """What a clipped loss did, as detached scalars: sums over the tokens divided by the same count as the loss.

    clipfrac: the share of tokens where the clipped term was the larger one.
    approx_kl: mean of (log pi - log pi_old)^2 / 2; ratio: mean of pi / pi_old (both 0 for the value loss).
    """

    clipfrac: Tensor
    approx_kl: Tensor
    ratio: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    count: Tensor | float | None = None,
) -> tuple[Tensor, LossStatistics]:
    """Clipped surrogate of PPO, a masked mean: max(-A r, -A clip(r, 1 - c, 1 + c)) with r = pi / pi_old.

    Args:
        logprobs: (B, T), of the sampled tokens under the policy that is trained; gradients flow through it.
        old_logprobs: (B, T), of the same tokens when they were sampled.
        advantages: (B, T), without gradients.
        count: see masked_mean.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(torch.maximum(plain, clipped), mask, count)
    with torch.no_grad():
        statistics = LossStatistics(
            clipfrac=masked_mean((clipped > plain).to(loss.dtype), mask, count),
            approx_kl=masked_mean(0.5 * log_ratio.square(), mask, count),
            ratio=masked_mean(ratio, mask, count),
        )
    return loss, statistics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
    count: Tensor | float | None = None,
) -> tuple[Tensor, LossStatistics]:
    """Clipped squared error, a masked mean: max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2.

    Args:
        values: (B, T), of the value model that is trained; gradients flow through it.
        old_values: (B, T), from when the completions were sampled.
        returns: (B, T), as generalized_advantages gives them.
        count: see masked_mean.
    """
    near = torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask, count)
    with torch.no_grad():
        clipfrac = masked_mean((clipped > plain).to(loss.dtype), mask, count)
    zero = torch.zeros_like(clipfrac)
    return loss, LossStatistics(clipfrac=clipfrac, approx_kl=zero, ratio=zero)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the tokens of the mask; 1 is a perfect value model, 0 one that knows the mean.

    NaN where all returns are equal, up to the rounding of their sums in float32.
    """
    kept = mask.bool()
    error, target = (returns - values)[kept], returns[kept]
    variance = target.var(correction=0)
    noise = (1e-5 * target.abs().max()).square()
    return torch.where(variance > noise, 1 - error.var(correction=0) / variance, torch.full_like(variance, torch.nan))


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The coefficient for the next iteration, moved so that the KL nears `target` (arXiv 1909.08593, section 2.2).

        e = clip(kl / target - 1, -0.2, 0.2);  kl_coef * (1 + e * episodes / horizon)

    Args:
        kl: mean over the completions of this iteration, each summed over its tokens.
        episodes: how many completions that were.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
