"""The most reward that any method can have at each KL from the reference, from the closed form; the best of N.

The optimum of reward - beta KL is pi* = ref exp(r / beta) / Z (paper, equation 4), so its reward and its KL from the
reference are averages over the reference's own responses: over all of them with their probabilities where they can be
listed, else over many samples, whose weights are then normalised by their own sum. Rewards are float64[prompts, K],
those of K responses to each prompt.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp

from dpo_jax.intervals import Z95, mean_interval
from dpo_jax.records import Array

RESAMPLES = 100
FEWEST = 30  # effective samples; normalised weights are off by about one part in so many


class Optimum(NamedTuple):
    """The optimal policy at one beta.

    Attributes:
      beta: the price of a nat of KL in reward; infinite for the reference itself.
      reward: its mean reward; `reward_half` is half the 95% interval.
      kl: its mean KL from the reference, nats; `kl_half` likewise.
      effective: samples of a prompt that count, the harmonic mean over prompts; infinite where all are listed.
    """

    beta: float
    reward: float
    reward_half: float
    kl: float
    kl_half: float
    effective: float


def tilted_weights(rewards: Array, base: Array, beta: float) -> tuple[Array, Array, Array]:
    """Returns the reward of base * exp(rewards / beta) / Z, its KL from base and the sum of its squared weights,
    float64[...] each; `base` holds log-probabilities of the K responses, float64[..., K]."""
    weighed = base + rewards / beta
    log_z: Array = logsumexp(weighed, axis=-1, keepdims=True)
    weights = np.exp(weighed - log_z)
    reward = (weights * rewards).sum(-1)
    return reward, reward / beta - log_z[..., 0], (weights**2).sum(-1)


def optimum_from_list(rewards: Array, base: Array, betas: Sequence[float]) -> list[Optimum]:
    """Returns the reference and the optimum at each beta, exactly but for the prompts being some of many.

    Args:
      rewards: of every response there is.
      base: their log-probabilities under the reference, float64[prompts, K].
      betas: falling or rising, above 0.
    """
    start = Optimum(math.inf, *mean_interval((np.exp(base) * rewards).sum(-1)), 0.0, 0.0, math.inf)
    found = [tilted_weights(rewards, base, beta) for beta in sorted(betas, reverse=True)]
    pairs = zip(sorted(betas, reverse=True), found, strict=True)
    return [start, *(Optimum(b, *mean_interval(r), *mean_interval(kl), math.inf) for b, (r, kl, _) in pairs)]


def optimum_from_samples(rewards: Array, betas: Sequence[float], seed: int = 0) -> tuple[list[Optimum], list[Optimum]]:
    """Returns the reference and the optimum at each beta by self-normalised importance weights, and those left out.

    Intervals are by the bootstrap: prompts are drawn anew, and of each its samples. At a small beta few samples have
    nearly all the weight, and what they say of the optimum is too low: it is left out below 30 effective samples.

    Args:
      rewards: of K samples of the reference for each prompt.
      betas: above 0.
      seed: of the bootstrap.
    """
    random, (prompts, count) = np.random.default_rng(seed), rewards.shape
    base, betas = np.full(count, -math.log(count)), sorted(betas, reverse=True)
    again = np.zeros((RESAMPLES, len(betas), 2))
    for b in range(RESAMPLES):
        at = random.integers(prompts, size=prompts)
        drawn = rewards[at[:, None], random.integers(count, size=rewards.shape)]
        again[b] = [[part.mean() for part in tilted_weights(drawn, base, beta)[:2]] for beta in betas]
    halves = Z95 * again.std(axis=0, ddof=1)
    found = [Optimum(math.inf, *mean_interval(rewards.mean(1)), 0.0, 0.0, float(count))]
    for beta, (reward_half, kl_half) in zip(betas, halves, strict=True):
        reward, kl, squares = (float(part.mean()) for part in tilted_weights(rewards, base, beta))
        found.append(Optimum(beta, reward, float(reward_half), kl, float(kl_half), 1 / squares))
    few = [o.effective < FEWEST for o in found]
    return [o for o, f in zip(found, few, strict=True) if not f], [o for o, f in zip(found, few, strict=True) if f]


class RewardLimit(NamedTuple):
    """The most reward at one KL.

    Attributes:
      reward: the optimum's.
      half: half its 95% interval.
      slope: how much more a nat more would bring, which is the optimum's beta.
      known: whether a policy is known to reach it; if not, it is a bound that none exceeds.
    """

    reward: float
    half: float
    slope: float
    known: bool


def reward_limit(curve: Sequence[Optimum], kl: float) -> RewardLimit:
    """Returns the most reward that any policy has at a KL.

    Between two optima it is on the line through them. The curve is concave with slope beta, so that beyond the last
    optimum it stays below the tangent there.

    Args:
      curve: the reference first, then optima by falling beta.
      kl: nats; below 0, where an estimate may be, the reference's.
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
    """Returns the expected greatest reward of n of the K samples of each prompt, float64[prompts]: the mean over all
    choices of n different ones, which is unbiased for n independent samples.

    With r_(i) the i-th least, it is sum_i r_(i) C(i - 1, n - 1) / C(K, n).

    Raises:
      ValueError: n is not within 1 and K.
    """
    count = rewards.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"the best of {n} of {count} samples")
    i = np.arange(n, count + 1)
    log_share = _log_choose(i - 1, n - 1) - _log_choose(count, n)
    return np.sort(rewards, axis=1)[:, n - 1 :] @ np.exp(log_share)


def _log_choose(n: Array, k: int) -> Array:
    return gammaln(np.asarray(n) + 1.0) - gammaln(k + 1.0) - gammaln(np.asarray(n) - k + 1.0)
