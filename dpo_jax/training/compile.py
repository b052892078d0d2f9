"""A run, and what is done once before its first step: layouts, compiled functions, reference columns."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import distributed, evaluation, losses, optim, reference, sharding
from dpo_jax.config.schema import Config
from dpo_jax.data import order, pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.evaluation import Evaluator
from dpo_jax.logprobs import batch_logps, logps_fn
from dpo_jax.losses import Loss
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.records import Batch, TrainState
from dpo_jax.step import make_train_step
from dpo_jax.training.run import FrozenReference, PolicyShardings, PreparedRun, Run, total_steps
from dpo_jax.training.shard import gather_on_use, policy_shardings, state_shardings


def hparams(config: Config) -> dict[str, Any]:
    """Returns the hyper-parameters that a step takes as arguments, so that other values compile nothing new."""

    def of(section: Any) -> Any:
        return {name: value for name, value in section.items() if isinstance(value, float)}

    return {"loss": [of(term) for term in _terms(config)], "optim": of(config.optim)}


def _terms(config: Config) -> Sequence[Any]:
    return [config.loss] if isinstance(config.loss, Mapping) else config.loss


def loss_with(config: Config, numbers: Any) -> Loss:
    """Returns the config's loss with other `numbers`."""
    return losses.build([{**term, **given} for term, given in zip(_terms(config), numbers["loss"], strict=True)])


def vmap_width(count: int) -> int | None:
    """Returns how many of several runs a program works through at a time: all of them (`vmap`), or None for one after
    another on a processor, where products of batches of matrices are slower than the same products one by one."""
    return None if jax.default_backend() == "cpu" else count


def compiled_step(run: Run, parts: PolicyShardings, like: TrainState, count: int = 1) -> Any:
    """Returns the compiled train step `(states, batch, count, base, numbers) -> (states, metrics)` of `count` runs that
    differ in numbers only, with a list of each: by `jit`, or by `pmap` over devices that each hold the whole state.

    The base of adapters is an argument, so that the program does not hold it.
    """
    config = run.config
    mapped = config.mesh.mode == "pmap"
    if mapped and distributed.is_distributed():
        raise UserError("mesh.mode pmap: is for one process; take jit for several")
    rows = sharding.pmap_collectives(parts.mesh) if mapped else parts.rows
    logps = logps_fn(run.model if mapped else parts.model, run.loss)

    def step(state: TrainState, batch: Batch, count: Any, base: Any, numbers: Any) -> Any:
        tx, loss = optim.build(**{**config.optim, **numbers["optim"]}), loss_with(config, numbers)
        return make_train_step(logps, loss, tx, run.sync, rows, parts.policy)(state, batch, count, base)

    def steps(states: Sequence[TrainState], batch: Batch, micro: Any, base: Any, numbers: Sequence[Any]) -> Any:
        if count == 1:
            found = [step(states[0], batch, micro, base, numbers[0])]
        else:
            each = tuple(jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (states, numbers))
            size = vmap_width(count) if run.model.attention == CHUNKS else None  # a kernel's rows are its only batch
            both = jax.lax.map(lambda one: step(one[0], batch, micro, base, one[1]), each, batch_size=size)
            found = [jax.tree.map(itemgetter(i), both) for i in range(count)]
        return [state for state, _ in found], [metrics for _, metrics in found]

    if not mapped:
        where = [jax.tree.map(lambda x: x.sharding, like)] * count, sharding.replicated(parts.mesh)
        return jax.jit(steps, donate_argnums=0, out_shardings=where)
    each = jax.pmap(steps, sharding.MAPPED, in_axes=(None, 1, None, None, None), out_axes=None)
    devices = sharding.row_devices(parts.mesh)
    by_device = jax.jit(lambda b: jax.tree.map(lambda x: x.reshape(x.shape[0], devices, -1, *x.shape[2:]), b))
    return lambda states, batch, *rest: each(states, by_device(batch), *rest)


def prepare(runs: Sequence[Run], say: Callable[[str], None]) -> PreparedRun:
    """Returns a run on its devices, or several that differ in `numbers` only: everything that is done once, before the
    first step."""
    run, given = runs[0], [hparams(each.config) for each in runs]
    config = run.config
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    choose = partial(
        pack.choose_layout,
        max_length=config.data.max_length,
        batch_size=config.batch_size,
        length=config.data.row_length,
        rows=config.data.rows,
        multiple_of=sharding.row_devices(mesh),
    )
    shape, eval_shape = (_of_this_process(mesh, choose(table)) for table in (run.train, run.held_out))
    put, tx = partial(sharding.put_batch, mesh), optim.build(**config.optim)
    trained, like = state_shardings(run, tx, mesh)
    parts = policy_shardings(run, mesh, trained)
    base = None if parts.base is None else sharding.put_params(run.base, parts.base)
    frozen = FrozenReference() if run.frozen is None else _frozen(run, parts, base, (shape, eval_shape), put, say)
    logps = logps_fn(parts.model, run.loss)
    step = evaluation.jit_eval_step(logps, partial(loss_with, config), parts.rows, parts.policy)
    held_out = run.held_out, frozen.held_out, eval_shape, config.batch_size, put
    steps = total_steps(config, len(run.train))
    say(
        f"{steps} steps of {config.batch_size} comparisons; microbatches of {shape.rows} rows x {shape.length} tokens "
        f"on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    programs = cache(partial(compiled_step, run, parts, like))
    evaluators = [Evaluator(step, *held_out, x) for x in given]
    rows = order.bind_order(config.data.order, run.train.prompts, config.seed)

    def train_step(states: Sequence[TrainState], batch: Batch, count: Any, numbers: Sequence[Any]) -> Any:
        return programs(len(states))(states, batch, count, base, numbers)

    return PreparedRun(parts, shape, put, train_step, base, like, frozen, evaluators, steps, rows)


def _frozen(
    run: Run, parts: PolicyShardings, base: Any, shapes: tuple[pack.Layout, pack.Layout], put: Any, say: Any
) -> FrozenReference:
    """Returns the reference on the devices; that of adapters is their base, which is there already."""
    assert run.frozen is not None
    params = parts.trained if parts.base is None else parts.base
    weights, name = run.frozen()
    weights = base if weights is run.base else sharding.put_params(weights, params)
    rows = sharding.mesh_collectives(parts.mesh, params)
    make = reference.make_ref_logps_fn(partial(batch_logps, gather_on_use(run.model, rows, params)), rows)
    columns = partial(_column, run, make, weights, name, put, say)
    cached = run.config.reference.mode == "cache"
    again = partial(_held_out, make, run.held_out, shapes[1], run.config.batch_size, put)
    return FrozenReference(
        held_out=columns(run.held_out, shapes[1], "held-out"),
        column=columns(run.train, shapes[0], "training") if cached else None,
        fill=None if cached else partial(_fill, make, weights),
        moving=weights if run.sync else (),
        again=again if run.sync else None,
        samples=run.complete(weights) if run.complete else None,
    )


def _of_this_process(mesh: Any, shape: pack.Layout) -> pack.Layout:
    """Returns the layout with the rows that this process builds."""
    parts, size = sharding.local_row_blocks(mesh), shape.rows // sharding.row_devices(mesh)
    return shape._replace(own=(parts.start * size, parts.stop * size))


def _column(run: Run, make: Any, weights: Any, name: str, put: Any, say: Any, table: Table, shape: Any, what: str):
    """Returns the reference column of a table, from the cache or by one pass over it."""
    start = time.perf_counter()
    compute = partial(reference.table_ref_logps, make, weights, table, shape, run.config.batch_size, put)
    key = reference.ref_logps_key(table, name, run.config.model.compute, run.model.attention)
    values, hit = reference.cached_array(run.cache / "reference", key, compute, (len(table), table.responses, 2))
    how = "from the cache" if hit else f"computed in {time.perf_counter() - start:.1f} s"
    say(f"reference log-probs of the {what} data: {how}")
    return values


def _fill(column: Callable, weights: Any, state: TrainState, batch: Batch, count: int) -> Batch:
    """Returns the batch with its reference column filled in just in time, by the state's reference if it moves."""
    return batch._replace(ref_logps=column(state.reference or weights, batch, count))


def _held_out(column: Callable, table: Table, shape: pack.Layout, batch_size: int, put: Callable, state: TrainState):
    """Returns the reference column of the held-out table under a reference that moves."""
    return reference.table_ref_logps(column, state.reference, table, shape, batch_size, put)
