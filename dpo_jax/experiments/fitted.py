"""The reward that a loss fits to its labels, and how far its probabilities of preferences are from the true ones.

A loss fits a reward where its mean over Bradley-Terry labels of all pairs is least at the true one (over the orders of
lists for a loss of rankings, over the true scores for one that reads scores). Pair by pair, a link of margin u is least
where the label has probability p at

    logistic, savage   u = log(p / (1 - p)): sigmoid(u) is p
    exponential        u = 1/2 log(p / (1 - p)): sigmoid(2 u) is p
    squared, truncated u = 2 p - 1
    probit             u = the normal quantile of p
    hinge              u = 1 or -1, whatever p
    sigmoid, linear    u infinite
    residual           u = 0

(Reid and Williamson 2010, "Composite binary losses"). With p = sigmoid(r_i - r_j) only those of
the first two lines are margins of a reward. A loss that compares each response with a fixed point fits how often it is
the chosen one; labels that are smoothed, and targets that are asked for in either order, move the least point too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import losses
from dpo_jax.experiments.table_world import TableWorld
from dpo_jax.losses import Logps
from dpo_jax.losses.axes import SCORES
from dpo_jax.losses.parts import log_ratios
from dpo_jax.losses.points import POINTS, terms_of
from dpo_jax.losses.registry import find_entry
from dpo_jax.losses.term import BoundTerm, bind_term
from dpo_jax.records import Array

GAINS = {"logistic": 1.0, "savage": 1.0, "exponential": 2.0}  # link -> gain: its probability is sigmoid(gain u)
SCORED = ("lipo", "exo_rw", "rpo_bwd", "rpo_fwd")  # no points of the axes; least at the scores
Term = Mapping[str, Any]


def fitted_rewards(term: Term, lp: Logps) -> Array:
    """Returns the reward that a loss fits, of the first response of each comparison, float32[B]; NaN if it fits none.

    A loss of the user's own has the rewards that its metrics report.

    Args:
      term: a term of `losses.build`, whose beta may be traced.
      lp: log-probs of B responses, each as often as the loss has responses.
    """
    name, none = term["name"], jnp.full(lp.policy.shape[0], jnp.nan)
    bound = bind_term(name, find_entry(name), {key: value for key, value in term.items() if key != "name"})
    if not str(bound.entry.function.__module__).startswith("dpo_jax."):
        return losses.build(dict(term)).metrics(lp).get("rewards/chosen", none)
    if bound.transform["ld_alpha"] != 1 or any(value != 1 for value in bound.reject.values()):
        return none  # what a response counts depends on the other one
    shown, place = bound.shown(lp), _place(bound)
    if name in SCORED:
        scale = bound.hyper.get("temperature", 1.0) / bound.hyper.get("eta", 1.0)
        return (scale * bound.hyper["beta"] * log_ratios(shown))[:, 0]
    return none if place is None else _fitted_at(place, shown, none)


def _place(bound: BoundTerm) -> dict[str, Any] | None:
    """Returns all options of the point of the axes that a term is; None: it is none, or has a likelihood beside."""
    if bound.name == "axes":
        return bound.hyper
    if bound.name not in POINTS:
        return None
    point, *beside = terms_of(bound.name, bound.hyper)
    return None if any(term["weight"] for term in beside) else {**(losses.axes.__kwdefaults__ or {}), **point}


def _fitted_at(place: Mapping[str, Any], lp: Logps, none: Array) -> Array:
    """Returns the reward that a point of the axes fits, float32[B], or `none`: beta score, less a target of each."""

    def rewards(lp: Logps) -> Array:
        return (place["beta"] * SCORES[place["score"]](lp))[:, 0]

    scale, link, smoothing = (place[key] for key in ("scale", "link", "label_smoothing"))
    target = place["target"] if scale != 0 else "zero"
    if smoothing != 0 or place["ranking"] == "pointwise":
        return none
    if (link, target) == ("residual", "gap"):
        return rewards(lp) / scale
    if link not in GAINS or target not in ("zero", "length", "reference"):
        return none
    own = {"zero": lambda: 0.0, "length": lambda: -lp.lengths[:, 0], "reference": lambda: rewards(_of_reference(lp))}
    return GAINS[link] * (rewards(lp) - scale * own[target]())


def _of_reference(lp: Logps) -> Logps:
    return lp._replace(policy=lp.reference)


def calibration_error(rewards: Array, world: TableWorld) -> Array:
    """Returns the mean |sigmoid(difference of rewards) - sigmoid(difference of true rewards)|, float32[].

    Over pairs of responses that the reference writes to a prompt, and prompts.
    """
    mass = jnp.exp(world.reference)
    gaps = [jax.nn.sigmoid(r[:, :, None] - r[:, None, :]) for r in (rewards, world.reward)]
    return jnp.einsum("xi,xj,xij->x", mass, mass, jnp.abs(gaps[0] - gaps[1])).mean()
