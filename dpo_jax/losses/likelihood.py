"""Losses of one response, P = 1: supervised fine-tuning."""

from typing import Literal

import jax.numpy as jnp

from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


@register(responses=1, uses_reference=False)
def sft(lp: Logps, *, reduction: Literal["sum", "mean"] = "sum") -> Array:
    """Supervised fine-tuning: the negative log-likelihood of the response.

        loss = -sum_t log pi(y_t | x, y_<t), or that over the number of tokens

    Args:
      lp: log-probabilities of B responses.
      reduction: Over a response's tokens: sum, as the original code, or mean.

    Returns:
      float32[B].
    """
    nll = -lp.policy[:, 0]
    return nll if reduction == "sum" else nll / jnp.maximum(lp.lengths[:, 0], 1.0)
