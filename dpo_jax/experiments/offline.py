"""Training on pairs that are there: one compiled step serves every run of a method, whatever its strength."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses, optim, sharding
from dpo_jax.config.schema import Config
from dpo_jax.data import order, pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.experiments.world import World, eval_layout
from dpo_jax.records import Array, TrainState
from dpo_jax.step import init_state
from dpo_jax.training.compile import compiled_step, hparams
from dpo_jax.training.run import Run
from dpo_jax.training.shard import policy_shardings, state_shardings


class OfflineProgram(NamedTuple):
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
    shape: pack.Layout
    put: Callable
    start: Any


def offline_program(world: World, config: Config, table: Table, column: Array | None) -> OfflineProgram:
    """Returns what runs of one loss share; their hyper-parameters are arguments of its step."""
    none: Any = None
    loss = losses.build(config.loss)
    run = Run(
        config=config, folder=none, lock=none, cache=none, model=world.model, loss=loss, sync=None, params=world.start,
        load_reference=None, train_table=table, eval_table=none, complete=None, prompts=[], export=none,
    )  # fmt: skip
    trained, like = state_shardings(run, optim.build(**config.optim), world.mesh)
    step = compiled_step(run, policy_shardings(run, world.mesh, trained), like)
    shape = eval_layout(world, table, config.batch_size)
    return OfflineProgram(step, like, table, column, shape, partial(sharding.put_batch, world.mesh), world.start)


def offline_steps(program: OfflineProgram, config: Config, seed: int) -> Iterator[tuple[int, Any]]:
    """Trains; yields (updates done, parameters) after each update of `config.max_steps`. What is yielded is given up
    with the next update.

    Raises:
      UserError: the loss or its gradient is not finite.
    """
    rows = order.bind_order("seeded", program.table.prompts, seed)
    choose = partial(order.example_indices, order=rows, rows=len(program.table), batch_size=config.batch_size)
    state, given = _first_state(program, config), hparams(config)
    for step in range(config.max_steps or 0):
        batch, count, _ = pack.build_batch(program.table, choose(step), program.shape, program.column)
        state, metrics = program.step(state, program.put(batch), np.int32(count), None, given)
        if float(metrics["nonfinite"]):
            raise UserError(f"{config.loss}: the loss is not finite at step {step + 1}; lower optim.learning_rate")
        yield step + 1, state.params


def _first_state(program: OfflineProgram, config: Config) -> TrainState:
    """Returns the state before the first update, laid out over the devices; it owns its arrays, which are given up."""
    where = jax.tree.map(lambda x: x.sharding, program.like)
    params = jax.tree.map(jnp.copy, sharding.put_params(program.start, where.params))
    return jax.device_put(init_state(params, optim.build(**config.optim), losses.build(config.loss)), where)
