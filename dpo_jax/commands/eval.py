"""`dpo-jax eval`: metrics of a policy on held-out data, with confidence intervals."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax.commands.common import leading_arguments, log_line, print_samples
from dpo_jax.config.commands import EvalConfig
from dpo_jax.pages.run import write_report
from dpo_jax.paths import is_run
from dpo_jax.runs.evaluate import Intervals, evaluate_path
from dpo_jax.runs.settings import config_of_path


def eval_command(argv: list[str]) -> None:
    """`dpo-jax eval RUN_OR_MODEL [--reward NAME] [--data.path ...] [--reference.path ...]`."""
    (path,), rest = leading_arguments(argv, "eval", "RUN_OR_MODEL")
    found = evaluate_path(path, config_of_path(path, rest, EvalConfig, "dpo-jax eval RUN_OR_MODEL"))
    _print_metrics(found.metrics)
    print_samples(found.completions, found.models)
    if is_run(path):
        (Path(path) / "eval.json").write_text(json.dumps({"metrics": found.metrics}, indent=1))
        write_report([Path(path)], Path(path) / "report.html")
        log_line(f"the model: {Path(path) / 'model'}   the report: {Path(path) / 'report.html'}")


def _print_metrics(found: Intervals) -> None:
    grid = Grid("on held-out data", "mean", "95% interval", "n")
    for name, entry in found.items():
        interval = f"{entry['low']:.4f} .. {entry['high']:.4f}"
        grid.add_row(name.removeprefix("eval_"), f"{entry['mean']:.4f}", interval, str(entry["n"]))
    Console().print(grid)
