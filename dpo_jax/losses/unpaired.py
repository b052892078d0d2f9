"""Losses of single responses, wanted or not: a pair of which one may be absent.

The value of a comparison is the mean over its present responses, so that over pairs the mean is that of the same
responses one by one. Comparisons without any (weight 0) have the value 0. Notation as in pairwise.py.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, relu, sigmoid

from dpo_jax.losses.parts import log_ratios, require, weighted_mean
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


def _there(lp: Logps) -> Array:
    """Returns 1 for each response that is there, float32[B, 2]."""
    return (lp.present[:, :2] & (lp.weights > 0)[:, None]).astype(jnp.float32)


def _check_weights(desirable_weight: float, undesirable_weight: float) -> None:
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        require(name, weight, lambda w: w >= 0, "at least 0")


def mean_of_present(wanted: Array, unwanted: Array, lp: Logps) -> Array:
    """Returns the mean over the responses of a comparison that are there, float32[B]; 0 where none is."""
    there = _there(lp)
    return (there * jnp.stack([wanted, unwanted], 1)).sum(1) / jnp.maximum(there.sum(1), 1.0)


@register(responses=3, uses_reference=True, whole_batch=True, unpaired=True, mismatched=True)
def kto(lp: Logps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Array:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7).

        KL = max(0, mean of log pi(y' | x) - log ref(y' | x) over the step), a constant to the gradient
        loss = w_c (1 - sigmoid(beta (c - KL)))   of a wanted response
        loss = w_r (1 - sigmoid(beta (KL - r)))   of an unwanted one

    with y' a completion written for another prompt, the comparison's third response. The mean is by the comparisons'
    weights, over those that have one.

    Args:
      lp: log-probabilities of B comparisons of three responses, all of a step.
      beta: Strength of the KL constraint to the reference.
      desirable_weight: w_c; for unequal numbers the paper wants w_c n_c / (w_r n_r) within 1 and 4/3 (eq. 8).
      undesirable_weight: w_r.

    Returns:
      float32[B].
    """
    _check_weights(desirable_weight, undesirable_weight)
    c, r, other = log_ratios(lp).T
    kl = relu(weighted_mean(stop_gradient(other), lp.weights * lp.present[:, 2]))
    wanted, unwanted = sigmoid(beta * (kl - c)), sigmoid(beta * (r - kl))
    return mean_of_present(desirable_weight * wanted, undesirable_weight * unwanted, lp)


@register(responses=2, uses_reference=True, unpaired=True)
def apo_zero_unpaired(
    lp: Logps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Array:
    """Anchored preference optimization of single responses (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7).

        loss = w_c (1 - sigmoid(beta c))   of a wanted response
        loss = w_r sigmoid(beta r)         of an unwanted one

    Args:
      lp: log-probabilities of B comparisons.
      beta: Strength of the KL constraint to the reference.
      desirable_weight: w_c.
      undesirable_weight: w_r.

    Returns:
      float32[B].
    """
    _check_weights(desirable_weight, undesirable_weight)
    c, r = (beta * log_ratios(lp)).T
    return mean_of_present(desirable_weight * sigmoid(-c), undesirable_weight * sigmoid(r), lp)


def _reward_shift(lp: Logps, *, beta: float = 0.1, decay: float = 0.9, all_steps: bool = False) -> Array:
    """Returns the mean of rewards with this step's in it, and (all_steps) their weight so far: the statistic of bco."""
    rewards, weights = stop_gradient(beta * log_ratios(lp)), lp.weights[:, None] * _there(lp)
    mean = weighted_mean(rewards, weights)
    if not all_steps:
        return decay * lp.running + (1 - decay) * mean
    before, weight = jnp.broadcast_to(lp.running, (2,))
    total = weight + jnp.sum(weights)
    return jnp.stack([before + (mean - before) * (total - weight) / jnp.maximum(total, 1e-9), total])


@register(responses=2, uses_reference=True, whole_batch=True, unpaired=True, statistic=_reward_shift)
def bco(lp: Logps, *, beta: float = 0.1, decay: float = 0.9, all_steps: bool = False) -> Array:
    """Binary classifier optimization with its reward shift (Jung et al. 2024, arXiv 2404.04656).

        delta <- decay delta + (1 - decay) mean of beta c and beta r over the step, a constant to the gradient
        loss = -log sigmoid(beta c - delta)      of a wanted response
        loss = -log sigmoid(-(beta r - delta))   of an unwanted one

    The mean is by the comparisons' weights, over the responses that are there, and forgets old steps, or (all_steps) is
    over all so far, as TRL's. At the first step policy and reference are the same, so that delta is 0 from the start.

    Args:
      lp: log-probabilities of B comparisons, all of a step; `running` is delta before the step, and (all_steps) the
        weight of the responses in it.
      beta: Strength of the KL constraint to the reference.
      decay: Of the running mean.
      all_steps: Every step so far counts the same, and decay is not used.

    Returns:
      float32[B].
    """
    require("decay", decay, lambda d: 0 <= d < 1, "at least 0 and below 1")
    delta = _reward_shift(lp, beta=beta, decay=decay, all_steps=all_steps)
    delta = delta[0] if all_steps else delta
    c, r = (beta * log_ratios(lp)).T
    return mean_of_present(-log_sigmoid(c - delta), -log_sigmoid(delta - r), lp)
