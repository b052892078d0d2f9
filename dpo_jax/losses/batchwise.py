"""Losses of pairs in which a comparison's value depends on the others of its step.

They must see all comparisons of a step at once. Absent ones (weight 0) take no part and have the value 0. Notation as
in pairwise.py.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.lax import stop_gradient

from dpo_jax.errors import UserError
from dpo_jax.losses.parts import log_ratios, logistic, margin, pair, per_token, require, weighted_mean
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


def _margins(lp: Logps) -> Array:
    """Returns the margin of log-ratios, float32[B], without gradient."""
    return stop_gradient(margin(log_ratios(lp)))


def _usual_margin(lp: Logps, *, decay: float = 0.9, drawn: bool = False, **_: float) -> Array:
    """Returns the running mean of margins with this step's in it, and (drawn) their standard deviation and the number
    of steps: the statistic of beta_dpo."""
    mean = weighted_mean(_margins(lp), lp.weights)
    if not drawn:
        return decay * lp.running + (1 - decay) * mean
    before, spread = jnp.broadcast_to(lp.running, (3,)), _deviation(_margins(lp), lp.weights)
    return jnp.stack([*decay * before[:2] + (1 - decay) * jnp.stack([mean, spread]), before[2] + 1])


def _deviation(values: Array, weights: Array) -> Array:
    """Returns the standard deviation of n values by their weights, over n - 1 as torch.std; 0 of a single value."""
    count = jnp.maximum(jnp.sum(weights > 0), 2)
    squares = (values - weighted_mean(values, weights)) ** 2
    return jnp.sqrt(weighted_mean(squares, weights) * count / (count - 1))


def _drawn_needs(*, left_out: float, drawn: bool, **_: float) -> dict[str, bool]:
    """Returns what beta_dpo needs with these options.

    Raises:
      UserError: a draw that leaves nothing out.
    """
    if drawn and not isinstance(left_out, Tracer) and left_out == 0:
        raise UserError("loss beta_dpo: drawn True cannot be used: left_out 0 keeps all comparisons; set left_out too")
    return {"needs_reference": bool(drawn)}


@register(responses=2, uses_reference=True, whole_batch=True, statistic=_usual_margin, of_options=_drawn_needs)
def beta_dpo(
    lp: Logps,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    decay: float = 0.9,
    left_out: float = 0.0,
    drawn: bool = False,
    label_smoothing: float = 0.0,
) -> Array:
    """DPO with a beta that grows with the step's mean margin (Wu et al. 2024, arXiv 2407.08639).

        M = mean of c - r over the step, M0 <- decay M0 + (1 - decay) M, at first 0
        b = max(beta (1 + alpha (M - M0)), 1e-3), a constant to the gradient
        loss = -log sigmoid(b (c - r)), of those kept, whose mean takes the place of the step's

    Means are by the comparisons' weights. As in the authors' code the margin is not multiplied by beta, M0 has this
    step in it, and b has a floor. At the first step policy and reference are the same: M = 0 and b = beta. The filter
    leaves out the share of comparisons whose margins are furthest from M0. With `drawn` the kept comparisons are
    sampled as in the authors' code: without replacement, with probabilities proportional to
    exp(-(c - r - M0)^2 / (2 S^2)), where S is a running mean of the steps' standard deviations. While S is below 1e-4,
    as at the first step, margins are rounding noise, and sampling is uniform. b is computed from the kept comparisons.
    The sample depends on the step's number and on the order of the reference's margins, not on the layout of the step
    in rows and on devices, nor on restarts; rounding may exchange margins that are nearly equal.

    Args:
      lp: log-probabilities of B pairs, all of a step; `running` is M0 before the step, and (drawn) S and the number of
        steps before.
      beta: Its value at the usual margin.
      alpha: How fast it grows with the margin (the paper's 0.6).
      decay: Of the running mean (the paper's 0.9).
      left_out: Share of a step's comparisons that the filter leaves out (the authors' mode_weight).
      drawn: Whether those kept are drawn (the authors' filter) or the most probable ones.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    require("decay", decay, lambda d: 0 <= d < 1, "at least 0 and below 1")
    require("left_out", left_out, lambda s: 0 <= s < 1, "at least 0 and below 1")
    running, margins = _usual_margin(lp, decay=decay, drawn=drawn), margin(log_ratios(lp))
    usual = running[0] if drawn else running
    gap = _margins(lp) - usual
    distance = _drawn_score(_standardized(gap, running[1]), running[2], lp) if drawn else jnp.abs(gap)
    kept = _least(distance, 1 - left_out, lp)
    excess = weighted_mean(_margins(lp), kept * lp.weights) - usual
    dynamic = jnp.maximum(beta * (1 + alpha * excess), 1e-3)
    share = jnp.sum(kept * lp.weights) / jnp.maximum(jnp.sum(lp.weights), 1e-9)
    value = logistic(dynamic * margins, label_smoothing) / jnp.maximum(share, 1e-9)
    return jnp.where(kept > 0, value, 0.0)


def _standardized(gap: Array, spread: Array) -> Array:
    """Returns gaps in standard deviations, float32[B]; 0 while the deviation is below 1e-4, where gaps are rounding."""
    return jnp.where(spread < 1e-4, 0.0, gap / jnp.maximum(spread, 1e-4))


def _drawn_score(z: Array, step: Array, lp: Logps) -> Array:
    """Returns float32[B], whose least ones are a draw without replacement by the normal density at z.

    The largest of log-probabilities with Gumbel noise are such a draw (Kool et al. 2019, arXiv 1903.06059). The noise
    is of a comparison's rank by the reference's margin, not of its place in the batch.
    """
    ranks = jnp.argsort(jnp.argsort(jnp.where(lp.weights > 0, margin(lp.reference), jnp.inf)))
    key = jax.random.key(step.astype(jnp.int32))
    return z**2 / 2 - jax.vmap(lambda rank: jax.random.gumbel(jax.random.fold_in(key, rank)))(ranks)


def _least(values: Array, share: float, lp: Logps) -> Array:
    """Returns 1 for the share of the comparisons with the least values, at least one of them, and 0 for others."""
    counted = lp.weights > 0
    ranks = jnp.argsort(jnp.argsort(jnp.where(counted, values, jnp.inf)))
    return 1.0 * (counted & (ranks < jnp.maximum(jnp.floor(share * jnp.sum(counted) + 1e-4), 1)))


def _gap(lp: Logps) -> Array:
    """Returns the margin of log-ratios per token, float32[B], without gradient."""
    return stop_gradient(margin(per_token(log_ratios(lp), lp)))


def _gap_moments(lp: Logps, *, decay: float = 0.9, **_: float) -> Array:
    """Returns running mean and standard deviation of gaps with this step's in them: the statistic of alpha_dpo."""
    gap, weights = _gap(lp), lp.weights
    return decay * lp.running + (1 - decay) * jnp.stack([weighted_mean(gap, weights), _deviation(gap, weights)])


@register(responses=2, uses_reference=True, whole_batch=True, statistic=_gap_moments)
def alpha_dpo(
    lp: Logps,
    *,
    beta: float = 2.5,
    gamma: float = 0.25,
    alpha: float = 0.05,
    decay: float = 0.9,
    label_smoothing: float = 0.0,
) -> Array:
    """SimPO whose target margin follows the reference (Wu et al. 2024, arXiv 2410.10148), AlphaDPO.

        g = c / L_c - r / L_r, with mean M and standard deviation S over steps (decay), this one in them
        loss = -log sigmoid(beta (m_c - m_r) - gamma - beta alpha (g - M) / S)

    and g, M and S constants to the gradient. Means are by the comparisons' weights; the deviation of a step's n
    comparisons is over n - 1, as in the authors' code. S is at least 1e-4, so that the first step, at which policy and
    reference are the same, has g = 0 and the value of simpo. The rewards of its metrics are beta times log-ratios.

    Args:
      lp: log-probabilities of B pairs, all of a step; `running` is M and S before the step.
      beta: Scale of the rewards, which are means over tokens.
      gamma: Target margin of rewards, not divided by beta, as in simpo (beta times the authors' gamma_beta_ratio).
      alpha: Weight of the deviation from the usual gap.
      decay: Of M and S (the authors' 0.9).
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    require("decay", decay, lambda d: 0 <= d < 1, "at least 0 and below 1")
    mean, spread = _gap_moments(lp, decay=decay)
    target = gamma + beta * alpha * (_gap(lp) - mean) / jnp.maximum(spread, 1e-4)
    z = beta * margin(per_token(lp.policy, lp)) - target
    return jnp.where(lp.weights > 0, logistic(z, label_smoothing), 0.0)
