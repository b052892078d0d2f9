"""`dpo-jax frontier`: the reward that each method reaches at each KL, as one figure, a table and a line a point."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from dpo_jax import config, folders, frontier_page, stages
from dpo_jax.experiments import frontier, optimum
from dpo_jax.experiments.frontier import Found
from dpo_jax.settings import Frontier
from dpo_jax.terminal import leading, say


def frontier_command(argv: list[str]) -> None:
    """`dpo-jax frontier CONFIG.yaml [--run DIR] [--key.path value ...]`."""
    (file,), rest = leading(argv, "frontier", "CONFIG.yaml")
    prog = "dpo-jax frontier CONFIG.yaml"
    settings = config.parse(Frontier, file or None, rest, prog=prog)
    run = settings.run or str(Path("runs") / Path(file).stem)
    settings, start = dataclasses.replace(settings, run=run), time.perf_counter()
    if settings.model.path.endswith((".yaml", ".yml")):
        reference = stages.trained(settings.model.path)
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=str(reference)))
    found = frontier.run(settings, say)
    lines = said(found, settings)
    for rows in (frontier_page.budgets(found), frontier_page.table(found), frontier_page.optima(found)):
        _print(rows)
    for line in (*lines, f"{time.perf_counter() - start:.0f} s"):
        say(line)
    say(f"the page: {write(Path(run), found, lines)}")


def said(found: Found, settings: Frontier) -> list[str]:
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


def write(folder: Path, found: Found, lines: Sequence[str]) -> Path:
    """Writes the figures, the numbers and the page; returns the page."""
    for name, svg in frontier_page.figures(found).items():
        with folders.written(folder / f"{name}.svg") as f:
            f.write(frontier_page.alone(svg))
    with folders.written(folder / "frontier.json") as f:
        json.dump(frontier_page.as_json(found), f, indent=1)
    with folders.written(folder / "frontier.html") as f:
        f.write(frontier_page.page(found, lines))
    return folder / "frontier.html"


def _print(rows: list[list[str]]) -> None:
    head, *body = rows
    grid = Grid(Column(head[0], no_wrap=True), *head[1:])
    for cells in body:
        grid.add_row(*cells)
    Console().print(grid)
