"""Losses as axes: score x ranking x link x target; points.py has the named losses that are points of them.

The score of a response, how scores are compared, the loss of a comparison and the margin that is asked for are chosen
apart (Tang et al. 2024, arXiv 2402.05749, on links; Gorbatovski et al. 2025, arXiv 2502.01237, on scores and rankings).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, relu, sigmoid
from jax.scipy.stats import norm

from dpo_jax.errors import UserError
from dpo_jax.losses.pairwise import better_by, log_ratio_of_scores
from dpo_jax.losses.parts import CLAMP, chi_squared_score, log_ratios, margin, pair, per_token, require, weighted_mean
from dpo_jax.losses.ranked import rank_nll
from dpo_jax.losses.reference_free import likelihood_rewards, log_odds
from dpo_jax.losses.registry import register
from dpo_jax.losses.term_options import map_responses
from dpo_jax.losses.unpaired import mean_of_present
from dpo_jax.records import Array, Logps

Score = Literal["log_ratio", "log_ratio_mean", "log_prob", "log_prob_mean", "log_odds", "likelihood", "chi_squared"]
Ranking = Literal["pair", "pointwise", "list", "all_pairs"]
Link = Literal[
    "logistic", "squared", "residual", "hinge", "truncated", "exponential", "sigmoid", "savage", "probit", "linear"
]
Target = Literal[
    "zero", "constant", "gap", "log_gap", "log_ratio_gap", "length", "reference", "reference_positive", "moving_mean"
]
SCORES: dict[str, Callable[[Logps], Array]] = {
    "log_ratio": log_ratios,
    "log_ratio_mean": lambda lp: per_token(log_ratios(lp), lp),
    "log_prob": lambda lp: lp.policy.astype(jnp.float32),
    "log_prob_mean": lambda lp: per_token(lp.policy, lp),
    "log_odds": lambda lp: log_odds(per_token(lp.policy, lp)),
    "likelihood": likelihood_rewards,
    "chi_squared": lambda lp: chi_squared_score(log_ratios(lp)),
}


FAR = 12.0  # standard deviations


def _exponential(x: Array) -> Array:
    """Returns e^x, and its tangent beyond `CLAMP`: the gradient there is that at `CLAMP`, not 0."""
    low = jnp.minimum(x, CLAMP)
    return jnp.exp(low) * (1 + x - low)


def _probit(u: Array) -> Array:
    """Returns -log Phi(u); far below 0 by its series, since the derivative is lost to rounding there."""
    far = jnp.minimum(u, -FAR)
    series = far**2 / 2 + jnp.log(-far) + math.log(2 * math.pi) / 2 - jnp.log1p(3 / far**4 - 1 / far**2)
    return jnp.where(u < -FAR, series, -norm.logcdf(jnp.maximum(u, -FAR)))


LINKS: dict[str, Callable[[Array], Array]] = {
    "logistic": lambda u: -log_sigmoid(u),
    "squared": lambda u: (1 - u) ** 2,
    "residual": lambda u: u**2,
    "hinge": lambda u: relu(1 - u),
    "truncated": lambda u: relu(1 - u) ** 2,
    "exponential": lambda u: _exponential(-u),
    "sigmoid": lambda u: sigmoid(-u),
    "savage": lambda u: sigmoid(-u) ** 2,
    "probit": _probit,
    "linear": lambda u: -u,
}
TARGETS: dict[str, Callable[[Logps, Callable[[Logps], Array]], Array | float]] = {
    "zero": lambda lp, rewards: 0.0,
    "constant": lambda lp, rewards: 1.0,
    "gap": lambda lp, rewards: better_by(lp),
    "log_gap": lambda lp, rewards: jnp.log(better_by(lp)),
    "log_ratio_gap": lambda lp, rewards: log_ratio_of_scores(lp, better_by(lp)),
    "length": lambda lp, rewards: -margin(lp.lengths),
    "reference": lambda lp, rewards: margin(rewards(lp._replace(policy=lp.reference))),
    "reference_positive": lambda lp, rewards: relu(margin(rewards(lp._replace(policy=lp.reference)))),
}
RATIOS = {"log_ratio", "log_ratio_mean", "chi_squared"}
GAPS = {"gap", "log_gap", "log_ratio_gap"}
LISTS = {"list", "all_pairs"}


def _moving_mean(lp: Logps, *, score: str, ranking: str, beta: float, decay: float, **_: Any) -> Array:
    """Returns the running mean of margins, or (pointwise) of rewards, with this step's in it: the statistic of axes."""
    require("decay", decay, lambda d: 0 <= d < 1, "at least 0 and below 1")
    z = stop_gradient(beta * SCORES[score](lp))
    weights = lp.weights[:, None] * lp.present
    mean = weighted_mean(z, weights) if ranking == "pointwise" else weighted_mean(margin(z), lp.weights)
    return decay * lp.running + (1 - decay) * mean


def _compared(lp: Logps, z: Array, f: Callable[[Array], Array], t: Array | float, ranking: str, mean: bool) -> Array:
    """Returns the loss of rewards z with a target t, float32[B]; t is a running mean of them if `mean`."""
    if ranking == "list":
        return rank_nll(z)
    c, r = pair(z)
    if ranking == "pair":
        return f(c - r - t)
    return 2 * mean_of_present(f(c - t), f(t - r if mean else -r - t), lp)


def _pairs_of(lp: Logps, ordered: bool) -> Logps:
    """Returns the K = P (P - 1) / 2 pairs of each list, the better response first, as B K comparisons.

    ordered: whether pairs of which the first has not the higher score are absent.
    """
    better, worse = jnp.triu_indices(lp.policy.shape[1], 1)
    pairs = map_responses(lp, lambda x: jnp.stack([x[:, better], x[:, worse]], axis=2).reshape(-1, 2))
    weights = jnp.repeat(lp.weights, len(better))
    counted = pairs.scores[:, 0] > pairs.scores[:, 1] if ordered else True
    return pairs._replace(weights=jnp.where(counted, weights, 0.0), preference=jnp.repeat(lp.preference, len(better)))


def _mean_over_pairs(lp: Logps, point: Callable[[Logps], Array], target: str) -> Array:
    """Returns the mean of a loss of pairs over all of each list, float32[B]; of scores, over those in their order."""
    gap = target in GAPS
    pairs = _pairs_of(lp, gap)
    values = point(pairs).reshape(len(lp.policy), -1)
    if not gap:
        return jnp.mean(values, axis=1)
    counted = (pairs.weights > 0).reshape(values.shape)
    mean = jnp.sum(jnp.where(counted, values, 0.0), axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1)
    return jnp.where(jnp.isnan(better_by(lp)), jnp.nan, mean)


def _rewards(lp: Logps, *, score: str, beta: float, **_: Any) -> Array:
    """Returns beta score, float32[B, P]: the rewards of a point without a reference."""
    return beta * SCORES[score](lp)


def _value(
    lp: Logps,
    ranking: str = "pair",
    *,
    f: Callable[[Array], Array],
    score: str,
    target: str,
    beta: float,
    scale: float,
    decay: float,
) -> Array:
    """Returns the loss of comparisons that are not taken apart, float32[B]; f is the link with its smoothing."""
    z = beta * SCORES[score](lp)
    if target == "moving_mean":
        t = scale * _moving_mean(lp, score=score, ranking=ranking, beta=beta, decay=decay)
        return jnp.where(lp.weights > 0, _compared(lp, z, f, t, ranking, mean=True), 0.0)
    t = scale * TARGETS[target](lp, partial(_rewards, score=score, beta=beta))
    return _compared(lp, z, f, t, ranking, mean=False)


def axes_needs(*, score: str, ranking: str, target: str, **_: Any) -> dict[str, Any]:
    """Returns the fields of the registry's entry that depend on the coordinates."""
    reference, moving = score in RATIOS or target.startswith("reference"), target == "moving_mean"
    return {
        "responses": None if ranking in LISTS else 2,
        "uses_reference": reference,
        "soft_labels": not (moving or ranking in LISTS or target in GAPS),
        "divergences": score in RATIOS - {"chi_squared"} and not target.startswith("reference"),
        "unpaired": ranking == "pointwise",
        "scores": target in GAPS,
        "whole_batch": moving,
        "statistic": _moving_mean if moving else None,
        "implicit_reward": None if reference else _rewards,
    }


def _check_point(score: str, ranking: str, link: str, target: str, label_smoothing: float) -> None:
    """Refuses coordinates that do not go together."""
    if score in RATIOS and target.startswith("reference"):
        raise UserError(f"target {target} is in score {score} already; set target zero, or another score")
    require("label_smoothing", label_smoothing, lambda eps: 0 <= eps < 0.5, "at least 0 and below 0.5")
    if link == "residual" and target == "zero":
        raise UserError("link residual is least where nothing is preferred; set a target, or link squared")
    if ranking == "list" and (link != "logistic" or target != "zero" or label_smoothing != 0):
        raise UserError("ranking list takes link logistic, target zero and no label_smoothing; set ranking all_pairs")
    if ranking == "all_pairs" and target == "moving_mean":
        raise UserError(
            "ranking all_pairs takes no target moving_mean, as margins of other ranks differ; set another target, or "
            "ranking pair"
        )
    if ranking == "pointwise" and target not in ("zero", "constant", "moving_mean"):
        raise UserError(
            f"ranking pointwise takes target zero, constant or moving_mean; {target} is of two responses: set one of "
            "these, or ranking pair"
        )


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True, of_options=axes_needs)
def axes(
    lp: Logps,
    *,
    score: Score = "log_ratio",
    ranking: Ranking = "pair",
    link: Link = "logistic",
    target: Target = "zero",
    beta: float = 0.1,
    scale: float = 1.0,
    decay: float = 0.9,
    label_smoothing: float = 0.0,
) -> Array:
    """A point of the axes score, ranking, link and target (Tang et al. 2024, arXiv 2402.05749).

        z = beta score,  f = link,  t = scale target
        loss = f(z_c - z_r - t)                     ranking pair
        loss = f(z_c - t) + f(-z_r - t)             pointwise (+ t of moving_mean)
        loss = -sum_k log softmax(z_k, z_k+1, ...)_k   list, best first
        loss = mean over i < j of f(z_i - z_j - t_ij)  all_pairs, best first

        score    log_ratio c, log_ratio_mean c / L_c, log_prob p_c, log_prob_mean m_c,
                 log_odds log(e^m_c / (1 - e^m_c)), likelihood e^m_c, chi_squared c + e^c - 1
        link     logistic -log sigmoid(u), squared (1 - u)^2, residual u^2, hinge max(0, 1 - u),
                 truncated max(0, 1 - u)^2, exponential e^-u, sigmoid 1 - sigmoid(u),
                 savage (1 - sigmoid(u))^2, probit -log Phi(u), linear -u
        target   zero, constant 1, gap s_c - s_r, log_gap log(s_c - s_r),
                 log_ratio_gap log(s_c / s_r), length L_r - L_c, reference z_c - z_r of the
                 reference, reference_positive max(0, that), moving_mean of margins or rewards

    A running mean is a constant to the gradient. Beyond u = -80 exponential goes on along its tangent. Pointwise takes
    single responses too, whose values count twice, so that n pairs have the mean of their 2 n responses one by one. Of
    all_pairs the target is each pair's own, that of a gap over the pairs with s_i > s_j. A list has no margin to ask
    for: it takes no target; pointwise none that is of two responses, all_pairs no running mean, as ranks differ.

    Args:
      lp: log-probabilities of B comparisons.
      score: The score of a response.
      ranking: How scores are compared.
      link: The loss of a comparison.
      target: The margin that is asked for, over scale.
      beta: Scale of the scores.
      scale: Scale of the target.
      decay: Of the running mean.
      label_smoothing: The assumed rate of flipped labels: f(u) becomes (1 - eps) f(u) + eps f(-u).

    Returns:
      float32[B].
    """
    _check_point(score, ranking, link, target, label_smoothing)

    def f(u: Array) -> Array:
        return (1 - label_smoothing) * LINKS[link](u) + label_smoothing * LINKS[link](-u)

    point = partial(_value, f=f, score=score, target=target, beta=beta, scale=scale, decay=decay)
    return _mean_over_pairs(lp, point, target) if ranking == "all_pairs" else point(lp, ranking)
