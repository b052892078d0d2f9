"""The highest reward that a policy can have at each KL from the reference, and the best of N.

The optimum of reward - beta KL is pi* = ref exp(r / beta) / Z (paper, equation 4). Its reward and its KL are weighted
averages over responses of the reference: over all responses if they can be enumerated, otherwise over samples with
self-normalized importance weights. Rewards are float64[prompts, K], for K responses to each prompt.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp

from dpo_jax.intervals import Z95, mean_interval
from dpo_jax.records import Array

BOOTSTRAP = 100  # resamples
MIN_EFFECTIVE = 30  # effective samples n; the bias of self-normalized weights is about 1 / n


class Optimum(NamedTuple):
    """The optimal policy at one beta.

    Attributes:
      beta: cost of a nat of KL, in reward; infinite for the reference itself.
      reward: mean reward; `reward_half` is half its 95% interval.
      kl: mean KL from the reference, nats; `kl_half` likewise.
      effective: effective samples per prompt, harmonic mean over prompts; infinite for an enumeration.
    """

    beta: float
    reward: float
    reward_half: float
    kl: float
    kl_half: float
    effective: float


def tilted_weights(rewards: Array, base: Array, beta: float) -> tuple[Array, Array, Array]:
    """Returns the reward of base * exp(rewards / beta) / Z, its KL from base, and its sum of squared probabilities.

    Each is float64[...].

    Args:
      rewards: float64[..., K].
      base: log-probs of the K responses, broadcast to the shape of `rewards`.
      beta: above 0.
    """
    logits = base + rewards / beta
    log_z: Array = logsumexp(logits, axis=-1, keepdims=True)
    weights = np.exp(logits - log_z)
    reward = (weights * rewards).sum(-1)
    return reward, reward / beta - log_z[..., 0], (weights**2).sum(-1)


def optimum_from_enumeration(rewards: Array, base: Array, betas: Sequence[float]) -> list[Optimum]:
    """Returns the reference and the optimum at each beta, by falling beta. The sampling of prompts is the only error.

    Args:
      rewards: float64[prompts, K], of every possible response.
      base: float64[prompts, K], their log-probs under the reference.
      betas: above 0, in any order.
    """
    curve = [Optimum(math.inf, *mean_interval((np.exp(base) * rewards).sum(-1)), 0.0, 0.0, math.inf)]
    for beta in sorted(betas, reverse=True):
        reward, kl, _ = tilted_weights(rewards, base, beta)
        curve.append(Optimum(beta, *mean_interval(reward), *mean_interval(kl), math.inf))
    return curve


def optimum_from_samples(rewards: Array, betas: Sequence[float], seed: int = 0) -> tuple[list[Optimum], list[Optimum]]:
    """Returns the reference and the optimum at each beta, and the optima that are left out; both by falling beta.

    Estimates use self-normalized importance weights; intervals are by the bootstrap over prompts and over the samples
    of each prompt. At a small beta few samples have nearly all the weight and the estimated reward is too low: optima
    with fewer than `MIN_EFFECTIVE` effective samples are left out.

    Args:
      rewards: float64[prompts, K], of K samples of the reference for each prompt.
      betas: above 0, in any order.
      seed: seed of the bootstrap.
    """
    random, (prompts, count) = np.random.default_rng(seed), rewards.shape
    base, betas = np.full(count, -math.log(count)), sorted(betas, reverse=True)
    estimates = np.zeros((BOOTSTRAP, len(betas), 2))
    for b in range(BOOTSTRAP):
        at = random.integers(prompts, size=prompts)
        resampled = rewards[at[:, None], random.integers(count, size=rewards.shape)]
        estimates[b] = [[part.mean() for part in tilted_weights(resampled, base, beta)[:2]] for beta in betas]
    halves = Z95 * estimates.std(axis=0, ddof=1)
    curve = [Optimum(math.inf, *mean_interval(rewards.mean(1)), 0.0, 0.0, float(count))]
    for beta, (reward_half, kl_half) in zip(betas, halves, strict=True):
        reward, kl, squares = (float(part.mean()) for part in tilted_weights(rewards, base, beta))
        curve.append(Optimum(beta, reward, float(reward_half), kl, float(kl_half), 1 / squares))
    few = [o.effective < MIN_EFFECTIVE and math.isfinite(o.beta) for o in curve]  # the reference has no weights
    return [o for o, f in zip(curve, few, strict=True) if not f], [o for o, f in zip(curve, few, strict=True) if f]


class RewardLimit(NamedTuple):
    """The highest reward at one KL.

    Attributes:
      reward: the reward of the optimum, or an upper bound on it.
      half: half its 95% interval.
      slope: reward per further nat of KL, the optimum's beta.
      known: True for the reward of an optimum on the curve, False for an upper bound beyond it.
    """

    reward: float
    half: float
    slope: float
    known: bool


def reward_limit(curve: Sequence[Optimum], kl: float) -> RewardLimit:
    """Returns the highest reward of any policy at a KL.

    Interpolates linearly between two optima. The curve is concave with slope beta: beyond the last optimum, the tangent
    there is an upper bound.

    Args:
      curve: the reference first, then optima by falling beta.
      kl: nats; a negative estimate counts as the reference.
    """
    x = [o.kl for o in curve]
    at = int(np.searchsorted(x, kl, side="right"))
    if at == 0:
        return RewardLimit(curve[0].reward, curve[0].reward_half, curve[1].beta if len(curve) > 1 else math.inf, True)
    if at == len(curve):
        last = curve[-1]
        beyond = kl - last.kl
        return RewardLimit(
            last.reward + (last.beta * beyond if beyond else 0.0), last.reward_half, last.beta, beyond == 0
        )
    low, high = curve[at - 1], curve[at]
    part = (kl - low.kl) / (high.kl - low.kl)
    slope = (high.reward - low.reward) / (high.kl - low.kl)
    reward_half = (1 - part) * low.reward_half + part * high.reward_half
    return RewardLimit(low.reward + slope * (kl - low.kl), reward_half, slope, True)


def best_of_n(rewards: Array, n: int) -> Array:
    """Returns float64[prompts], the expected maximum of n rewards, averaged over all subsets of n of the K samples.

    This estimate is unbiased for n independent samples. With r_(i) the i-th smallest of the K rewards, it is
    sum_i r_(i) C(i - 1, n - 1) / C(K, n).

    Raises:
      ValueError: n is not between 1 and K.
    """
    count = rewards.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n must be between 1 and the {count} samples, got {n}")
    i = np.arange(n, count + 1)
    log_weights = _log_choose(i - 1, n - 1) - _log_choose(count, n)
    return np.sort(rewards, axis=1)[:, n - 1 :] @ np.exp(log_weights)


def _log_choose(n: Array, k: int) -> Array:
    """Returns the log of the binomial coefficient."""
    return gammaln(np.asarray(n) + 1.0) - gammaln(k + 1.0) - gammaln(np.asarray(n) - k + 1.0)
