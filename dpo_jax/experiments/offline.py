"""Training on pairs that are there: one compiled step serves every run of a method, whatever its strength."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses, optim, sharding
from dpo_jax.config import Config
from dpo_jax.data import order, pack
from dpo_jax.data.table import Table
from dpo_jax.experiments.measure import World, shape_of
from dpo_jax.prepare import Run, compiled_step, numbers, parts_of, shardings_of
from dpo_jax.records import Array, TrainState, UserError
from dpo_jax.step import init_state


class Program(NamedTuple):
    """A method, compiled.

    Attributes:
      step: from `compiled_step`.
      like: shapes and shardings of the state.
      table: what it learns from.
      column: float32[N, P, 2], the reference's log-probs; None for a loss without one.
      shape: of a batch.
      put: moves a Batch to the devices.
      start: host arrays, the parameters that every run begins with.
    """

    step: Callable
    like: TrainState
    table: Table
    column: Array | None
    shape: pack.Shape
    put: Callable
    start: Any


def program(world: World, config: Config, table: Table, column: Array | None) -> Program:
    """Returns what runs of one loss share; their hyper-parameters are arguments of its step."""
    none: Any = None
    loss = losses.build(config.loss)
    run = Run(
        config=config, folder=none, lock=none, cache=none, model=world.model, loss=loss, sync=None, params=world.start,
        frozen=None, train=table, held_out=none, complete=None, prompts=[], export=none,
    )  # fmt: skip
    trained, like = shardings_of(run, optim.build(**config.optim), world.mesh)
    step = compiled_step(run, parts_of(run, world.mesh, trained), like)
    shape = shape_of(world, table, config.batch_size)
    return Program(step, like, table, column, shape, partial(sharding.put_batch, world.mesh), world.start)


def steps(program: Program, config: Config, seed: int) -> Iterator[tuple[int, Any]]:
    """Trains; yields (updates done, parameters) after each update of `config.max_steps`. What is yielded is given up
    with the next update.

    Raises:
      UserError: the loss or its gradient is not finite.
    """
    rows = order.bind("seeded", program.table.prompts, seed)
    choose = partial(order.rows_of, order=rows, rows=len(program.table), batch_size=config.batch_size)
    state, given = _first_state(program, config), numbers(config)
    for step in range(config.max_steps or 0):
        batch, count, _ = pack.build(program.table, choose(step), program.shape, program.column)
        (state,), (metrics,) = program.step([state], program.put(batch), np.int32(count), None, [given])
        if float(metrics["nonfinite"]):
            raise UserError(f"{config.loss}: the loss is not finite at step {step + 1}; lower optim.learning_rate")
        yield step + 1, state.params


def _first_state(program: Program, config: Config) -> TrainState:
    """Returns the state before the first update, laid out over the devices; it owns its arrays, which are given up."""
    where = jax.tree.map(lambda x: x.sharding, program.like)
    params = jax.tree.map(jnp.copy, sharding.put(program.start, where.params))
    return jax.device_put(init_state(params, optim.build(**config.optim)), where)
