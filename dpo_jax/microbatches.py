"""Loops over the microbatches of a step, as many as it has: their number is a run-time value."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from dpo_jax.records import Array, Batch, Logps


def sum_over_microbatches(function: Callable[[Batch, Array], tuple[Any, Any]], batch: Batch, count: Array) -> tuple:
    """Runs `function(microbatch, m) -> (to sum, to stack)` over the first `count` microbatches.

    Returns the sum, and the stack on a leading axis M with zeros beyond `count`. `count` is a run-time value: a step
    with fewer microbatches costs less and compiles nothing new.
    """

    batch = jax.tree.map(jnp.asarray, batch)  # numpy arrays take no traced index

    def one(m: Array) -> tuple[Any, Any]:
        return function(jax.tree.map(lambda x: x[m], batch), m)

    many = batch.tokens.shape[0]
    if many == 1:
        # In a loop over one index the body does not change, so that XLA moves it in front of the loop and keeps it too.
        summed, stacked = one(jnp.zeros((), jnp.int32))
        return summed, jax.tree.map(lambda x: x[None], stacked)
    traced, (summed, stacked) = _traced_once(one, jnp.zeros((), jnp.int32))

    def body(m: Array, so_far: tuple[Any, Any]) -> tuple[Any, Any]:
        summed, stacked = traced(m)
        stack = jax.tree.map(lambda all_, new: all_.at[m].set(new), so_far[1], stacked)
        return jax.tree.map(jnp.add, so_far[0], summed), stack

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), summed)
    stacks = jax.tree.map(lambda s: jnp.zeros((many, *s.shape), s.dtype), stacked)
    return jax.lax.fori_loop(0, count, body, (zeros, stacks))


def _traced_once(function: Callable, example: Array) -> tuple[Callable, Any]:
    """Returns a function as its equations, and the shapes of its result; `eval_shape` would trace a gradient again."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(example)
    run, kind = jaxpr_as_fun(traced), jax.tree.structure(shapes)
    return lambda x: kind.unflatten(run(x)), shapes


def map_microbatches(function: Callable[[Batch], Any], batch: Batch, count: Array) -> Any:
    """Returns `function` of each of the first `count` microbatches, stacked on a leading axis M, zeros beyond."""
    return sum_over_microbatches(lambda micro, _: ((), function(micro)), batch, count)[1]


def concat_microbatches(stacked: Logps) -> Logps:
    """Returns log-probs stacked by microbatch, [M, B, ...], as [M * B, ...]; `running` becomes 0."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked._replace(running=()))
    return flat._replace(running=jnp.zeros(()))
