"""Records of a run on the host: its config, data, model and folder, and the shardings of its policy."""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.config.schema import Config
from dpo_jax.data import order
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss
from dpo_jax.models.interface import Model
from dpo_jax.models.lora import Lora
from dpo_jax.records import Array, Sync
from dpo_jax.sharding import Collectives


class Completions(NamedTuple):
    """Completions of a policy at one evaluation.

    Attributes:
      texts: of the sample prompts.
      ids: of the KL prompts, token ids, each sampled from the policy's own distribution.
    """

    texts: list[str]
    ids: list[Array]


class Run(NamedTuple):
    """A run, assembled on the host.

    Attributes:
      config: resolved.
      folder: the run folder.
      lock: holds the folder against other writers until training has ended.
      cache: folder of cached reference log-probs.
      model: pure functions of the architecture.
      loss: the objective.
      sync: how the reference follows the policy; None for a frozen one.
      params: host or lazy arrays, the trained parameters at the start: the policy, or its adapters.
      load_reference: returns (host or lazy arrays of the reference, their hash); None for a loss without a reference.
      train_table: comparisons to train on.
      eval_table: held-out comparisons.
      complete: params -> completions of the sample prompts and the KL prompts; None if there are neither.
      prompts: the sample prompts, as text.
      kl_prompts: the prompts whose completions estimate KL(policy || reference), as token ids.
      export: (config, params, folder, step) -> None, writes the model with its card.
      base: host or lazy arrays of the model below the adapters; None if the whole policy is trained.
      lora: the kind of adapters; None likewise.
      inputs: what the run is made of -> a hash of it, as in inputs.json.
    """

    config: Config
    folder: Path
    lock: contextlib.AbstractContextManager
    cache: Path
    model: Model
    loss: Loss
    sync: Sync | None
    params: Any
    load_reference: Callable[[], tuple[Any, str]] | None
    train_table: Table
    eval_table: Table
    complete: Callable[[Any], Completions] | None
    prompts: list[str]
    kl_prompts: list[Array]
    export: Callable[[Config, Any, Path, int], None]
    base: Any = None
    lora: Lora | None = None
    inputs: Mapping[str, str] = {}


KL_PROMPTS = 64  # sampling from them takes less time than evaluating the 256 comparisons of data.eval_examples
EVERY = re.compile(r"(\d+(?:\.\d+)?)\s*(steps|epochs)?")


class PolicyShardings(NamedTuple):
    """Shardings of the policy's parameters, and the model that consumes them.

    Attributes:
      mesh: the device mesh.
      trained: tree of shardings of the trained parameters.
      base: tree of shardings of the model below the adapters; None if the whole policy is trained.
      policy: (trained, base) -> the policy's parameters.
      whole: tree of shardings of the policy's parameters.
      collectives: how devices share the rows of a batch.
      model: pure functions of the sharded parameters.
    """

    mesh: Any
    trained: Any
    base: Any
    policy: Callable[[Any, Any], Any]
    whole: Any
    collectives: Collectives
    model: Model


def eval_interval(config: Config, examples: int) -> int:
    """Returns the number of updates between evaluations; 0 if there are none between the start and the end.

    Raises:
      UserError: `eval_every` is no number of comparisons, steps or epochs.
    """
    match = EVERY.fullmatch(str(config.eval_every).strip())
    if match is None:
        raise UserError(f"eval_every: {config.eval_every!r}: write comparisons as 20000, or '100 steps', '0.5 epochs'")
    number, epoch = float(match[1]), order.steps_per_epoch(examples, config.batch_size)
    updates = {"steps": 1.0, "epochs": float(epoch)}.get(match[2], 1 / config.batch_size)
    return max(1, int(number * updates + 1e-9)) if number else 0


def total_steps(config: Config, examples: int) -> int:
    """Returns the number of updates of a run on `examples` comparisons."""
    steps = config.epochs * order.steps_per_epoch(examples, config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def kl_prompt_count(config: Config, loss: Loss) -> int:
    """Returns the number of held-out prompts whose completions estimate KL(policy || reference) in training.

    Raises:
      UserError: the number is negative, or the loss has no reference.
    """
    given = config.samples.kl_prompts
    if given is None:
        return KL_PROMPTS if loss.uses_reference and config.samples.prompts else 0
    if given < 0:
        raise UserError(f"samples.kl_prompts must be >= 0 (0: none), got {given}")
    if given and not loss.uses_reference:
        raise UserError("samples.kl_prompts: this loss has no reference, and so no KL to it; remove it")
    return given
