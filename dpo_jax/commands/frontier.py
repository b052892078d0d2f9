"""`dpo-jax frontier`: the reward that each method reaches at each KL, as one figure, a table and a line a point."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.experiments import frontier, optimum
from dpo_jax.experiments.frontier import FrontierResult
from dpo_jax.pages.frontier import (
    budgets,
    frontier_figures,
    frontier_json,
    frontier_table,
    optima,
    render_frontier,
    standalone_figure,
)
from dpo_jax.paths import written
from dpo_jax.runs.train import with_base_model


def frontier_command(argv: list[str]) -> None:
    """`dpo-jax frontier CONFIG.yaml [--run DIR] [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "frontier", "CONFIG.yaml")
    prog = "dpo-jax frontier CONFIG.yaml"
    settings = parse_config(FrontierConfig, file or None, rest, prog=prog)
    run = settings.run or str(Path("runs") / Path(file).stem)
    settings, start = dataclasses.replace(settings, run=run), time.perf_counter()
    if settings.model.path.endswith((".yaml", ".yml")):
        base = with_base_model(settings, file).model
        settings = dataclasses.replace(settings, model=base)
    found = frontier.run_frontier(settings)
    lines = point_line(found, settings)
    for rows in (budgets(found), frontier_table(found), optima(found)):
        _print(rows)
    for line in (*lines, f"{time.perf_counter() - start:.0f} s"):
        log_line(line)
    log_line(f"the page: {write_frontier(Path(run), found, lines)}")


def point_line(found: FrontierResult, settings: FrontierConfig) -> list[str]:
    """Returns in words what was measured, and what is not known."""
    measured = len({p[:2] for p in found.points if p.method != "sft"})
    lines = [
        f"{measured} runs of up to {settings.max_steps} steps, {found.pairs:,} pairs, true reward {settings.reward}; "
        f"{len(found.points)} measurements on {found.prompts} held-out prompts; seed {settings.seed}"
    ]
    if found.listed:
        return [*lines, "optimum: summed over all responses there are"]
    lines.append(f"optimum: self-normalised importance weights over {settings.optimum.samples} samples a prompt")
    if found.left_out:
        betas = ", ".join(f"{o.beta:g}" for o in found.left_out)
        lines.append(f"left out, with fewer than {optimum.FEWEST} effective samples: beta {betas}")
    return lines


def write_frontier(folder: Path, found: FrontierResult, lines: Sequence[str]) -> Path:
    """Writes the figures, the numbers and the page; returns the page."""
    for name, svg in frontier_figures(found).items():
        with written(folder / f"{name}.svg") as f:
            f.write(standalone_figure(svg))
    with written(folder / "frontier.json") as f:
        json.dump(frontier_json(found), f, indent=1)
    with written(folder / "frontier.html") as f:
        f.write(render_frontier(found, lines))
    return folder / "frontier.html"


def _print(rows: list[list[str]]) -> None:
    head, *body = rows
    grid = Grid(Column(head[0], no_wrap=True), *head[1:])
    for cells in body:
        grid.add_row(*cells)
    Console().print(grid)
