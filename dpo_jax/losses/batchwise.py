"""Losses of pairs in which a comparison's value depends on the others of its step.

They must see all comparisons of a step at once. Absent ones (weight 0) take no part and have the value 0. Notation as
in pairwise.py.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from dpo_jax.losses.parts import log_ratios, logistic, margin, pair, require, weighted_mean
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


def _quantile_gap(better: Array, worse: Array, lp: Logps) -> Array:
    """Returns each `better` less the `worse` of the same rank, float[B], in the order of `better`; 0 where absent."""
    there = lp.weights > 0
    last = jnp.finfo(jnp.float32).max  # absent ones come last on both sides
    better, worse = (jnp.where(there, x, last) for x in (better, worse))
    ranks = jnp.argsort(jnp.argsort(better))
    return jnp.where(there, better - jnp.sort(worse)[ranks], 0.0)


@register(responses=2, uses_reference=True, whole_batch=True)
def aot(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """Alignment by optimal transport of margins, policy over reference (Melnyk et al. 2024, arXiv 2406.05882).

        u, v = log pi(y_c) - log pi(y_r), log ref(y_c) - log ref(y_r), each sorted over the step
        loss = -log sigmoid(beta (u_(i) - v_(i)))

    The value of a comparison is that of its own margin's rank; its weight multiplies the value, not the ranks.

    Args:
      lp: log-probabilities of B pairs, all of a step.
      beta: Strength of the constraint to the reference.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    gap = _quantile_gap(margin(lp.policy), margin(lp.reference), lp)
    return jnp.where(lp.weights > 0, logistic(beta * gap, label_smoothing), 0.0)


@register(responses=2, uses_reference=True, whole_batch=True)
def aot_unpaired(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """Alignment by optimal transport of log-ratios, chosen over rejected (Melnyk et al. 2024, arXiv 2406.05882).

        c, r each sorted over the step
        loss = -log sigmoid(beta (c_(i) - r_(i)))

    The value of a comparison is that of its chosen response's rank; its weight multiplies the value, not the ranks.

    Args:
      lp: log-probabilities of B pairs, all of a step.
      beta: Strength of the constraint to the reference.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    gap = _quantile_gap(*pair(log_ratios(lp)), lp)
    return jnp.where(lp.weights > 0, logistic(beta * gap, label_smoothing), 0.0)


def _mean_margin(lp: Logps) -> Array:
    return weighted_mean(stop_gradient(margin(log_ratios(lp))), lp.weights)


def _usual_margin(lp: Logps, *, decay: float = 0.9, **_: float) -> Array:
    """Returns the running mean of margins with this step's in it: the statistic of beta_dpo."""
    return decay * lp.running + (1 - decay) * _mean_margin(lp)


@register(responses=2, uses_reference=True, whole_batch=True, statistic=_usual_margin)
def beta_dpo(
    lp: Logps, *, beta: float = 0.1, alpha: float = 0.6, decay: float = 0.9, label_smoothing: float = 0.0
) -> Array:
    """DPO with a beta that grows with the step's mean margin (Wu et al. 2024, arXiv 2407.08639), without its filter.

        M = mean of c - r over the step, M0 <- decay M0 + (1 - decay) M, at first 0
        b = max(beta (1 + alpha (M - M0)), 1e-3), a constant to the gradient
        loss = -log sigmoid(b (c - r))

    Means are by the comparisons' weights. As in the authors' code the margin is not multiplied by beta, M0 has this
    step in it, and b has a floor. At the first step policy and reference are the same: M = 0 and b = beta.

    Args:
      lp: log-probabilities of B pairs, all of a step; `running` is M0 before the step.
      beta: Its value at the usual margin.
      alpha: How fast it grows with the margin (the paper's 0.6).
      decay: Of the running mean (the paper's 0.9).
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    require("decay", decay, lambda d: 0 <= d < 1, "at least 0 and below 1")
    excess = _mean_margin(lp) - _usual_margin(lp, decay=decay)
    dynamic = jnp.maximum(beta * (1 + alpha * excess), 1e-3)
    return jnp.where(lp.weights > 0, logistic(dynamic * margin(log_ratios(lp)), label_smoothing), 0.0)
