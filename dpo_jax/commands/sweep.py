"""`dpo-jax sweep`: a run for every combination of some options' values, for less than the runs cost one by one."""

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from dpo_jax import distributed
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.commands.plan import plan_run, state_bytes
from dpo_jax.commands.train import initialize_from_argv, train_base_model
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import arguments, dump
from dpo_jax.errors import UserError
from dpo_jax.pages.run import write_report
from dpo_jax.training import loop, setup
from dpo_jax.training.compile import vmap_width
from dpo_jax.training.metrics_file import read_metrics

SHOWN = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen")


def sweep_command(argv: list[str]) -> None:
    """`dpo-jax sweep CONFIG.yaml --key.path value,value,... [--key.path value ...]`: commas part the values."""
    (file,), rest = leading_arguments(argv, "sweep", "CONFIG.yaml")
    configs, failed = _begun(sweep_configs(file, initialize_from_argv(rest)), file), []
    log_line(f"{len(configs)} runs: {'; '.join(Path(c.run).name for c in configs)}")
    for group in group_runs(configs):
        try:
            _train(group)
        except UserError as e:  # which is of these runs: the others need not wait for it
            failed.append(str(e))
    runs = [Path(c.run) for c in configs if (Path(c.run) / "metrics.jsonl").is_file()]
    if distributed.is_primary() and runs:
        for run in runs:
            write_report([run], run / "report.html")
        _print(runs)
        log_line(f"the runs beside each other: {write_report(runs, runs[0].parent / 'report.html')}")
    if failed:
        raise UserError("; ".join(failed))


def sweep_configs(file: str, argv: Sequence[str]) -> list[Config]:
    """Returns the config of every combination of the values that commas part, with a run folder of its own.

    Raises:
      UserError: no option has several values, or a value twice; settings that no run can have.
    """
    pairs = arguments(argv)
    choices = [[(key, texts)] if not _several(texts) else _each(key, texts[0]) for key, texts in pairs]
    swept = [key for key, texts in pairs if _several(texts)]
    if not swept:
        raise UserError("dpo-jax sweep: give an option several values, as in --loss.beta 0.05,0.1,1,5")
    found = []
    for chosen in itertools.product(*choices):
        rest = [text for key, texts in chosen for text in (f"--{key}", *texts)]
        parsed = parse_config(Config, file or None, rest, prog="dpo-jax sweep CONFIG.yaml")
        name = ",".join(f"{key}={texts[0]}" for key, texts in chosen if key in swept)
        run = Path(parsed.run or f"runs/{Path(file).stem}-sweep") / re.sub(r"[^\w.,=+-]", "_", name)
        found.append(replace(parsed, run=str(run)))
        setup.check_config(found[-1])
    if len({one.run for one in found}) < len(found):
        raise UserError(f"dpo-jax sweep: values of {' and '.join(swept)} that make the same folder; name them apart")
    return found


def _begun(configs: Sequence[Config], file: str) -> list[Config]:
    """Returns the configs with a folder for each `model.path`; where that is a YAML, it is trained first if need be."""
    models = {one.model.path: train_base_model(one, file).model for one in configs}
    return [replace(one, model=replace(one.model, path=models[one.model.path].path)) for one in configs]


def _several(texts: Sequence[str]) -> bool:
    return len(texts) == 1 and "," in texts[0]


def _each(key: str, text: str) -> list[tuple[str, list[str]]]:
    values = text.split(",")
    if not all(values) or len(set(values)) < len(values):
        raise UserError(f"--{key} {text}: commas part values, which are not empty and all different")
    return [(key, [value]) for value in values]


def group_runs(configs: Iterable[Config]) -> list[list[Config]]:
    """Returns runs that differ in numbers of the loss and the optimiser only, together."""
    found: dict[str, list[Config]] = {}
    for one in configs:
        found.setdefault(dump(_without_numbers(one)), []).append(one)
    return list(found.values())


def _without_numbers(settings: Config) -> Config:
    """Returns a config without what may differ between runs of one program."""

    def rest(section: Any) -> dict[str, Any]:
        return {name: value for name, value in section.items() if not isinstance(value, float)}

    loss: Any = settings.loss
    loss = rest(loss) if isinstance(loss, dict) else [rest(term) for term in loss]
    return replace(settings, run="", loss=loss, optim=rest(settings.optim))


def _train(group: Sequence[Config]) -> None:
    """Trains runs that differ in numbers only: in one program as many as may be, and then the next."""
    size = fused_size(group)
    for start in range(0, len(group), size):
        part = group[start : start + size]
        run = setup.setup_run(part[0], log_line)
        loop.train_together([run, *(setup.sweep_member(run, other) for other in part[1:])], log_line)


def fused_size(group: Sequence[Config]) -> int:
    """Returns how many of the runs train in one program: all that fit in half of a device's memory."""
    first = group[0]
    if len(group) == 1 or first.mesh.mode == "pmap" or first.reference.sync_every:
        return 1
    shared, each = 0, 2 * state_bytes(first)  # the states are there twice while they are put together
    if vmap_width(len(group)):
        need = plan_run(first).memory
        each += need.gradients + need.logits + need.activations
        shared = need.frozen
    return max(1, min(len(group), (device_memory() // 2 - shared) // each))


def device_memory() -> int:
    """Returns the bytes of a device's memory: the machine's where the device is a processor."""
    known = jax.local_devices()[0].memory_stats() or {}
    return known.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _print(runs: Sequence[Path]) -> None:
    # A line for each value, so that a narrow terminal cuts none of them.
    names = [name.removeprefix("eval_") for name in SHOWN]
    grid = Grid(Column("run", no_wrap=True), *(Column(name, overflow="fold") for name in names))
    for run in runs:
        last = read_metrics(run / "metrics.jsonl")[-1]
        values = [f"{last[name]:.4f}" if last.get(name) is not None else "-" for name in SHOWN]
        grid.add_row(run.name.replace(",", "\n"), *values)
    Console().print(grid)
