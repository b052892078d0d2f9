"""Loops over the microbatches of a step, as many as it has: their number is a run-time value."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.records import Array, Batch, Logps


def sum_over_microbatches(function: Callable[[Batch, Array], tuple[Any, Any]], batch: Batch, count: Array) -> tuple:
    """Runs `function(microbatch, m) -> (to sum, to stack)` over the first `count` microbatches.

    Returns the sum, and the stack on a leading axis M with zeros beyond `count`. `count` is a run-time value: a step
    with fewer microbatches costs less and compiles nothing new.
    """

    batch = jax.tree.map(jnp.asarray, batch)  # numpy arrays take no traced index

    def one(m: Array) -> tuple[Any, Any]:
        return function(jax.tree.map(lambda x: x[m], batch), m)

    def body(m: Array, so_far: tuple[Any, Any]) -> tuple[Any, Any]:
        summed, stacked = one(m)
        stack = jax.tree.map(lambda all_, new: all_.at[m].set(new), so_far[1], stacked)
        return jax.tree.map(jnp.add, so_far[0], summed), stack

    many = batch.tokens.shape[0]
    if many == 1:
        # In a loop over one index the body does not change, so that XLA moves it in front of the loop and keeps it too.
        summed, stacked = one(jnp.zeros((), jnp.int32))
        return summed, jax.tree.map(lambda x: x[None], stacked)
    summed, stacked = jax.eval_shape(one, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), summed)
    return jax.lax.fori_loop(
        0, count, body, (zeros, jax.tree.map(lambda s: jnp.zeros((many, *s.shape), s.dtype), stacked))
    )


def map_microbatches(function: Callable[[Batch], Any], batch: Batch, count: Array) -> Any:
    """Returns `function` of each of the first `count` microbatches, stacked on a leading axis M, zeros beyond."""
    return sum_over_microbatches(lambda micro, _: ((), function(micro)), batch, count)[1]


def concat_microbatches(stacked: Logps) -> Logps:
    """Returns log-probs stacked by microbatch, [M, B, ...], as [M * B, ...]; `running` becomes 0."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked._replace(running=()))
    return flat._replace(running=jnp.zeros(()))
