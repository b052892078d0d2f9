"""A run, and what is done once before its first step: layouts, compiled functions, reference columns."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import evaluate, losses, optim, processes, reference, sharding
from dpo_jax.config import Config
from dpo_jax.data import order, pack
from dpo_jax.data.table import Table
from dpo_jax.evaluate import Evaluator
from dpo_jax.logprobs import batch_logps, shown
from dpo_jax.losses import Loss
from dpo_jax.models import Model, lora, qlora
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.models.lora import Lora
from dpo_jax.records import Batch, TrainState, UserError
from dpo_jax.sharding import Rows
from dpo_jax.step import Sync, init_state, make_train_step, only_trained


class Run(NamedTuple):
    """All that a run is made of, assembled.

    Attributes:
      config: as resolved.
      folder: where everything is written.
      lock: what holds the folder against other writers, until `train` has ended.
      cache: folder of reference columns.
      model: pure functions of the architecture.
      loss: bound.
      sync: how the reference follows the policy; None where it stays.
      params: host or stored arrays, what is trained, at the start: all of the policy, or its adapters.
      frozen: returns (host or stored arrays of the reference, their hash); None for a loss without a reference.
      train: table of comparisons.
      held_out: table of comparisons to evaluate on.
      complete: (params) -> completions of the sample prompts as text; None for no samples.
      prompts: the sample prompts as text.
      export: (params, folder) writes the model.
      base: host or stored arrays of the model that adapters are for; None where all of the policy is trained.
      lora: what the adapters are; None likewise.
    """

    config: Config
    folder: Path
    lock: contextlib.AbstractContextManager
    cache: Path
    model: Model
    loss: Loss
    sync: Sync | None
    params: Any
    frozen: Callable[[], tuple[Any, str]] | None
    train: Table
    held_out: Table
    complete: Callable[[Any], list[str]] | None
    prompts: list[str]
    export: Callable[[Any, Path], None]
    base: Any = None
    lora: Lora | None = None


class Parts(NamedTuple):
    """How what a policy is made of lies on the devices.

    Attributes:
      mesh: of the devices.
      trained: tree of shardings of what is trained.
      base: of the model that adapters are for; None where all of the policy is trained.
      policy: (trained, base) -> the policy's parameters.
      rows: how devices share the rows of a batch.
      model: pure functions of the policy's parameters as they lie.
    """

    mesh: Any
    trained: Any
    base: Any
    policy: Callable[[Any, Any], Any]
    rows: Rows
    model: Model


class Frozen(NamedTuple):
    """The reference on the devices; nothing of it for a loss without one.

    Attributes:
      column: float32[N, P, 2], of the training data, if it is computed ahead.
      fill: (state, batch, count) -> the batch with its column, if it is computed just in time.
      held_out: float32[N, P, 2], of the held-out data.
      moving: its parameters at the start, if it moves.
      again: state -> `held_out` once more, if it moves.
      samples: its completions of the sample prompts.
    """

    column: np.ndarray | None = None
    fill: Callable[[TrainState, Batch, int], Batch] | None = None
    held_out: np.ndarray | None = None
    moving: Any = ()
    again: Callable[[TrainState], np.ndarray] | None = None
    samples: list[str] | None = None


class Prepared(NamedTuple):
    """A run on its devices, or several that differ in `numbers` only: compiled functions, layouts, columns.

    Attributes:
      parts: how the policy lies on the devices.
      shape: of a batch.
      put: moves a Batch to the devices.
      step: the compiled train step, `(states, batch, count, numbers) -> (states, metrics)`, with one of each for every
        run that takes part.
      base: what adapters are for, on the devices.
      like: shapes and shardings of the state.
      frozen: the reference.
      evaluators: of the held-out data, one for each run.
      total_steps: of the run.
      order: of the training data.
    """

    parts: Parts
    shape: pack.Shape
    put: Callable
    step: Callable
    base: Any
    like: TrainState
    frozen: Frozen
    evaluators: list[Evaluator]
    total_steps: int
    order: order.Order


def total_steps(config: Config, rows: int) -> int:
    """Returns the number of updates of a run over a table of `rows` comparisons."""
    steps = config.epochs * order.steps_per_epoch(rows, config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def initialise(model: Model, seed: int) -> Any:
    """Returns random parameters as host arrays."""
    return jax.device_get(jax.jit(model.init)(jax.random.key(seed)))


def layer_by_layer(function: Callable, kernel: Any) -> Any:
    """Returns a function's results for each layer of a kernel [L, ...], stacked, as host arrays."""
    compiled = jax.jit(function)
    return jax.tree.map(lambda *x: np.stack(x), *(jax.device_get(compiled(kernel[i])) for i in range(kernel.shape[0])))


def shardings_of(run: Run, tx: Any, mesh: Any) -> tuple[Any, TrainState]:
    """Returns the parameters' shardings, and the shapes and shardings of the whole state; allocates nothing."""
    shapes = jax.eval_shape(lambda p: init_state(p, tx, run.loss.terms, p if run.sync else ()), run.params)
    axes = run.model.axes if run.lora is None else lora.axes(run.model.architecture, run.model.axes, run.lora)
    params = sharding.of_params(mesh, axes, shapes.params)
    where = sharding.of_state(mesh, params, shapes)
    like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return params, like


def parts_of(run: Run, mesh: Any, trained: Any) -> Parts:
    """Returns how the policy lies on a mesh, given the shardings of what is trained."""
    if run.lora is None:
        rows = sharding.split_rows(mesh, (trained, None))
        return Parts(mesh, trained, None, only_trained, rows, in_parts(run.model, rows, trained))
    adapted, architecture = run.lora, run.model.architecture

    def policy(adapters: Any, base: Any) -> Any:
        return lora.joined(architecture, base, adapters, adapted)

    axes = qlora.axes(run.model.axes, run.base)
    base = sharding.of_params(mesh, axes, run.base)
    shapes = jax.eval_shape(
        policy, run.params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.base)
    )
    whole = sharding.of_params(mesh, lora.joined_axes(architecture, run.model.axes, axes, adapted), shapes)
    rows = sharding.split_rows(mesh, (trained, base))
    return Parts(mesh, trained, base, policy, rows, in_parts(run.model, rows, whole))


def in_parts(model: Model, rows: Rows, params: Any) -> Model:
    """Returns the model for parameters as they lie on the devices, made whole where they are used: a layer at a time.

    Args:
      model: for whole parameters.
      rows: how devices share rows.
      params: tree of the parameters' shardings.
    """
    whole = rows.whole
    if whole is None:
        return model

    def top(tree: Any) -> Any:
        rest = {k: v for k, v in tree.items() if k != "layers"}
        return whole(rest, {k: params[k] for k in rest}) | {"layers": tree["layers"]}

    def layer(tree: Any) -> Any:
        return whole(tree, params["layers"])

    return model._replace(
        hidden=lambda tree, *fields: model.hidden(top(tree), *fields, whole=layer),
        head=lambda tree: model.head(top(tree)),
    )


def numbers(config: Config) -> dict[str, Any]:
    """Returns the hyper-parameters that a step takes as arguments, so that other values compile nothing new."""

    def of(section: Any) -> Any:
        return {name: value for name, value in section.items() if isinstance(value, float)}

    return {"loss": [of(term) for term in _terms(config)], "optim": of(config.optim)}


def _terms(config: Config) -> Sequence[Any]:
    return [config.loss] if isinstance(config.loss, Mapping) else config.loss


def loss_with(config: Config, numbers: Any) -> Loss:
    """Returns the config's loss with other `numbers`."""
    return losses.build([{**term, **given} for term, given in zip(_terms(config), numbers["loss"], strict=True)])


def at_once(count: int) -> int | None:
    """Returns how many of several runs a program works through at a time: all of them (`vmap`), or None for one after
    another on a processor, where products of batches of matrices are slower than the same products one by one."""
    return None if jax.default_backend() == "cpu" else count


def compiled_step(run: Run, parts: Parts, like: TrainState, count: int = 1) -> Any:
    """Returns the compiled train step `(states, batch, count, base, numbers) -> (states, metrics)` of `count` runs that
    differ in numbers only, with a list of each: by `jit`, or by `pmap` over devices that each hold the whole state.

    The base of adapters is an argument, so that the program does not hold it.
    """
    config = run.config
    mapped = config.mesh.mode == "pmap"
    if mapped and processes.several():
        raise UserError("mesh.mode pmap: is for one process; take jit for several")
    rows = sharding.mapped_rows(parts.mesh) if mapped else parts.rows
    logps = shown(run.model if mapped else parts.model, run.loss)

    def step(state: TrainState, batch: Batch, count: Any, base: Any, numbers: Any) -> Any:
        tx, loss = optim.build(**{**config.optim, **numbers["optim"]}), loss_with(config, numbers)
        return make_train_step(logps, loss, tx, run.sync, rows, parts.policy)(state, batch, count, base)

    def steps(states: Sequence[TrainState], batch: Batch, micro: Any, base: Any, numbers: Sequence[Any]) -> Any:
        if count == 1:
            found = [step(states[0], batch, micro, base, numbers[0])]
        else:
            each = tuple(jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (states, numbers))
            size = at_once(count) if run.model.attention == CHUNKS else None  # a kernel's rows are its only batch
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


def prepare(runs: Sequence[Run], say: Callable[[str], None]) -> Prepared:
    """Returns a run on its devices, or several that differ in `numbers` only: everything that is done once, before the
    first step."""
    run, given = runs[0], [numbers(each.config) for each in runs]
    config = run.config
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    choose = partial(
        pack.choose,
        max_length=config.data.max_length,
        batch_size=config.batch_size,
        length=config.data.row_length,
        rows=config.data.rows,
        multiple_of=sharding.row_devices(mesh),
    )
    shape, eval_shape = (_of_this_process(mesh, choose(table)) for table in (run.train, run.held_out))
    put, tx = partial(sharding.put_batch, mesh), optim.build(**config.optim)
    trained, like = shardings_of(run, tx, mesh)
    parts = parts_of(run, mesh, trained)
    base = None if parts.base is None else sharding.put(run.base, parts.base)
    frozen = Frozen() if run.frozen is None else _frozen(run, parts, base, (shape, eval_shape), put, say)
    logps = shown(parts.model, run.loss)
    step = evaluate.make_step(logps, partial(loss_with, config), parts.rows, parts.policy)
    held_out = run.held_out, frozen.held_out, eval_shape, config.batch_size, put
    steps = total_steps(config, len(run.train))
    say(
        f"{steps} steps of {config.batch_size} comparisons; microbatches of {shape.rows} rows x {shape.length} tokens "
        f"on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    programs = cache(partial(compiled_step, run, parts, like))
    evaluators = [Evaluator(step, *held_out, x) for x in given]
    rows = order.bind(config.data.order, run.train.prompts, config.seed)

    def train_step(states: Sequence[TrainState], batch: Batch, count: Any, numbers: Sequence[Any]) -> Any:
        return programs(len(states))(states, batch, count, base, numbers)

    return Prepared(parts, shape, put, train_step, base, like, frozen, evaluators, steps, rows)


def _frozen(run: Run, parts: Parts, base: Any, shapes: tuple[pack.Shape, pack.Shape], put: Any, say: Any) -> Frozen:
    """Returns the reference on the devices; that of adapters is their base, which is there already."""
    assert run.frozen is not None
    params = parts.trained if parts.base is None else parts.base
    weights, name = run.frozen()
    weights = base if weights is run.base else sharding.put(weights, params)
    rows = sharding.split_rows(parts.mesh, params)
    make = reference.make_column(partial(batch_logps, in_parts(run.model, rows, params)), rows)
    columns = partial(_column, run, make, weights, name, put, say)
    cached = run.config.reference.mode == "cache"
    again = partial(_held_out, make, run.held_out, shapes[1], run.config.batch_size, put)
    return Frozen(
        held_out=columns(run.held_out, shapes[1], "held-out"),
        column=columns(run.train, shapes[0], "training") if cached else None,
        fill=None if cached else partial(_fill, make, weights),
        moving=weights if run.sync else (),
        again=again if run.sync else None,
        samples=run.complete(weights) if run.complete else None,
    )


def _of_this_process(mesh: Any, shape: pack.Shape) -> pack.Shape:
    """Returns the layout with the rows that this process builds."""
    parts, size = sharding.own_parts(mesh), shape.rows // sharding.row_devices(mesh)
    return shape._replace(own=(parts.start * size, parts.stop * size))


def _column(run: Run, make: Any, weights: Any, name: str, put: Any, say: Any, table: Table, shape: Any, what: str):
    """Returns the reference column of a table, from the cache or by one pass over it."""
    start = time.perf_counter()
    compute = partial(reference.one_pass, make, weights, table, shape, run.config.batch_size, put)
    key = reference.key(table, name, run.config.model.compute, run.model.attention)
    values, hit = reference.cached(run.cache / "reference", key, compute, (len(table), table.responses, 2))
    how = "from the cache" if hit else f"computed in {time.perf_counter() - start:.1f} s"
    say(f"reference log-probs of the {what} data: {how}")
    return values


def _fill(column: Callable, weights: Any, state: TrainState, batch: Batch, count: int) -> Batch:
    """Returns the batch with its reference column filled in just in time, by the state's reference if it moves."""
    return batch._replace(ref_logps=column(state.reference or weights, batch, count))


def _held_out(column: Callable, table: Table, shape: pack.Shape, batch_size: int, put: Callable, state: TrainState):
    """Returns the reference column of the held-out table under a reference that moves."""
    return reference.one_pass(column, state.reference, table, shape, batch_size, put)
