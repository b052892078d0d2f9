"""`dpo-jax leaderboard`: every loss in worlds whose optimum is known, as a figure, a table, JSON and a page."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import losses
from dpo_jax.commands.common import log_line, print_table
from dpo_jax.commands.losses import named_term, refuse_repeated
from dpo_jax.config.commands import LeaderboardConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.errors import UserError
from dpo_jax.experiments.fitted import calibration_error
from dpo_jax.experiments.kept_paths import run_kept
from dpo_jax.experiments.leaderboard import LISTS, SIZES, LossPaths, run_leaderboard
from dpo_jax.experiments.standings import BUDGETS, standings_of
from dpo_jax.experiments.table_world import LABELS, ExactFrontier, TableWorld, make_world
from dpo_jax.intervals import mean_t_interval
from dpo_jax.pages.frontier import standalone_figure
from dpo_jax.pages.leaderboard import (
    NOTE,
    LeaderboardResult,
    leaderboard_figure,
    leaderboard_json,
    leaderboard_table,
    render_leaderboard,
)
from dpo_jax.paths import refuse_links, written


def leaderboard_command(argv: list[str]) -> None:
    """Runs `dpo-jax leaderboard [--losses NAME ...] [--beta VALUE ...] [--seeds N]`.

    The paths of each loss are kept in `parts/` of its folder as soon as they are there, so that the same command goes
    on where it was interrupted, with the same result bit for bit.
    """
    settings = parse_config(LeaderboardConfig, None, argv, prog="dpo-jax leaderboard")
    terms, start = entrants(settings.losses), time.perf_counter()
    if settings.seeds < 2 or settings.max_steps < 1 or not settings.beta:
        raise UserError("dpo-jax leaderboard needs --seeds of at least 2, --max_steps of at least 1, and a --beta")
    refuse_links(settings.run)
    worlds = [make_world(seed) for seed in range(settings.seeds)]

    def report(name: str) -> None:
        log_line(f"{name}  {time.perf_counter() - start:.0f} s")

    run = partial(run_kept, Path(settings.run) / "parts")
    paths = run_leaderboard(terms, sorted(set(settings.beta)), worlds, settings.max_steps, report, run)
    found = result_of(paths, worlds, settings.max_steps)
    for size in SIZES:
        head, *rows = leaderboard_table(found.standings, size)
        print_table(head, rows, wrap=False)
    lines = summary(found)
    for line in (NOTE, *lines, f"{time.perf_counter() - start:.0f} s"):
        log_line(line)
    log_line(f"page: {write_leaderboard(Path(settings.run), found, lines)}")


def entrants(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns name -> term of the losses that enter: by default all that train a policy, without `axes` itself.

    Raises:
      UserError: an unknown loss, one that is named twice, or options that do not go together.
    """
    command = "dpo-jax leaderboard"
    refuse_repeated(names, f"{command} --losses")
    every = names or [name for name, entry in losses.REGISTRY.items() if not entry.rewards and name != "axes"]
    terms = {name: named_term(name, command) for name in every}
    return {name: {"name": term.loss, **term.given} for name, term in terms.items()}


def result_of(paths: dict[str, LossPaths], worlds: Sequence[TableWorld], steps: int) -> LeaderboardResult:
    """Returns the result of paths in worlds."""
    frontiers = [ExactFrontier(world) for world in worlds]
    limits = tuple(mean_t_interval(np.array([f.at(budget) for f in frontiers])) for budget in BUDGETS)
    untrained = mean_t_interval(np.array([float(calibration_error(0.0 * w.reward, w)) for w in worlds]))
    return LeaderboardResult(standings_of(paths, frontiers), paths, (limits, untrained), len(worlds), steps)


def summary(found: LeaderboardResult) -> list[str]:
    """Returns sentences on the worlds, and on losses and strengths that are left out."""
    pairs = " or ".join(f"{2 * LISTS * batches:,} ({size})" for size, batches in SIZES.items())
    limits = ", ".join(f"{limit.mean:.2f} at {b:g}" for limit, b in zip(found.limits[0], BUDGETS, strict=True))
    entered = f"{len(found.paths)} loss{'es' * (len(found.paths) != 1)}"
    lines = [
        f"{entered}, {found.seeds} worlds, {found.steps} steps of {2 * LISTS} pairs; {pairs} pairs; "
        + "; ".join(f"{name}: {meaning}" for name, meaning in LABELS.items()),
        f"optimum: reward {limits} nats of KL; calibration error of the reference {found.limits[1].mean:.3f}",
    ]
    for name, paths in found.paths.items():
        bad = ~np.isfinite(paths.reward + paths.kl).all((1, 2, 3))
        if bad.any():
            betas = ", ".join(f"{b:g}" for b, failed in zip(paths.betas, bad, strict=True) if failed)
            lines.append(f"left out, since the policy became NaN: {name}, beta {betas}")
    return lines


def write_leaderboard(folder: Path, found: LeaderboardResult, lines: Sequence[str]) -> Path:
    """Writes `leaderboard.svg`, `.json` and `.html`; returns the path of the page."""
    with written(folder / "leaderboard.svg") as file:
        file.write(standalone_figure(leaderboard_figure(found.standings)))
    with written(folder / "leaderboard.json") as file:
        json.dump(leaderboard_json(found), file, allow_nan=False)
    with written(folder / "leaderboard.html") as file:
        file.write(render_leaderboard(found, lines))
    return folder / "leaderboard.html"
