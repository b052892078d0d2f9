"""Training on given pairs. One compiled step serves every run of a method, whatever its strength."""

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
from dpo_jax.experiments.world import World, table_layout
from dpo_jax.records import Array, TrainState
from dpo_jax.step import init_state
from dpo_jax.training.run import Run
from dpo_jax.training.shard import policy_shardings, state_shardings
from dpo_jax.training.train_step import compiled_step, hparams


class OfflineProgram(NamedTuple):
    """The compiled step of one method and its data.

    Attributes:
      step: the step, from `compiled_step`.
      abstract_state: shapes, dtypes and shardings of the state.
      table: training examples.
      ref_logps: float32[N, P, 2], the reference's log-probs; None for a loss without a reference.
      layout: layout of a batch.
      put: moves a Batch to the devices.
      start: host arrays, the parameters at the start of every run.
    """

    step: Callable
    abstract_state: TrainState
    table: Table
    ref_logps: Array | None
    layout: pack.Layout
    put: Callable
    start: Any


def offline_program(world: World, config: Config, table: Table, ref_logps: Array | None) -> OfflineProgram:
    """Returns the program of a loss; hyper-parameters are arguments of its step, so runs share it."""
    none: Any = None
    loss = losses.build(config.loss)
    run = Run(
        config=config, folder=none, lock=none, cache=none, model=world.model, loss=loss, sync=None, params=world.start,
        load_reference=None, train_table=table, eval_table=none, complete=None, prompts=[],
        kl_prompts=[], export=none,
    )  # fmt: skip
    trained, abstract_state = state_shardings(run, optim.build(**config.optim), world.mesh)
    step = compiled_step(run, policy_shardings(run, world.mesh, trained), abstract_state)
    layout, put = table_layout(world, table, config.batch_size), partial(sharding.put_batch, world.mesh)
    return OfflineProgram(step, abstract_state, table, ref_logps, layout, put, world.start)


def offline_steps(program: OfflineProgram, config: Config, seed: int) -> Iterator[tuple[int, Any]]:
    """Trains for `config.max_steps` updates; yields (updates done, parameters) after each.

    The next update donates the yielded parameters: use them before it.

    Raises:
      UserError: the loss or its gradient is not finite.
    """
    permutation = order.bind_order("seeded", program.table.prompts, seed)
    choose = partial(order.example_indices, order=permutation, rows=len(program.table), batch_size=config.batch_size)
    state, traced = _first_state(program, config), hparams(config)
    for step in range(config.max_steps or 0):
        batch, count, _ = pack.build_batch(program.table, choose(step), program.layout, program.ref_logps)
        state, metrics = program.step(state, program.put(batch), np.int32(count), None, traced)
        if float(metrics["nonfinite"]):
            raise UserError(f"{config.loss}: the loss is not finite at step {step + 1}; lower optim.learning_rate")
        yield step + 1, state.params


def _first_state(program: OfflineProgram, config: Config) -> TrainState:
    """Returns the sharded state before the first update; it owns its arrays, because the step donates them."""
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    params = jax.tree.map(jnp.copy, sharding.put_params(program.start, shardings.params))
    return jax.device_put(init_state(params, optim.build(**config.optim), losses.build(config.loss)), shardings)
