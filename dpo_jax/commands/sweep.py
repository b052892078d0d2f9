"""`dpo-jax sweep`: a run for every combination of some options' values."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dpo_jax import distributed
from dpo_jax.commands.common import leading_arguments, log_line, print_table
from dpo_jax.commands.gradient_weights import shown_panels
from dpo_jax.commands.train import initialize_from_argv
from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.intervals import interval_text
from dpo_jax.pages.run import write_report
from dpo_jax.paths import load_json
from dpo_jax.runs.sweep import sweep_configs, train_all
from dpo_jax.training.metrics_file import with_current_names

# What runs of different losses and betas can be compared by; rewards and margins are in units of beta.
SHOWN = ("eval_rewards/accuracies", "eval_kl", "true reward of the policy", "eval_nll")


def sweep_command(argv: list[str]) -> None:
    """`dpo-jax sweep CONFIG.yaml --key.path VALUE,VALUE,... [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "sweep", "CONFIG.yaml")
    over, rest = split_values(initialize_from_argv(rest))
    configs = sweep_configs(file or None, file, over, rest)
    log_line(f"{len(configs)} runs: {'; '.join(Path(c.run).name for c in configs)}")
    _, failed = train_all(configs, file)
    runs = [Path(c.run) for c in configs if (Path(c.run) / "eval.json").is_file()]
    if distributed.is_primary() and runs:
        shown = SHOWN if any(c.loss != configs[0].loss for c in configs) else (*SHOWN, "eval_loss")
        _print(runs, shown, {message.split(":")[0] for message in failed})
        log_line(f"comparison of the runs: {write_report(runs, runs[0].parent / 'report.html', shown_panels(runs))}")
    if failed:
        raise UserError("; ".join(failed))


def split_values(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the options with several values, separated by commas, and the arguments without them."""
    pairs = arguments(argv)
    over = {key: texts[0].split(",") for key, texts in pairs if len(texts) == 1 and "," in texts[0]}
    return over, [text for key, texts in pairs if key not in over for text in (f"--{key}", *texts)]


def _print(runs: Sequence[Path], shown: Sequence[str], failed: Collection[str]) -> None:
    """Prints a row for each run: the metrics of `shown` that any run has, with their 95% intervals."""
    found = [with_current_names(load_json(run / "eval.json", dict).get("metrics", {})) for run in runs]
    names = [name for name in shown if any(name in metrics for metrics in found)]
    rows = []
    for run, metrics in zip(runs, found, strict=True):
        note = " (failed)" if run.name in failed else ""
        rows.append([run.name.replace(",", " ") + note, *(_interval_text(metrics.get(name)) for name in names)])
    print_table(("on held-out data", *(f"{name.removeprefix('eval_')} (95%)" for name in names)), rows)


def _interval_text(entry: Mapping[str, float] | None) -> str:
    return "-" if entry is None else f"{entry['mean']:.3f} ({interval_text(entry, 3)})"
