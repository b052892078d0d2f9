"""What a config's values mean beside its loss, its model and its device, and which of them are refused."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from dpo_jax.config.schema import Config, ReferenceConfig
from dpo_jax.errors import UserError, closest
from dpo_jax.losses import Loss, term_options
from dpo_jax.models.interface import Model
from dpo_jax.paths import is_run
from dpo_jax.records import Sync
from dpo_jax.training.load import compute_dtype
from dpo_jax.training.run import kl_prompt_count
from dpo_jax.training.run_folder import run_config

LONG_RUN = 10**6  # updates, where those of the run are not known yet
log = logging.getLogger(__name__)


def make_sync(config: Config, loss: Loss) -> Sync | None:
    """Returns how the reference follows the policy; None for a fixed reference.

    Raises:
      UserError: the reference of this run cannot follow the policy, or the options have no effect.
    """
    every, alpha = config.reference.sync_every, config.reference.sync_alpha
    if not every and alpha != ReferenceConfig.sync_alpha:
        raise UserError("reference.sync_alpha has no effect without reference.sync_every; set that too")
    if not every:
        return None
    if every < 0 or not 0 < alpha <= 1:
        raise UserError(f"reference: sync_every must be >= 0 and sync_alpha in (0, 1], got {every} and {alpha}")
    if not loss.uses_reference:
        raise UserError("reference.sync_every: this loss has no reference; remove it")
    if config.lora.rank or config.lora.path:
        raise UserError(
            "reference.sync_every: with lora the reference is the model without adapters, which is fixed; remove it"
        )
    if config.reference.mode == "cache":
        raise UserError("reference.sync_every: a moving reference cannot be cached; set reference.mode: online")
    return Sync(every, alpha)


def check_keep_best(config: Config, loss: Loss) -> None:
    """Refuses a metric of `keep_best` that no evaluation of the run will have."""
    known = evaluated_metrics(config, loss)
    if config.keep_best and config.keep_best not in known:
        raise UserError(f"keep_best: no evaluation has {config.keep_best!r}; {closest(config.keep_best, known)}")


def evaluated_metrics(config: Config, loss: Loss) -> set[str]:
    """Returns the names of all metrics that an evaluation of a run may have."""
    example = term_options.example_logps(1, loss.responses or 2)
    sampled = {"kl"} if kl_prompt_count(config, loss) else set()
    found = {*jax.eval_shape(loss.metrics, example), "length_bias", "rewards/margins", *sampled}
    return {f"eval_{name}" for name in found}


def check_length(config: Config, model: Model) -> None:
    """Refuses a maximum length beyond the positions of the model."""
    limit = model.architecture.max_positions
    if config.data.max_length > limit:
        raise UserError(f"data.max_length: {config.data.max_length} exceeds the model's {limit} positions; lower it")


def with_compute(config: Config, platform: str = "") -> Config:
    """Returns the config of a run with `model.compute` set: that of its device, or of its start if it goes on.

    Args:
      config: the run's config; a dtype that it sets stays as it is.
      platform: "cpu", "gpu" or "tpu"; by default that of JAX.
    """
    if config.model.compute != "auto":
        return config
    platform, begun = platform or jax.default_backend(), is_run(Path(config.run))
    compute: Any = run_config(Path(config.run)).model.compute if begun else compute_dtype(config.model, platform)
    if platform != "cpu":
        log.info(f"model.compute: {compute}, " + ("as this run began" if begun else f"the default on a {platform}"))
    return with_model(config, compute=compute)


def with_model(settings: Config, /, **values: Any) -> Config:
    """Returns a config with values of its section `model` replaced."""
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **values))
