"""Records of a run: assembled on the host, sharded over devices, compiled."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.config.schema import Config
from dpo_jax.data import order, pack
from dpo_jax.data.table import Table
from dpo_jax.evaluation import Evaluator
from dpo_jax.losses import Loss
from dpo_jax.models.lora import Lora
from dpo_jax.models.model import Model
from dpo_jax.records import Batch, TrainState
from dpo_jax.sharding import Collectives
from dpo_jax.step import Sync


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


class PolicyShardings(NamedTuple):
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
    rows: Collectives
    model: Model


class FrozenReference(NamedTuple):
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


class PreparedRun(NamedTuple):
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

    parts: PolicyShardings
    shape: pack.Layout
    put: Callable
    step: Callable
    base: Any
    like: TrainState
    frozen: FrozenReference
    evaluators: list[Evaluator]
    total_steps: int
    order: order.Order


def total_steps(config: Config, rows: int) -> int:
    """Returns the number of updates of a run over a table of `rows` comparisons."""
    steps = config.epochs * order.steps_per_epoch(rows, config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)
