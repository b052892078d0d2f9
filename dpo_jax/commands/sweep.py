"""`dpo-jax sweep`: a run for every combination of some options' values."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from dpo_jax import distributed
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.commands.train import initialize_from_argv
from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.pages.run import write_report
from dpo_jax.runs.sweep import sweep_configs, train_all
from dpo_jax.training.metrics_file import read_metrics

SHOWN = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen")


def sweep_command(argv: list[str]) -> None:
    """`dpo-jax sweep CONFIG.yaml --key.path VALUE,VALUE,... [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "sweep", "CONFIG.yaml")
    over, rest = split_values(initialize_from_argv(rest))
    configs = sweep_configs(file or None, file, over, rest)
    log_line(f"{len(configs)} runs: {'; '.join(Path(c.run).name for c in configs)}")
    _, failed = train_all(configs, file)
    runs = [Path(c.run) for c in configs if (Path(c.run) / "metrics.jsonl").is_file()]
    if distributed.is_primary() and runs:
        _print(runs)
        log_line(f"comparison of the runs: {write_report(runs, runs[0].parent / 'report.html')}")
    if failed:
        raise UserError("; ".join(failed))


def split_values(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the options with several values, separated by commas, and the arguments without them."""
    pairs = arguments(argv)
    over = {key: texts[0].split(",") for key, texts in pairs if len(texts) == 1 and "," in texts[0]}
    return over, [text for key, texts in pairs if key not in over for text in (f"--{key}", *texts)]


def _print(runs: Sequence[Path]) -> None:
    # A line for each value, so that a narrow terminal cuts none of them.
    names = [name.removeprefix("eval_") for name in SHOWN]
    grid = Grid(Column("run", no_wrap=True), *(Column(name, overflow="fold") for name in names))
    for run in runs:
        last = read_metrics(run / "metrics.jsonl")[-1]
        values = [f"{last[name]:.4f}" if last.get(name) is not None else "-" for name in SHOWN]
        grid.add_row(run.name.replace(",", "\n"), *values)
    Console().print(grid)
