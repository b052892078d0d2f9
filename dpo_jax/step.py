"""The pure train and eval steps; whoever calls them compiles them once, with shardings and donation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.logprobs import per_microbatch
from dpo_jax.losses import Loss
from dpo_jax.records import Array, Batch, Logps, TrainState
from dpo_jax.sharding import ALONE, Rows

LogpsOf = Callable[[Any, Batch], Logps]  # (params, one microbatch) -> Logps
Metrics = dict[str, Array]


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_train_step(
    logps: LogpsOf, loss: Loss, tx: optax.GradientTransformation, rows: Rows = ALONE
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """Returns `(state, batch, count) -> (state, metrics)`, pure and not yet compiled.

    The gradient is exactly that of the weighted mean loss over the whole batch, taken microbatch by microbatch in a
    loop whose trip count is a run-time value. A step whose loss or gradient is not finite changes nothing but the
    step number, and says so in the metric `nonfinite`.

    Args:
      logps: log-probs of a microbatch.
      loss: bound.
      tx: the optimiser.
      rows: how devices share the rows of a microbatch.

    Args of the step:
      state: may be donated.
      batch: fields [M, R, ...].
      count: int32[], the microbatches that hold anything.

    Metrics: weighted means over the batch, float32[], under TRL's names.
    """

    def objective(params: Any, micro: Batch, total: Array) -> tuple[Array, Metrics]:
        lp = logps(params, micro)
        share = lp.weights / total
        metrics = {name: jnp.sum(share * value) for name, value in loss.metrics(lp).items()}
        return metrics["loss"], metrics

    def step(state: TrainState, batch: Batch, count: Array) -> tuple[TrainState, Metrics]:
        grads, metrics = rows.sums(partial(_summed, objective, rows.total))(state.params, batch, count)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = TrainState(state.step, optax.apply_updates(state.params, updates), opt_state)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        metrics |= {"grad_norm": norm, "nonfinite": 1.0 - finite}
        return new._replace(step=state.step + 1), metrics

    return step


def _summed(
    objective: Callable, everywhere: Callable[[Array], Array], params: Any, batch: Batch, count: Array
) -> tuple[Any, Metrics]:
    """Returns the sums over microbatches of the gradient and the metrics of `objective`."""
    total = everywhere(batch.weights.sum())

    def one(m: Array) -> tuple[Any, Metrics]:
        micro = jax.tree.map(lambda x: x[m], batch)
        return jax.grad(objective, has_aux=True)(params, micro, total)

    shapes = jax.eval_shape(one, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.fori_loop(0, count, lambda m, sums: jax.tree.map(jnp.add, sums, one(m)), zeros)


def make_eval_step(logps: LogpsOf, loss: Loss) -> Callable[[Any, Batch, Array], Metrics]:
    """Returns `(params, batch, count) -> metrics`, each float32[M, R, G]: one value a comparison, not yet averaged."""

    def step(params: Any, batch: Batch, count: Array) -> Metrics:
        def one(micro: Batch) -> Metrics:
            return {k: v.reshape(micro.weights.shape) for k, v in loss.metrics(logps(params, micro)).items()}

        return per_microbatch(one, batch, count)

    return step
