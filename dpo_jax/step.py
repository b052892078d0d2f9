"""The pure train and eval steps; whoever calls them compiles them once, with shardings and donation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.logprobs import LogpsFn, concat_microbatches, map_microbatches, sum_over_microbatches
from dpo_jax.losses import Loss, weighted_means
from dpo_jax.records import Array, Batch, Logps, TrainState
from dpo_jax.sharding import NO_COLLECTIVES, Collectives

Metrics = dict[str, Array]
PolicyFn = Callable[[Any, Any], Any]  # (trained, base) -> the policy's params
Differentiable = tuple[Array, Array]  # Logps.policy and .policy_shared


class Sync(NamedTuple):
    """How a reference follows the policy (TR-DPO, arXiv 2404.09656): every `every` steps it becomes
    alpha * policy + (1 - alpha) * reference; alpha 1 is the paper's hard update, `every` 1 an exponential average.
    """

    every: int
    alpha: float


def only_trained(trained: Any, base: Any) -> Any:
    """Returns the policy's parameters where all of them are trained."""
    del base
    return trained


def init_state(params: Any, tx: optax.GradientTransformation, terms: int = 1, reference: Any = ()) -> TrainState:
    """Returns the state before the first update.

    Args:
      params: the policy.
      tx: the optimiser.
      terms: of the loss.
      reference: one that is to move; () for one that stays.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.zeros(terms), reference)


def make_train_step(
    logps: LogpsFn,
    loss: Loss,
    tx: optax.GradientTransformation,
    sync: Sync | None = None,
    rows: Collectives = NO_COLLECTIVES,
    policy: PolicyFn = only_trained,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `(state, batch, count, base=None) -> (state, metrics)`, pure and not yet compiled.

    The gradient is exactly that of the weighted mean loss over the whole batch, taken microbatch by microbatch in a
    loop whose trip count is a run-time value. A step whose loss or gradient is not finite changes nothing but the
    step number, and says so in the metric `nonfinite`.

    Args:
      logps: log-probs of a microbatch.
      loss: bound.
      tx: the optimiser.
      sync: how the reference follows the policy, if it does.
      rows: how devices share the rows of a microbatch.
      policy: makes the policy's parameters of what is trained and what is not.

    Args of the step:
      state: may be donated.
      batch: fields [M, R, ...].
      count: int32[], the microbatches that hold anything.
      base: what is not trained: the parameters that adapters are for.

    Metrics: weighted means over the batch, float32[], under TRL's names.
    """

    def step(state: TrainState, batch: Batch, count: Array, base: Any = None) -> tuple[TrainState, Metrics]:
        grads, lp = gradient(_of_parts(logps, policy), loss, state, base, batch, count, rows)
        metrics = weighted_means(loss.metrics(lp), lp.weights)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = state._replace(
            params=optax.apply_updates(state.params, updates), opt_state=opt_state, running=loss.statistics(lp)
        )
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)._replace(step=state.step + 1)
        metrics |= {"grad_norm": norm, "nonfinite": 1.0 - finite}
        return new if sync is None else new._replace(reference=_moved(sync, new)), metrics

    return step


def gradient(
    logps: LogpsFn, loss: Loss, state: TrainState, base: Any, batch: Batch, count: Array, rows: Collectives
) -> tuple[Any, Logps]:
    """Returns the gradient of the weighted mean loss of a step, like params, and the log-probs of its comparisons,
    float32[M * B, ...]; `logps` takes (trained, base).

    A loss that looks across comparisons is first differentiated with respect to the log-probs of the whole step, which
    costs a forward pass more; then each microbatch goes backward from its share of that.
    """
    total, parts = rows.total(batch.weights.sum()), (state.params, base)

    def mean(values: Differentiable, lp: Logps, total: Array, running: Array) -> Array:
        lp = lp._replace(policy=values[0], policy_shared=values[1], running=running)
        return jnp.sum(lp.weights / total * loss.values(lp))

    slopes = None
    if loss.whole_batch:
        lp = concat_microbatches(rows.all(_stacked(logps))(parts, batch, count))
        slopes = jax.grad(mean)(_differentiable(lp), lp, total, state.running)
        slopes = jax.tree.map(lambda x: x.reshape(batch.tokens.shape[0], -1, x.shape[-1]), slopes)

    def sums(parts: tuple, batch: Batch, count: Array, known: tuple) -> tuple[Any, Logps]:
        (trained, base), (total, running, slopes) = parts, known
        slopes = jax.tree.map(rows.own, slopes)

        def one(micro: Batch, m: Array) -> tuple[Any, Logps]:
            def objective(trained: Any) -> tuple[Array, Logps]:
                lp = logps((trained, base), micro)._replace(running=())
                if slopes is None:
                    return mean(_differentiable(lp), lp, total, running), lp
                return sum(jnp.vdot(s[m], x) for s, x in zip(slopes, _differentiable(lp), strict=True)), lp

            return jax.grad(objective, has_aux=True)(trained)

        return sum_over_microbatches(one, batch, count)

    grads, stacked = rows.sums(sums)(parts, batch, count, (total, state.running, slopes))
    return grads, concat_microbatches(stacked)._replace(running=state.running)


def _stacked(logps: LogpsFn) -> Callable[[Any, Batch, Array], Logps]:
    """Returns `(params, batch, count) -> log-probs [M, B, ...]` of a whole step."""

    def stacked(params: Any, batch: Batch, count: Array) -> Logps:
        return map_microbatches(lambda micro: logps(params, micro)._replace(running=()), batch, count)

    return stacked


def _of_parts(logps: LogpsFn, policy: PolicyFn) -> LogpsFn:
    """Returns log-probs of a policy that is given as (trained, base)."""
    return lambda parts, micro: logps(policy(*parts), micro)


def _differentiable(lp: Logps) -> Differentiable:
    return lp.policy, lp.policy_shared


def _moved(sync: Sync, state: TrainState) -> Any:
    """Returns the reference after a step."""

    def mixed() -> Any:
        return jax.tree.map(lambda p, r: sync.alpha * p + (1.0 - sync.alpha) * r, state.params, state.reference)

    return jax.lax.cond(state.step % sync.every == 0, mixed, lambda: state.reference)


def make_eval_step(
    logps: LogpsFn, loss: Loss, rows: Collectives = NO_COLLECTIVES, policy: PolicyFn = only_trained
) -> Callable[[tuple, Array, Batch, Array], Metrics]:
    """Returns `((trained, base), running, batch, count) -> metrics`, float32[M, R, G]: a value for each comparison, not
    yet averaged.

    `running` is `TrainState.running`. A loss that looks across comparisons sees those of one batch.
    """

    def step(parts: tuple, running: Array, batch: Batch, count: Array) -> Metrics:
        found = rows.all(_stacked(_of_parts(logps, policy)))(parts, batch, count)
        metrics = loss.metrics(concat_microbatches(found)._replace(running=running))
        return {name: value.reshape(batch.weights.shape) for name, value in metrics.items()}

    return step
