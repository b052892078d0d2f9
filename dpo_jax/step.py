"""Pure train and eval steps. The caller jits them once, with shardings and donation."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from dpo_jax.logprobs import LogpsFn, logps_fn
from dpo_jax.losses import Loss, weighted_means
from dpo_jax.losses.objective import checked_objective
from dpo_jax.microbatches import concat_microbatches, map_microbatches, sum_over_microbatches
from dpo_jax.models.interface import Model
from dpo_jax.models.routing import load_balance
from dpo_jax.optim import checked_transformation, without_untrained
from dpo_jax.records import Array, Batch, Logps, Sync, TrainState
from dpo_jax.sharding import NO_COLLECTIVES, Collectives

Metrics = dict[str, Array]
PolicyFn = Callable[[Any, Any], Any]  # (trained, base) -> the policy's params
Differentiable = tuple[Array, Array, Any]  # Logps.policy, Logps.policy_shared and Logps.routing


def only_trained(trained: Any, base: Any) -> Any:
    """Returns the policy's parameters when all of them are trained."""
    del base
    return trained


def init_state(params: Any, tx: optax.GradientTransformation, loss: Loss, reference: Any = ()) -> TrainState:
    """Returns the state before the first update.

    Args:
      params: the policy.
      tx: any optax transformation.
      loss: the objective of the step; it decides the shape of `TrainState.running`.
      reference: the parameters of a reference that moves (see `Sync`); () for a frozen one.

    Raises:
      UserError: no objective, or no optax transformation.
    """
    carried, start = checked_objective(loss).carried, checked_transformation(tx).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, start, jnp.zeros(carried), reference)


def make_train_step(
    model: Model,
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    sync: Sync | None = None,
    collectives: Collectives = NO_COLLECTIVES,
    policy: PolicyFn = only_trained,
    logps: LogpsFn | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `(state, batch, count, base=None) -> (state, metrics)`, pure and not compiled.

    The gradient is exactly that of the weighted mean loss over the whole batch, accumulated over microbatches in a loop
    whose trip count is a run-time value. A step whose loss or gradient is not finite changes only the step number and
    reports the metric `nonfinite`; so does one whose weights are all 0, with the metric `unweighted`.

    Args:
      model: pure functions of the policy's parameters.
      loss: the objective.
      tx: any optax transformation.
      sync: how the reference follows the policy; None for a frozen one.
      collectives: how devices share rows; the default is for one device, or for jit without manual axes.
      policy: (trained, base) -> the policy's parameters, for adapters.
      logps: (params, one microbatch) -> Logps; by default those of the model that the loss reads.

    Args of the step:
      state: from `init_state`; may be donated, and with it the params that it was made of.
      batch: fields [M, R, ...], with `ref_logps` filled in if the loss uses a reference.
      count: int32[], microbatches that hold any comparison.
      base: parameters that are not trained, for adapters.

    Returns of the step:
      The next state, and weighted means over the batch, float32[], under TRL's names.
    """
    of_pair = _of_pair(logps or logps_fn(model, loss), policy)
    checked_transformation(tx)

    def step(state: TrainState, batch: Batch, count: Array, base: Any = None) -> tuple[TrainState, Metrics]:
        chex.assert_shape(state.running, (loss.carried,), custom_message="make the state with init_state of this loss")
        grads, lp = gradient(of_pair, loss, state, base, batch, count, collectives, model.router_loss)
        metrics = weighted_means(loss.metrics(lp), lp.weights)
        if model.router_loss:
            metrics["aux_loss"] = load_balance(lp.routing)
            metrics["loss"] += model.router_loss * metrics["aux_loss"]
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        weighted = lp.weights.sum() > 0
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)  # a mean without weight is NaN
        new = state._replace(
            params=optax.apply_updates(state.params, without_untrained(updates)),
            opt_state=opt_state,
            running=loss.statistics(lp),
        )
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)._replace(step=state.step + 1)
        metrics |= {"grad_norm": norm, "nonfinite": 1.0 * (weighted & ~finite), "unweighted": 1.0 - weighted}
        return new if sync is None else new._replace(reference=_moved(sync, new)), metrics

    return step


def gradient(
    logps: LogpsFn, loss: Loss, state: TrainState, base: Any, batch: Batch, count: Array, collectives: Collectives,
    router_loss: float = 0.0,
) -> tuple[Any, Logps]:  # fmt: skip
    """Returns the gradient of the weighted mean loss of a step, like params, and its log-probs, float32[M * B, ...].

    `logps` takes (trained, base). Most losses are sums over comparisons, so that each microbatch is differentiated on
    its own and only gradients are accumulated. A loss that looks across comparisons is not: all log-probs of the step
    are computed first (one more forward pass), the loss is differentiated with respect to them, and each microbatch
    then contributes the vector-Jacobian product of its log-probs with its slice of that gradient. So is the router loss
    of a mixture, of weight `router_loss`, exact over the step.
    """
    total, parts = collectives.psum(batch.weights.sum()), (state.params, base)
    total = jnp.where(total > 0, total, 1.0)  # the gradient of a step without weight is 0

    def mean(values: Differentiable, lp: Logps, total: Array, running: Array) -> Array:
        lp = lp._replace(policy=values[0], policy_shared=values[1], routing=values[2], running=running)
        balance = router_loss * load_balance(lp.routing) if router_loss else 0.0
        return jnp.sum(lp.weights / total * loss.values(lp)) + balance

    cotangents = None
    if loss.whole_batch or router_loss:
        lp = concat_microbatches(collectives.gather_rows(_stacked(logps))(parts, batch, count))
        cotangents = jax.grad(mean)(_differentiable(lp), lp, total, state.running)
        cotangents = jax.tree.map(lambda x: x.reshape(batch.tokens.shape[0], -1, *x.shape[1:]), cotangents)

    def sums(parts: tuple, batch: Batch, count: Array, known: tuple) -> tuple[Any, Logps]:
        (trained, base), (total, running, cotangents) = parts, known
        cotangents = jax.tree.map(collectives.own_rows, cotangents)

        def one(micro: Batch, m: Array) -> tuple[Any, Logps]:
            def objective(trained: Any) -> tuple[Array, Logps]:
                lp = logps((trained, base), micro)._replace(running=())
                if cotangents is None:
                    return mean(_differentiable(lp), lp, total, running), lp
                products = jax.tree.map(lambda cotangent, x: jnp.vdot(cotangent[m], x), cotangents, _differentiable(lp))
                return sum(jax.tree.leaves(products)), lp

            return jax.grad(objective, has_aux=True)(trained)

        return sum_over_microbatches(one, batch, count)

    grads, stacked = collectives.reduce(sums)(parts, batch, count, (total, state.running, cotangents))
    return grads, concat_microbatches(stacked)._replace(running=state.running)


def _stacked(logps: LogpsFn) -> Callable[[Any, Batch, Array], Logps]:
    """Returns `(params, batch, count) -> log-probs [M, B, ...]` of a step's microbatches."""

    def stacked(params: Any, batch: Batch, count: Array) -> Logps:
        return map_microbatches(lambda micro: logps(params, micro)._replace(running=()), batch, count)

    return stacked


def _of_pair(logps: LogpsFn, policy: PolicyFn) -> LogpsFn:
    """Returns log-probs as a function of (trained, base) instead of the policy's parameters."""
    return lambda pair, micro: logps(policy(*pair), micro)


def _differentiable(lp: Logps) -> Differentiable:
    return lp.policy, lp.policy_shared, lp.routing


def _moved(sync: Sync, state: TrainState) -> Any:
    """Returns the reference after a step."""

    def mixed() -> Any:
        return jax.tree.map(lambda p, r: sync.alpha * p + (1.0 - sync.alpha) * r, state.params, state.reference)

    return jax.lax.cond(state.step % sync.every == 0, mixed, lambda: state.reference)


def make_eval_step(
    model: Model, loss: Loss, *, collectives: Collectives = NO_COLLECTIVES, policy: PolicyFn = only_trained
) -> Callable[..., Metrics]:
    """Returns `(params, batch, count, running=None, base=None) -> metrics`, pure and not compiled.

    A metric is float32[M, R, G], one value per comparison (`unpack` gives them by example), NaN for absent ones. A loss
    across comparisons sees those of one batch.

    Args:
      model: pure functions of the policy's parameters.
      loss: the objective whose metrics are computed.
      collectives: how devices share rows.
      policy: (trained, base) -> the policy's parameters, for adapters.

    Args of the step:
      params: the policy, or the trained adapters.
      batch, count: as for the train step.
      running: `TrainState.running`; 0 unless given.
      base: parameters that are not trained, for adapters.
    """
    logps = make_logps_step(model, loss, collectives=collectives, policy=policy)

    def step(params: Any, batch: Batch, count: Array, running: Any = None, base: Any = None) -> Metrics:
        running = jnp.zeros(loss.carried) if running is None else running
        return eval_metrics(loss, logps((params, base), batch, count), running, batch.weights)

    return step


def make_logps_step(
    model: Model, loss: Loss, *, collectives: Collectives = NO_COLLECTIVES, policy: PolicyFn = only_trained
) -> Callable[[tuple[Any, Any], Batch, Any], Logps]:
    """Returns `((trained, base), batch, count) -> Logps [M, B, ...]` of all rows, pure and not compiled.

    They are the fields of Logps that the loss reads; other arguments as for `make_eval_step`.
    """
    return collectives.gather_rows(_stacked(_of_pair(logps_fn(model, loss), policy)))


def eval_metrics(loss: Loss, found: Logps, running: Array, weights: Array) -> Metrics:
    """Returns the metrics of a batch by comparison, like its `weights`, from its log-probs [M, B, ...]."""
    metrics = loss.metrics(concat_microbatches(found)._replace(running=running))
    return {name: value.reshape(weights.shape) for name, value in metrics.items()}
