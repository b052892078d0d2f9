"""What several losses are made of. Everything is float32, whatever the log-probs are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from dpo_jax.errors import UserError
from dpo_jax.records import Array, Logps, Missing

# A missing field has no leaves, so that jit, grad and tree.map pass it through.
jax.tree_util.register_pytree_node(Missing, lambda m: ((), m.name), lambda name, _: Missing(name))

CLAMP = 80.0  # e^80 is 6e34: beyond it float32 overflows


def log_ratios(lp: Logps) -> Array:
    """Returns log pi - log ref of each response, float32[B, P]."""
    return lp.policy.astype(jnp.float32) - lp.reference.astype(jnp.float32)


def pair(values: Array) -> tuple[Array, Array]:
    """Returns the chosen and the rejected column of float[B, 2], float32[B] each; any other P is an error."""
    chosen, rejected = values.astype(jnp.float32).T
    return chosen, rejected


def margin(values: Array) -> Array:
    """Returns chosen minus rejected, float[B, 2] -> float32[B]; any other P is an error."""
    chosen, rejected = pair(values)
    return chosen - rejected


def per_token(values: Array, lp: Logps) -> Array:
    """Returns sums over responses, float[B, P], as means over their tokens; a response without tokens has 0."""
    return values.astype(jnp.float32) / jnp.maximum(lp.lengths.astype(jnp.float32), 1.0)


def logistic(z: Array, label_smoothing: float = 0.0) -> Array:
    """Returns the loss of a classifier with logit z whose label is 1, or wrong with probability `label_smoothing`.

    Raises:
      UserError: labels that are wrong at least as often as right.
    """
    require("label_smoothing", label_smoothing, lambda eps: 0 <= eps < 0.5, "at least 0 and below 0.5")
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def power(x: Array, a: float) -> Array:
    """Returns (e^(a x) - 1) / a, which is x at a = 0; the exponent is held at 80, lest it overflow."""
    zero = jnp.abs(a) < 1e-6
    safe = jnp.where(zero, 1.0, a)
    return jnp.where(zero, x, jnp.expm1(jnp.minimum(safe * x, CLAMP)) / safe)


def weighted_mean(values: Array, weights: Array) -> Array:
    """Returns the mean of values by weights of the same shape; 0 where all of them are 0."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0)) / jnp.maximum(jnp.sum(weights), 1e-9)


def require(name: str, value: float, holds: Callable[[float], bool], what: str) -> None:
    """Raises a UserError where a hyper-parameter has no meaning; a traced one cannot be looked at."""
    if isinstance(value, int | float) and not holds(value):
        raise UserError(f"{name} {value} cannot be used: it must be {what}")


class Entry(NamedTuple):
    """A registered loss.

    Attributes:
      function: `(Logps, *, hyper-parameters) -> float32[B]`.
      responses: the P that it needs; None for any P from 2 on.
      uses_reference: whether it reads `Logps.reference`.
      whole_batch: whether a comparison's value depends on others, so that it must see a step's comparisons at once.
      statistic: `(Logps, *, the same hyper-parameters) -> float32[]`, what `Logps.running` becomes after a step, for a
        loss that carries a number from step to step; it starts at 0.
      soft_labels: whether a pair may be mostly, not surely, won by its first response.
      divergences: whether other f-divergences than the reverse KL make sense in it.
      unpaired: whether a response of a pair may be absent.
      mismatched: whether it needs a last response that was written for another prompt.
      scores: whether it needs ratings of the responses, the first's above the last's.
      rewards: whether `Logps.policy` must be the rewards of a reward model.
    """

    function: Callable[..., Array]
    responses: int | None
    uses_reference: bool
    whole_batch: bool = False
    statistic: Callable[..., Array] | None = None
    soft_labels: bool = False
    divergences: bool = False
    unpaired: bool = False
    mismatched: bool = False
    scores: bool = False
    rewards: bool = False


REGISTRY: dict[str, Entry] = {}


def register(*, responses: int | None, uses_reference: bool, **needs: Any) -> Callable[[Callable], Callable]:
    """Returns a decorator that files a loss under its function's name, with the other fields of its `Entry`; a name
    given twice is an error."""

    def file(function: Callable) -> Callable:
        name = function.__name__
        if name in REGISTRY:
            raise ValueError(f"loss {name!r} is registered twice")
        REGISTRY[name] = Entry(function, responses, uses_reference, **needs)
        return function

    return file
