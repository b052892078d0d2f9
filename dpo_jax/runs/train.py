"""`train`: a run from Python."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dpo_jax import distributed
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.pages.run import write_report
from dpo_jax.paths import load_json
from dpo_jax.runs.settings import call_settings
from dpo_jax.training import interrupts, setup
from dpo_jax.training.loop import Callback, train_run
from dpo_jax.training.metrics_file import with_current_names
from dpo_jax.training.plan import with_remat

log = logging.getLogger(__name__)
C = TypeVar("C", bound=Any)  # a config with a section `model`


class Result(NamedTuple):
    """A trained run.

    Attributes:
      folder: the run folder; `folder / "model"` is the exported model.
      metrics: means of the evaluation of that model, named `eval_NAME`.
      params: its parameters, with adapters attached: those of the best checkpoint with `keep_best`, else the last ones.
    """

    folder: Path
    metrics: dict[str, float]
    params: Any


def train(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    data: Any = None,
    eval_data: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    callbacks: Sequence[Callback] = (),
    **keys: Any,
) -> Result:
    """Trains a run, or resumes it if its folder exists, and exports the model.

    Progress is shown on standard error; `logging.getLogger("dpo_jax").setLevel("WARNING")` turns it off.

    Args:
      config: a YAML, nested values as in one, a `Config`, or nothing.
      data: training examples in memory (dicts with the columns of data files, or a `datasets.Dataset`), the path of a
        file or folder, or keys of the config's section `data`.
      eval_data: held-out examples in memory, or a path if `data` is one; without them a part of `data` is held out
        (`data.eval_fraction`).
      loss: a name, a function `(Logps, *, option=default) -> float32[B]`, a partial of one, a dict with `name` and
        options, or a list of these, which are summed.
      optimizer: an optax transformation, a name, or a dict with `name` and options.
      callbacks: called with (step, metrics, state) after every step and every evaluation but the one before the first
        step; True stops the run.
      **keys: keys of the config (`model="path"`, `run="runs/mine"`, `batch_size=8`, `samples={"prompts": 0}`), which
        win over `config`.

    Returns:
      The folder, the last metrics and the policy's parameters.

    Raises:
      UserError: an unknown key, values that cannot train, data that cannot be read.
      SystemExit: after a request to stop (SIGTERM, Ctrl-C), with everything saved.
    """
    settings, name = call_settings(config, data, eval_data, loss, optimizer, keys)
    callbacks = checked_callbacks(callbacks)
    settings = setup.with_run_folder(settings, name)
    setup.check_config(settings)  # before the run that it starts from is trained for hours
    return train_settings(with_base_model(settings, name), callbacks)


def checked_callbacks(callbacks: Any) -> list[Callback]:
    """Returns callbacks as a list; refuses a single function."""
    if not isinstance(callbacks, list | tuple) or not all(map(callable, callbacks)):
        raise UserError("callbacks: give a list of functions, as in callbacks=[f]")
    return list(callbacks)


def train_settings(settings: Config, callbacks: Sequence[Callback] = ()) -> Result:
    """Trains a run from its config; `settings.model.path` must be a model, not a YAML."""
    run = setup.setup_run(with_remat(settings))
    with run.lock:  # free again whatever ends the run
        interrupts.end_if_asked(f"{run.folder.name} is set up")
        return finish_run(run.folder, train_run(run, callbacks=callbacks))


def finish_run(folder: Path, params: Any) -> Result:
    """Writes the report of a run; returns its result."""
    if distributed.is_primary():
        write_report([folder], folder / "report.html")
    found = with_current_names(load_json(folder / "eval.json", dict).get("metrics", {}))
    return Result(folder, {name: entry["mean"] for name, entry in found.items()}, params)


def with_base_model(settings: C, name: str, later: tuple[str, ...] = ()) -> C:
    """Returns the config with a folder as `model.path`; a YAML there is trained first, or resumed.

    Args:
      settings: the config.
      name: its YAML or name, for messages.
      later: the YAMLs that start from it.

    Raises:
      UserError: a YAML that starts from itself.
    """
    path = settings.model.path
    if not path.endswith((".yaml", ".yml")):
        return settings
    log.info(f"{name} starts from {path}")
    if path in (name, *later):
        raise UserError(f"{path}: starts from itself; model.path must lead to a model or a config.json")
    base = setup.with_run_folder(parse_config(Config, path, prog="dpo-jax train CONFIG.yaml"), path)
    setup.check_config(base)
    with interrupts.stop_requests():
        folder = train_settings(with_base_model(base, path, (name, *later))).folder
        interrupts.end_if_asked(f"{path} is done")
    log.info(f"now {name}")
    return replace(settings, model=replace(settings.model, path=str(folder)))
