"""PPO's losses: worked by hand, indifferent to padding, and equal to trl 1.12's PPO trainer.

trl's numbers are in fixtures/trl_ppo.json; fixtures/make_trl_ppo.py made them with its real training loop.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from stagewise.losses.policy_gradient import (
    KL_ESTIMATORS,
    adapt_kl_coef,
    explained_variance,
    generalized_advantages,
    kl_estimates,
    masked_mean,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)

TRL = json.loads((Path(__file__).parent / "fixtures" / "trl_ppo.json").read_text())["cases"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LN2 = math.log(2)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers])


def ones(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, dtype=torch.bool)


# Means and whitening


def test_masked_mean_divides_by_the_tokens_of_the_mask_or_by_the_count():
    values, mask = row(1.0, 2.0, 6.0, 100.0), row(1, 1, 1, 0)
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask.bool(), count=18).item() == 0.5


def test_whiten_by_hand():
    # Mean 3; unbiased variance (4 + 1 + 9) / 2 = 7.
    values, mask = row(1.0, 2.0, 6.0, 100.0), row(1, 1, 1, 0)
    scale = 1 / math.sqrt(7)
    assert_close(whiten(values, mask), row(-2 * scale, -scale, 3 * scale, 0.0))
    assert_close(whiten(values, mask, shift_mean=False), row(3 - 2 * scale, 3 - scale, 3 + 3 * scale, 0.0))


def test_whiten_gives_mean_0_and_unbiased_variance_1():
    generator = torch.Generator().manual_seed(0)
    values = 7 + 3 * torch.randn(5, 9, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [7], [2]])
    white = whiten(values, mask)[mask]
    assert_close(white.mean().item(), 0.0, rtol=0, atol=1e-6)
    assert_close(white.var(correction=1).item(), 1.0)
    scaled = whiten(values, mask, shift_mean=False)[mask]
    assert_close(scaled.mean(), values[mask].mean())
    assert_close(scaled.var(correction=1).item(), 1.0)


def test_whiten_of_a_single_token_is_finite():
    values, mask = row(5.0, 100.0), row(1, 0)
    assert whiten(values, mask).tolist() == [[0.0, 0.0]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[5.0, 0.0]]


def test_whiten_of_equal_values_is_0():
    values = row(0.5, 0.5, 0.5)
    assert whiten(values, ones(values)).tolist() == [[0.0, 0.0, 0.0]]


# KL and rewards


def test_kl_estimates_by_hand():
    # pi = 1/2, ref = 1/4:  k1 = ln 2,   k3 = 1/2 - 1 + ln 2
    # pi = 1/4, ref = 1/2:  k1 = -ln 2,  k3 = 2 - 1 - ln 2
    logprobs, ref_logprobs, mask = row(-LN2, -2 * LN2, -9.0), row(-2 * LN2, -LN2, -1.0), row(1, 1, 0)
    assert_close(kl_estimates(logprobs, ref_logprobs, mask, "k1"), row(LN2, -LN2, 0.0))
    assert_close(kl_estimates(logprobs, ref_logprobs, mask, "k3"), row(LN2 - 0.5, 1 - LN2, 0.0))


def test_k3_is_never_negative():
    magnitudes = torch.logspace(-8, 1, 300)
    log_ratios = torch.cat([magnitudes, -magnitudes, torch.zeros(1)])[None]
    assert (kl_estimates(torch.zeros_like(log_ratios), log_ratios, ones(log_ratios), "k3") >= 0).all()


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_expectation_of_an_estimate_is_the_kl(estimator):
    """Every outcome once, weighted by the policy's probability: no sampling, so the equality is exact."""
    policy, reference = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    estimates = kl_estimates(row(*policy).log(), row(*reference).log(), row(1, 1, 1, 1), estimator)
    assert (row(*policy) * estimates).sum().item() == pytest.approx(exact, rel=1e-6)


def test_rewards_are_the_kl_penalty_and_the_score_at_the_last_token():
    scores, kl = torch.tensor([2.0, -3.0]), torch.tensor([[0.1, 0.2, 0.3], [0.5, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = torch.tensor([[-0.05, -0.1, 1.85], [-3.25, 0.0, 0.0]])
    assert_close(shape_rewards(scores, kl, mask, 0.5), expected)


def test_score_index_moves_the_score_even_behind_the_last_token():
    scores, kl = torch.tensor([2.0, -3.0]), torch.tensor([[0.1, 0.2, 0.3], [0.5, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = torch.tensor([[-0.05, -0.1, 1.85], [-0.25, -3.0, 0.0]])
    assert_close(shape_rewards(scores, kl, mask, 0.5, score_index=torch.tensor([2, 1])), expected)


# Advantages


def test_gae_by_hand_without_discount():
    # delta = (0.1 + 0.4 - 0.5, -0.2 + 0.2 - 0.4, 1 - 0.2) = (0, -0.4, 0.8)
    # A_2 = 0.8;  A_1 = -0.4 + 0.95 * 0.8 = 0.36;  A_0 = 0 + 0.95 * 0.36 = 0.342
    rewards, values = row(0.1, -0.2, 1.0), row(0.5, 0.4, 0.2)
    advantages, returns = generalized_advantages(rewards, values, ones(values), gamma=1.0, lam=0.95)
    assert_close(advantages, row(0.342, 0.36, 0.8))
    assert_close(returns, row(0.842, 0.76, 1.0))


def test_gae_by_hand_with_discount():
    # delta = (0.1 + 0.9 * 0.4 - 0.5, -0.2 + 0.9 * 0.2 - 0.4, 1 - 0.2) = (-0.04, -0.42, 0.8), gamma lam = 0.45
    # A_2 = 0.8;  A_1 = -0.42 + 0.45 * 0.8 = -0.06;  A_0 = -0.04 - 0.45 * 0.06 = -0.067
    rewards, values = row(0.1, -0.2, 1.0), row(0.5, 0.4, 0.2)
    advantages, returns = generalized_advantages(rewards, values, ones(values), gamma=0.9, lam=0.5)
    assert_close(advantages, row(-0.067, -0.06, 0.8))
    assert_close(returns, row(0.433, 0.34, 1.0))


def test_the_padding_behind_a_row_is_worth_0_to_it():
    # The first row is the one above, cut behind its second token: A_1 = -0.2 - 0.4; A_0 = 0 + 0.95 * -0.6.
    rewards, values = torch.tensor([[0.1, -0.2, 50.0]]), torch.tensor([[0.5, 0.4, 70.0]])
    advantages, returns = generalized_advantages(rewards, values, row(1, 1, 0), gamma=1.0, lam=0.95)
    assert_close(advantages, row(-0.57, -0.6, 0.0))
    assert_close(returns, row(-0.07, -0.2, 0.0))


def test_with_gamma_and_lam_1_returns_are_the_sums_of_the_rewards_to_come():
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    _, returns = generalized_advantages(rewards, values, ones(values), gamma=1.0, lam=1.0)
    assert_close(returns, torch.stack([rewards[:, t:].sum(1) for t in range(6)], 1))


# Losses


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (1.0, 1.1, -1.1, -1.1, 0.0),  # within the range
        (-1.0, 1.1, 1.1, 1.1, 0.0),
        (1.0, 1.5, -1.2, 0.0, 1.0),  # a good token, likely enough already
        (1.0, 0.5, -0.5, -0.5, 0.0),  # a good token that became unlikely: still pulled back
        (-1.0, 0.5, 0.8, 0.0, 1.0),  # a bad token, unlikely enough already
        (-1.0, 1.5, 1.5, 1.5, 0.0),  # a bad token that became likely: still pushed down
    ],
)
def test_policy_loss_of_one_token(advantage, ratio, loss, gradient, clipped):
    """Clip range 0.2. Unclipped, d(-A r) / d(log pi) = -A r; clipped, nothing flows."""
    old = row(-3.0)
    logprobs = (old + math.log(ratio)).requires_grad_()
    computed, statistics = policy_loss(logprobs, old, row(advantage), row(1), cliprange=0.2)
    computed.backward()
    assert computed.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert statistics.clipfrac.item() == clipped
    assert statistics.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert statistics.approx_kl.item() == pytest.approx(math.log(ratio) ** 2 / 2, rel=1e-5)


def test_policy_loss_is_the_mean_over_the_tokens():
    # Ratios 2 and 1/2, advantages 1 and 3: -1.2 (clipped) and -1.5; padding counts for nothing.
    logprobs, old = row(LN2, -LN2, 9.0), row(0.0, 0.0, 0.0)
    loss, statistics = policy_loss(logprobs, old, row(1.0, 3.0, 5.0), row(1, 1, 0), cliprange=0.2)
    assert loss.item() == pytest.approx(-1.35)
    assert statistics.clipfrac.item() == 0.5
    assert statistics.ratio.item() == pytest.approx(1.25)
    assert statistics.approx_kl.item() == pytest.approx(LN2**2 / 2)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "clipped"),
    [
        (1.0, 0.9, 2.0, 0.5, -1.0, 0.0),  # within the range: (1 - 2)^2 / 2
        (2.0, 1.0, 2.5, 0.845, 0.0, 1.0),  # moved towards the return, far enough: (1.2 - 2.5)^2 / 2
        (0.0, 1.0, -0.5, 0.845, 0.0, 1.0),  # the same downwards: (0.8 + 0.5)^2 / 2
        (2.0, 1.0, 0.0, 2.0, 2.0, 0.0),  # moved away from the return: 2^2 / 2, pulled back
    ],
)
def test_value_loss_of_one_token(value, old, target, loss, gradient, clipped):
    """Clip range 0.2. Unclipped, the derivative is V - R."""
    values = row(value).requires_grad_()
    computed, statistics = value_loss(values, row(old), row(target), row(1), cliprange_value=0.2)
    computed.backward()
    assert computed.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)
    assert statistics.clipfrac.item() == clipped
    assert (statistics.approx_kl.item(), statistics.ratio.item()) == (0.0, 0.0)


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_the_parts_of_a_batch_add_up_to_its_loss(loss_of):
    """Parts with unequal numbers of tokens, each divided by the count of the whole."""
    generator = torch.Generator().manual_seed(2)
    new, old, target = 0.5 * torch.randn(3, 4, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [4], [1], [2]])
    whole, whole_statistics = loss_of(new, old, target, mask, 0.2)
    parts = [loss_of(new[i], old[i], target[i], mask[i], 0.2, count=12) for i in (slice(0, 2), slice(2, 4))]
    assert_close(sum(loss for loss, _ in parts), whole)
    assert whole_statistics.clipfrac > 0
    for name in ("clipfrac", "approx_kl", "ratio"):
        assert_close(sum(getattr(part, name) for _, part in parts), getattr(whole_statistics, name))


def test_explained_variance():
    returns, mask = row(1.0, 2.0, 3.0, 100.0), row(1, 1, 1, 0)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(row(2.0, 2.0, 2.0, 0.0), returns, mask).item() == 0.0
    # Errors (0, 0, -1): variance 1/3 - 1/9 = 2/9; of the returns 2/3.
    assert explained_variance(row(1.0, 2.0, 4.0, 0.0), returns, mask).item() == pytest.approx(2 / 3)
    assert explained_variance(row(3.0, 2.0, 1.0, 0.0), returns, mask).item() == pytest.approx(1 - 4)


@pytest.mark.parametrize("tokens", [1, 3, 7, 1000])
def test_equal_returns_have_no_explained_variance(tokens):
    """0.7 is no float: where the mean is rounded, the computed variance of equal returns is tiny, but not 0."""
    returns = torch.full((1, tokens + 1), 0.7)
    returns[0, -1] = 5.0
    mask = torch.arange(tokens + 1)[None] < tokens
    assert explained_variance(torch.linspace(0, 1, tokens + 1)[None], returns, mask).isnan()


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.1 * (1 + 0.2 * 0.0064)),  # twice the target: error 1, clipped to 0.2
        (6.6, 0.1 * (1 + 0.1 * 0.0064)),
        (6.0, 0.1),
        (5.4, 0.1 * (1 - 0.1 * 0.0064)),
        (-1.0, 0.1 * (1 - 0.2 * 0.0064)),  # k1's mean may be negative
    ],
)
def test_adapt_kl_coef_by_hand(kl, expected):
    assert adapt_kl_coef(0.1, kl, target=6.0, episodes=64, horizon=10_000) == pytest.approx(expected, rel=1e-12)


# Padding


@st.composite
def ragged_batches(draw) -> tuple[Tensor, ...]:
    """Five (B, T) tensors of noise and a mask: 1 to 4 rows of 1 to 6 tokens, garbage behind them."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    noise = torch.randn(5, len(lengths), width, generator=generator, dtype=torch.float64)
    return *torch.where(mask, noise, 1000 * noise), mask


@settings(derandomize=True, deadline=None, max_examples=60)
@given(ragged_batches())
def test_a_padded_row_is_treated_like_the_row_alone(batch):
    logprobs, ref_logprobs, rewards, values, scores, mask = batch
    scores = scores[:, 0]
    kl = kl_estimates(logprobs, ref_logprobs, mask, "k3")
    shaped = shape_rewards(scores, logprobs - ref_logprobs, mask, 0.1)
    advantages, returns = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    for result in (kl, shaped, advantages, returns):
        assert (result[~mask] == 0).all()
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = (slice(i, i + 1), slice(length))
        whole = ones(mask[alone])
        assert_close(kl[alone], kl_estimates(logprobs[alone], ref_logprobs[alone], whole, "k3"))
        penalty = (logprobs - ref_logprobs)[alone]
        assert_close(shaped[alone], shape_rewards(scores[i : i + 1], penalty, whole, 0.1))
        expected = generalized_advantages(rewards[alone], values[alone], whole, 0.9, 0.8)
        assert_close((advantages[alone], returns[alone]), expected)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(ragged_batches())
def test_means_over_a_batch_are_those_over_its_tokens(batch):
    """The batch's tokens laid out as one row without padding give the same losses and statistics."""
    *padded, mask = batch
    new, old, target, _, _ = padded
    flat_new, flat_old, flat_target, _, _ = (tensor[mask][None] for tensor in padded)
    whole = ones(flat_new)
    for shift_mean in (True, False):
        white = whiten(new, mask, shift_mean)
        assert_close(white[mask][None], whiten(flat_new, whole, shift_mean))
        assert (white[~mask] == 0).all()
    for loss_of in (policy_loss, value_loss):
        loss, statistics = loss_of(new, old, target, mask, 0.2)
        flat_loss, flat_statistics = loss_of(flat_new, flat_old, flat_target, whole, 0.2)
        assert_close(loss, flat_loss)
        assert_close(vars(statistics), vars(flat_statistics))
    expected = explained_variance(flat_new, flat_target, whole)
    assert_close(explained_variance(new, target, mask), expected, equal_nan=True)


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_no_gradient_flows_into_padding(loss_of):
    new = row(0.1, 0.05, 50.0).requires_grad_()
    loss_of(new, row(0.0, 0.0, 0.0), row(1.0, -1.0, 70.0), row(1, 1, 0), 0.2)[0].backward()
    assert (new.grad != 0).tolist() == [[True, True, False]]


# trl's PPO trainer


@dataclass(frozen=True)
class TrlUpdate:
    """One update of trl: its settings, its rollout's tensors, what it computed in each epoch, what it logged.

    Behind the stop token trl has one state more: the first padding position, which gets the score and is in the
    returns and the value loss, but not in the policy's. So it has two masks, and here they are:

    mask: the sampled tokens; `~padding_mask`.
    wide_mask: with the state behind them; `~padding_mask_p1`. The same where a row fills all T positions.
    score_index: that state or, where the row is full, the last token. None (our default) if every row is full.
    """

    settings: dict
    rollout: dict[str, Tensor]
    epochs: list[dict]
    metrics: dict[str, float]
    mask: Tensor
    wide_mask: Tensor
    score_index: Tensor | None

    def kl(self) -> Tensor:
        rollout = self.rollout
        return kl_estimates(rollout["logprobs"], rollout["ref_logprobs"], self.mask, self.settings["kl_estimator"])

    def rewards(self) -> Tensor:
        kl_coef = self.settings["kl_coef"]
        rewards = shape_rewards(self.rollout["scores"], self.kl(), self.mask, kl_coef, self.score_index)
        return whiten(rewards, self.wide_mask, shift_mean=False) if self.settings["whiten_rewards"] else rewards

    def advantages_and_returns(self) -> tuple[Tensor, Tensor]:
        """GAE with the state behind the stop token; the advantages are whitened over the tokens alone."""
        gamma, lam = self.settings["gamma"], self.settings["lam"]
        values = self.rollout["values"]
        advantages, returns = generalized_advantages(self.rewards(), values, self.wide_mask, gamma, lam)
        return whiten(advantages, self.mask), returns

    def losses(self, epoch: dict, logprobs: Tensor, values: Tensor, advantages: Tensor, returns: Tensor) -> dict:
        """What trl records in an epoch, under its names; `logprobs` and `values` are in the epoch's order of rows.

        trl's approxkl and ratio are means over all positions: its padding adds log ratios of 0 and ratios of 1.
        """
        rows = epoch["rows"]  # trl shuffles the batch in each epoch
        mask, wide_mask = self.mask[rows], self.wide_mask[rows]
        old_logprobs, old_values = self.rollout["logprobs"][rows], self.rollout["values"][rows]
        pg_loss, pg = policy_loss(logprobs, old_logprobs, advantages[rows], mask, self.settings["cliprange"])
        vf_loss, vf = value_loss(values, old_values, returns[rows], wide_mask, self.settings["cliprange_value"])
        share = mask.float().mean()
        return {
            "pg_loss": pg_loss,
            "vf_loss": vf_loss,
            "pg_clipfrac": pg.clipfrac,
            "vf_clipfrac": vf.clipfrac,
            "approxkl": pg.approx_kl * share,
            "ratio": pg.ratio * share + (1 - share),
        }


def trl_update(name: str) -> TrlUpdate:
    case = TRL[name]
    rollout = {key: torch.tensor(rows) for key, rows in case["rollout"].items()}
    mask, wide_mask = ~rollout["padding_mask"].bool(), ~rollout["padding_mask_p1"].bool()
    full = bool(mask.all())
    assert full == (name != "ragged")
    return TrlUpdate(
        settings=case["settings"],
        rollout=rollout,
        epochs=case["epochs"],
        metrics=case["metrics"],
        mask=mask,
        wide_mask=wide_mask,
        score_index=None if full else mask.sum(1).clamp(max=mask.shape[1] - 1),
    )


@pytest.fixture(params=["full", "ragged", "k3"])
def trl(request) -> TrlUpdate:
    return trl_update(request.param)


def test_trl_kl_and_rewards(trl):
    assert_close(trl.kl(), trl.rollout["kl"], **TOLERANCE)
    assert_close(-trl.settings["kl_coef"] * trl.kl(), trl.rollout["non_score_reward"], **TOLERANCE)
    assert_close(trl.rewards(), trl.rollout["rewards"], **TOLERANCE)


def test_trl_advantages_and_returns(trl):
    advantages, returns = trl.advantages_and_returns()
    assert_close(advantages, trl.rollout["advantages"], **TOLERANCE)
    assert_close(returns, trl.rollout["returns"], **TOLERANCE)


def test_our_score_is_one_step_before_trls_where_a_row_has_padding():
    trl = trl_update("ragged")
    ours = shape_rewards(trl.rollout["scores"], trl.kl(), trl.mask, trl.settings["kl_coef"])
    lengths = trl.mask.sum(1)
    short = lengths < trl.mask.shape[1]
    assert short.any()
    assert not short.all()
    steps = torch.arange(trl.mask.shape[1])
    moved = short[:, None] & ((steps == lengths[:, None] - 1) | (steps == lengths[:, None]))
    assert ((ours - trl.rollout["rewards"]).abs() > 1e-3).equal(moved)
    assert_close(ours.sum(1), trl.rollout["rewards"].sum(1), **TOLERANCE)


def tensors(record: dict, names) -> dict[str, Tensor]:
    return {name: torch.tensor(record[name]) for name in names}


def test_trl_losses_and_their_gradients_in_each_epoch(trl):
    for epoch in trl.epochs:
        logprobs = torch.tensor(epoch["new_logprobs"]).requires_grad_()
        values = torch.tensor(epoch["vpred"]).requires_grad_()
        ours = trl.losses(epoch, logprobs, values, trl.rollout["advantages"], trl.rollout["returns"])
        ours["loss"] = ours["pg_loss"] + trl.settings["vf_coef"] * ours["vf_loss"]
        ours["loss"].backward()
        ours |= {"new_logprobs_grad": logprobs.grad, "vpred_grad": values.grad}
        assert_close({name: tensor.detach() for name, tensor in ours.items()}, tensors(epoch, ours), **TOLERANCE)
    # The first epoch cannot clip, its policy is the one that sampled; the last one does.
    assert epoch["pg_clipfrac"] > 0.1
    assert epoch["vf_clipfrac"] > 0.1


def test_trl_logged_metrics(trl):
    """From the rollout to the log by our functions alone; the rollout's figures are sums, averaged over its rows."""
    kl, kl_coef, rows = trl.kl(), trl.settings["kl_coef"], len(trl.mask)
    rewards = shape_rewards(trl.rollout["scores"], kl, trl.mask, kl_coef, trl.score_index)
    advantages, returns = trl.advantages_and_returns()
    epochs = [
        trl.losses(epoch, torch.tensor(epoch["new_logprobs"]), torch.tensor(epoch["vpred"]), advantages, returns)
        for epoch in trl.epochs
    ]
    means = {name: torch.stack([epoch[name] for epoch in epochs]).mean() for name in epochs[0]}
    ours = {
        "objective/kl": masked_mean(kl, trl.mask, rows),
        "objective/entropy": masked_mean(-trl.rollout["logprobs"], trl.mask, rows),
        "objective/non_score_reward": masked_mean(-kl_coef * kl, trl.mask, rows),
        "objective/rlhf_reward": masked_mean(rewards, trl.wide_mask, rows),
        "policy/approxkl_avg": means["approxkl"],
        "policy/clipfrac_avg": means["pg_clipfrac"],
        "loss/policy_avg": means["pg_loss"],
        "loss/value_avg": means["vf_loss"],
        "val/clipfrac_avg": means["vf_clipfrac"],
        "val/ratio": means["ratio"],
    }
    assert_close(ours, tensors(trl.metrics, trl.metrics), **TOLERANCE)
