"""Runs the suites of `--suite` on one policy and writes their results."""

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpo_jax import losses
from dpo_jax.config.commands import EvalConfig
from dpo_jax.config.schema import SamplesConfig
from dpo_jax.errors import UserError
from dpo_jax.paths import is_run, written
from dpo_jax.runs.suites.examples import HARNESS, SuiteData, check_suite_data
from dpo_jax.runs.suites.registry import SUITES, Subject, SuiteResult, SuiteTask, named_suites, suite_folder
from dpo_jax.training.restore import asks_in_turns, eval_model, load_initial, restore_state
from dpo_jax.training.run_folder import run_config

log = logging.getLogger(__name__)
HELD_OUT_KEYS = ("prompts", "show", "name", "per_token")  # of `dpo-jax eval`, which suites do not read
OWN_KEYS = ("suite_data", "suite_limit", "suite_max_new_tokens", "suite_num_fewshot", "suite_out", "raw")


def check_suite_keys(settings: EvalConfig) -> None:
    """Refuses keys that have no effect: those of suites without `suite`, and the reverse."""
    default = EvalConfig()
    changed = [key for key in (*HELD_OUT_KEYS, *OWN_KEYS) if getattr(settings, key) != getattr(default, key)]
    for key in changed:
        if (key in OWN_KEYS) != bool(settings.suite):
            fix = "remove it" if settings.suite else "name a suite, or remove it"
            raise UserError(f"{key}: has no effect {'with' if settings.suite else 'without'} suite; {fix}")
    for key in ("suite_limit", "suite_max_new_tokens"):
        if (value := getattr(settings, key)) is not None and value < 1:
            raise UserError(f"{key}: must be at least 1, got {value}; leave it out for the default")
    if settings.suite_num_fewshot is not None and settings.suite_num_fewshot < 0:
        raise UserError(f"suite_num_fewshot: must be at least 0, got {settings.suite_num_fewshot}")


def _check_run_keys(path: str, settings: EvalConfig) -> None:
    """Refuses keys of a run's config that a suite does not read, where they are not the run's own."""
    own = run_config(path).samples if is_run(path) else SamplesConfig()
    changed = [f.name for f in fields(own) if getattr(settings.samples, f.name) != getattr(own, f.name)]
    if changed:
        fix = "suite_max_new_tokens sets their length" if "max_new_tokens" in changed else "remove it"
        raise UserError(f"samples.{changed[0]}: has no effect with suite, whose answers are greedy; {fix}")
    if settings.checkpoint and (settings.reward or losses.build(settings.loss).rewards):
        raise UserError("checkpoint: has no effect on a reward, which is of a model folder; remove one of them")


def evaluate_suites(path: str, settings: EvalConfig) -> Iterator[tuple[str, SuiteResult]]:
    """Runs the suites in `settings.suite`; writes and yields what each has found before the next one starts.

    `eval_SUITE.json` has the metrics, `eval_SUITE.jsonl` a line per example.

    Raises:
      UserError: an unknown suite, keys without effect, or no such file, before any suite runs; data that a suite cannot
        read or fetch.
    """
    check_suite_keys(settings)
    _check_run_keys(path, settings)
    names = named_suites(settings.suite)
    for key in ("reward", "suite_max_new_tokens", "suite_num_fewshot"):
        if getattr(settings, key) not in (None, "") and not any(key in SUITES[name].keys for name in names):
            readers = ", ".join(sorted(name for name, suite in SUITES.items() if key in suite.keys))
            raise UserError(f"{key}: has no effect on {', '.join(names)}; remove it, or add one of {readers}")
    data = _data_by_suite(settings.suite_data, list(names))
    load = functools.cache(functools.partial(load_subject, path, settings))
    todo = []
    for name, tasks in names.items():
        suite = SUITES[name]
        files = data.get(name, (suite.data,) if suite.data else ())
        examples = SuiteData(name, files, name in data, suite.split, settings.suite_limit)
        todo.append(SuiteTask(name, tasks, examples, settings, path, load))
    for task in todo:
        check_suite_data(task.data)
    for task in todo:
        result = SUITES[task.name].measure(task)
        _write(suite_folder(path, settings), task, result)
        yield task.name, result


def load_subject(path: str, settings: EvalConfig) -> Subject:
    """Loads the policy of a run or a model folder, and its reference.

    Raises:
      UserError: a reward model, which has no log-probs and writes no answers.
    """
    loss = losses.build(settings.loss)
    if loss.rewards:
        raise UserError(f"{path}: a reward model, which writes no answers; evaluate it by rewardbench or rewardbench2")
    loaded, tokenizer = load_initial(settings, loss)
    state = restore_state(path, settings, loaded, loss, settings.checkpoint)
    judge = eval_model(path, settings, loaded, loss, state)
    chats = asks_in_turns(path, tokenizer, settings)
    return Subject(path, settings, judge, tokenizer, loaded.end_ids(tokenizer), chats, int(state.step))


def result_file(name: str) -> str:
    """Returns the name of the file of a suite's metrics."""
    return f"eval_{name}.json"


def merged_metrics(found: Mapping[str, SuiteResult]) -> dict[str, dict[str, float]]:
    """Returns the metrics of several suites by `SUITE/METRIC`."""
    return {f"{name}/{metric}": entry for name, result in found.items() for metric, entry in result.metrics.items()}


def _data_by_suite(entries: Sequence[str], names: list[str]) -> dict[str, tuple[str, ...]]:
    """Returns the paths of `suite_data` by suite: `SUITE=PATH`, or bare paths if there is one suite."""
    data: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (equals and name in names):
            if len(names) > 1:
                raise UserError(f"suite_data: {entry!r}: write SUITE=PATH with one of {', '.join(names)}")
            name, path = names[0], entry
        data[name] = (*data.get(name, ()), path)
    return data


def _write(folder: Path, task: SuiteTask, result: SuiteResult) -> None:
    settings = task.settings
    made: dict[str, Any] = {
        "suite": task.name,
        "model": task.path,
        "data": list(task.data.names),
        "examples": result.examples,
        "checkpoint": settings.checkpoint,
        "reward": settings.reward,
        "raw": settings.raw,
        "max_new_tokens": settings.suite_max_new_tokens,
        "num_fewshot": settings.suite_num_fewshot,
        "limit": settings.suite_limit,
        "notes": list(result.notes),
        "metrics": result.metrics,
        "meanings": {name: line for name in result.metrics if (line := SUITES[task.name].meaning(name))},
    }
    if task.name == HARNESS:
        made["tasks"] = list(task.tasks)
    for name, text in result.files.items():
        with written(folder / name) as file:
            file.write(text)
        log.info(f"wrote {folder / name}")
    if result.rows:
        with written(folder / f"eval_{task.name}.jsonl") as file:
            file.writelines(json.dumps(row, default=str) + "\n" for row in result.rows)
    with written(folder / result_file(task.name)) as file:
        json.dump(made, file, indent=1)
