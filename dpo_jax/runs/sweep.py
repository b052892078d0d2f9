"""`sweep`: a run for every combination of values."""

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import dump
from dpo_jax.errors import UserError
from dpo_jax.runs.settings import call_settings, plain_config
from dpo_jax.runs.train import Result, checked_callbacks, finish_run, with_base_model
from dpo_jax.training import interrupts, setup
from dpo_jax.training.compile import prepare_run, with_hparams
from dpo_jax.training.loop import Callback, train_run
from dpo_jax.training.plan import with_remat
from dpo_jax.training.train_step import traced_floats

log = logging.getLogger(__name__)


def sweep(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    over: Mapping[str, Sequence[Any]] | None = None,
    **keys: Any,
) -> list[Result]:
    """Trains a run for every combination of values, in folders named after them.

    Args:
      config: as for `train`.
      over: dotted keys and their values, such as {"loss.beta": [0.05, 0.1, 0.5]}.
      **keys: as for `train`; `run` is the folder of the runs.

    Returns:
      A result for each combination, the last key of `over` varying fastest.

    Raises:
      UserError: as `train`. A run that fails raises after the others have trained.
    """
    if not over:
        raise UserError("sweep: nothing to vary; give keys and their values, as in over={'loss.beta': [0.05, 0.1, 1]}")
    for key, some in over.items():
        if isinstance(some, str) or not isinstance(some, Iterable):
            raise UserError(f"sweep: {key}: {some!r}; give a list of values, as in over={{'{key}': [{some!r}, ...]}}")
        if own := [value for value in some if callable(value)]:
            raise UserError(f"sweep: {key}: {own[0]!r}; name functions as module:function")
    callbacks = checked_callbacks(keys.pop("callbacks", ()))
    given = {name: keys.pop(name, None) for name in ("data", "eval_data", "loss", "optimizer")}
    settings, name = call_settings(config, **given, keys=keys)
    values = {key: [str(value) for value in some] for key, some in over.items()}
    results, failed = train_all(sweep_configs(plain_config(settings), name, values), name, callbacks)
    if failed:
        raise UserError("; ".join(failed))
    return results


def sweep_configs(
    source: str | Mapping[str, Any] | None, name: str, over: Mapping[str, Sequence[str]], argv: Sequence[str] = ()
) -> list[Config]:
    """Returns the config of every combination of values, each with a run folder of its own.

    Args:
      source: a YAML or nested values.
      name: the YAML or name of the sweep.
      over: dotted keys and the texts of their values.
      argv: further overrides.

    Raises:
      UserError: no key has several values, or a value twice; values that cannot train.
    """
    if not over:
        raise UserError("sweep: no option has several values; give some, as in --loss.beta 0.05,0.1,1,5")
    for key, texts in over.items():
        if not all(texts) or len(set(texts)) < len(texts):
            raise UserError(f"sweep: {key} {','.join(texts)}: give different values, none of them empty")
    found = []
    for chosen in itertools.product(*over.values()):
        pairs = list(zip(over, chosen, strict=True))
        overrides = [text for key, value in pairs for text in (f"--{key}", value)]
        parsed = parse_config(Config, source, [*argv, *overrides], prog="dpo-jax sweep CONFIG.yaml")
        folder = re.sub(r"[^\w.,=+-]", "_", ",".join(f"{key}={value}" for key, value in pairs))
        found.append(replace(parsed, run=str(Path(parsed.run or f"runs/{Path(name).stem}-sweep") / folder)))
        setup.check_config(found[-1])
    if len({one.run for one in found}) < len(found):
        raise UserError(f"dpo-jax sweep: values of {' and '.join(over)} give the same folder; choose others")
    return found


def train_all(
    configs: Sequence[Config], name: str, callbacks: Sequence[Callback] = ()
) -> tuple[list[Result], list[str]]:
    """Trains runs one after another; returns their results, and an error message for each that failed.

    Runs that differ in hyper-parameters only share tables, reference log-probs and compiled functions.
    """
    bases = {one.model.path: with_base_model(one, name).model.path for one in configs}
    configs = [replace(one, model=replace(one.model, path=bases[one.model.path])) for one in configs]
    found: dict[str, Result | UserError] = {}
    with interrupts.stop_requests():
        for group in group_runs(configs):
            for one, result in _trained_group(group, configs, callbacks):
                found[one.run] = result
                if isinstance(result, UserError):
                    log.warning(f"{Path(one.run).name} has failed: {result}")
                if len(found) < len(configs):
                    interrupts.end_if_asked(f"{len(found)} of {len(configs)} runs have ended")
    failed = [f"{Path(run).name}: {result}" for run, result in found.items() if isinstance(result, UserError)]
    results = [found[one.run] for one in configs]
    return [result for result in results if not isinstance(result, UserError)], failed


def _trained_group(
    group: Sequence[Config], configs: Sequence[Config], callbacks: Sequence[Callback]
) -> Iterator[tuple[Config, Result | UserError]]:
    """Yields the result of each run of a group, all of which share what can be shared, or why it failed."""
    run = prepared = None
    program = ""
    for one in group:
        log.info(f"run {configs.index(one) + 1} of {len(configs)}: {Path(one.run).name}")
        try:
            run = setup.setup_run(with_remat(one)) if run is None else setup.sweep_member(run, one)
            with run.lock:  # free again whatever ends the run
                interrupts.end_if_asked(f"{Path(one.run).name} is set up")
                # A run that goes on has the schedule of its start, and so may need a program of its own.
                wanted = dump(_without_floats(run.config))
                if prepared is None or wanted != program:
                    prepared, program = prepare_run(run), wanted  # together: neither if it fails
                else:
                    prepared = with_hparams(prepared, run.config)
                result = finish_run(run.folder, train_run(run, prepared, callbacks))
        except UserError as e:  # the other runs need not wait for it
            result = UserError(str(e))  # without its traceback, which holds the run's arrays
        yield one, result


def group_runs(configs: Iterable[Config]) -> list[list[Config]]:
    """Returns runs in groups that differ only in arguments of their compiled step (`train_step.hparams`)."""
    found: dict[str, list[Config]] = {}
    for one in configs:
        found.setdefault(dump(_without_floats(one)), []).append(one)
    return list(found.values())


def _without_floats(settings: Config) -> Config:
    def rest(section: Any) -> dict[str, Any]:
        return {name: value for name, value in section.items() if name not in traced_floats(section)}

    loss: Any = settings.loss
    loss = rest(loss) if isinstance(loss, dict) else [rest(term) for term in loss]
    return replace(settings, run="", loss=loss, optim=rest(settings.optim))
