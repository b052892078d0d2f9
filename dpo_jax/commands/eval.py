"""`dpo-jax eval`: metrics of a policy on held-out data, with confidence intervals."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from dpo_jax.commands.common import leading_arguments, log_line, print_samples, print_table
from dpo_jax.config.commands import EvalConfig
from dpo_jax.errors import UserError
from dpo_jax.intervals import interval_text
from dpo_jax.pages.run import write_report
from dpo_jax.paths import is_run, refuse_links, written
from dpo_jax.runs.evaluate import Intervals, evaluate_path
from dpo_jax.runs.settings import config_of_path
from dpo_jax.runs.suites.registry import SuiteResult, known_suites, suite_folder
from dpo_jax.runs.suites.run import evaluate_suites, result_file
from dpo_jax.training.run_folder import run_config


def eval_command(argv: list[str]) -> None:
    """`dpo-jax eval RUN_OR_MODEL [--reward NAME] [--data.path ...] [--reference.path ...] [--suite NAME,...]`."""
    (path,), rest = leading_arguments(argv, "eval", "RUN_OR_MODEL")
    if is_run(path):
        refuse_links(path)
    settings = config_of_path(path, rest, EvalConfig, "dpo-jax eval RUN_OR_MODEL")
    if settings.name and not settings.suite:
        _check_name(path, settings.name)
    if settings.suite:
        for name, result in evaluate_suites(path, settings):
            _print_suite(name, result, suite_folder(path, settings) / result_file(name))
        if is_run(path):
            write_report([Path(path)], Path(path) / "report.html")
        return
    found = evaluate_path(path, settings)
    _print_metrics(found.metrics)
    print_samples(found.completions, found.models)
    if is_run(path):
        with written(Path(path) / (result_file(settings.name) if settings.name else "eval.json")) as file:
            json.dump({"step": found.step, **_other_keys(path, settings), "metrics": found.metrics}, file, indent=1)
        write_report([Path(path)], Path(path) / "report.html")
        log_line(f"the model: {Path(path) / 'model'}   the report: {Path(path) / 'report.html'}")


def _check_name(path: str, name: str) -> None:
    """Refuses a name under which an evaluation cannot be stored."""
    if not is_run(path):
        raise UserError(f"--name {name}: {path} is no run folder, so nothing is stored; remove it")
    if not re.fullmatch(r"[\w-]+", name) or name in known_suites():
        raise UserError(f"--name {name}: give letters, digits, _ and -, and not the name of a suite")


def _other_keys(path: str, settings: EvalConfig) -> dict[str, Any]:
    """Returns what an evaluation takes in place of the run's own held-out data, loss and reference; {} for none."""
    own, found = run_config(path), dict[str, Any]()
    if settings.data != own.data:
        found["data"] = list(settings.data.eval_path or settings.data.path)
    if settings.loss != own.loss:
        found["loss"] = settings.loss
    if settings.reference != own.reference:
        found["reference"] = dataclasses.asdict(settings.reference)
    return found


def _print_metrics(found: Intervals) -> None:
    rows = []
    for name, entry in found.items():
        rows.append([name.removeprefix("eval_"), f"{entry['mean']:.4f}", interval_text(entry), str(entry["n"])])
    print_table(("on held-out data", "mean", "95% interval", "n"), rows)


def _print_suite(name: str, result: SuiteResult, file: Path) -> None:
    rows = []
    for metric, entry in result.metrics.items():
        rows.append([metric, f"{entry['mean']:.4f}", interval_text(entry), str(entry.get("n", ""))])
    print_table((name, "mean", "95% interval", "n"), rows)
    for note in result.notes:
        log_line(f"{name}: {note}")
    log_line(f"{name}: {result.examples} examples; {file}")
