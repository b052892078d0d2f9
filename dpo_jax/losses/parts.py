"""Building blocks of losses. Everything is computed in float32, whatever the dtype of the log-probs."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import log_sigmoid

from dpo_jax.errors import UserError
from dpo_jax.records import Array, Logps

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
    """Returns sums over responses, float[B, P], as means over their tokens by weight; one without tokens has its sum,
    which is 0."""
    mass = (lp.lengths if isinstance(lp.mass, tuple) else lp.mass).astype(jnp.float32)
    return values.astype(jnp.float32) / jnp.where(mass > 0, mass, 1.0)


def logistic(z: Array, label_smoothing: float = 0.0) -> Array:
    """Returns the loss of a classifier with logit z whose label is 1, or wrong with probability `label_smoothing`.

    Raises:
      UserError: labels that are wrong at least as often as right.
    """
    require("label_smoothing", label_smoothing, lambda eps: 0 <= eps < 0.5, "at least 0 and below 0.5")
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def power(x: Array, a: float) -> Array:
    """Returns (e^(a x) - 1) / a, which is x at a = 0; the exponent is clipped at 80, so that it does not overflow."""
    zero = jnp.abs(a) < 1e-6
    safe = jnp.where(zero, 1.0, a)
    return jnp.where(zero, x, jnp.expm1(jnp.minimum(safe * x, CLAMP)) / safe)


def chi_squared_score(x: Array) -> Array:
    """Returns e^x - 1 + x, the score of chi^2 / 2 + KL for log-ratios x; the exponent is clipped at 80."""
    return power(x, 1.0) + x


def weighted_mean(values: Array, weights: Array) -> Array:
    """Returns the mean of values by weights of the same shape; 0 where all of them are 0."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0)) / jnp.maximum(jnp.sum(weights), 1e-9)


def require(name: str, value: float, holds: Callable[[float], bool], what: str) -> None:
    """Raises a UserError unless `holds(value)`; traced values are checked before tracing."""
    if isinstance(value, int | float) and not holds(value):
        raise UserError(f"{name} {value} cannot be used: it must be {what}")
