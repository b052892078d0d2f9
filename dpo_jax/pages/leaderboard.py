"""Figure, tables, JSON and page of `dpo-jax leaderboard`."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.experiments.leaderboard import CONDITIONS, SIZES, LossPaths
from dpo_jax.experiments.standings import BUDGETS, MAIN, Standing
from dpo_jax.experiments.table_world import LABELS
from dpo_jax.intervals import MeanInterval
from dpo_jax.pages import figure
from dpo_jax.pages.output import json_values, render_page
from dpo_jax.records import Array

UNBEATEN = "*"  # after the distance of a loss that no other one dominates
MARKERS = "os^D"
NAME_WIDTH = 30  # of a line of a name in the figure, characters
ROW, LINE = 0.2, 0.15  # height of a row whose name has one line, and of each further line, inches
LEAST_HEIGHT = 2.2  # of the figure, which the legend needs, inches
WORDS = {"bradley_terry": "Bradley-Terry", "off_policy": "off-policy"}
NOTE = (
    f"Distance: the highest reward of any policy at {BUDGETS[MAIN]:g} nat of KL less the reward of the loss there, in "
    f"nats. {UNBEATEN} No other loss has a reliably higher reward (95%, over worlds, for as many comparisons as there "
    f"are losses) at every budget: {', '.join(f'{b:g}' for b in BUDGETS)} nats."
)


class LeaderboardResult(NamedTuple):
    """What the leaderboard found.

    Attributes:
      standings: of every loss under every condition.
      paths: loss -> its paths.
      limits: the highest reward at each budget, and the calibration error of the reference.
      seeds, steps: worlds, and updates of a run.
    """

    standings: list[Standing]
    paths: Mapping[str, LossPaths]
    limits: tuple[tuple[MeanInterval, ...], MeanInterval]
    seeds: int
    steps: int


def order_of(standings: Sequence[Standing]) -> list[str]:
    """Returns the losses by their mean distance at the main budget, the nearest first."""
    names = list(dict.fromkeys(s.loss for s in standings))
    return sorted(names, key=lambda name: np.mean([s.distances[MAIN].mean for s in standings if s.loss == name]))


def leaderboard_table(standings: Sequence[Standing], size: str) -> list[list[str]]:
    """Returns the distances of every loss from the optimum under each kind of labels, the head first."""
    of_size = [s for s in standings if s.size == size]
    rows = []
    for name in order_of(of_size):
        cells = {s.labels: s for s in of_size if s.loss == name}
        rows.append([name, *(_mean_text(s.distances[MAIN]) + UNBEATEN * (not s.beaten_by) for s in cells.values())])
    return [[f"{size} data", *(WORDS.get(labels, labels) for labels in LABELS)], *rows]


def condition_table(standings: Sequence[Standing], labels: str, size: str) -> list[list[str]]:
    """Returns everything on one condition, the nearest loss first, under its head."""
    chosen = [s for s in standings if (s.labels, s.size) == (labels, size)]
    rows = [_cells(s) for s in sorted(chosen, key=lambda s: s.distances[MAIN].mean)]
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def _cells(s: Standing) -> dict[str, str]:
    """Returns the row of a standing by the names of the columns."""
    return {
        "loss": s.loss,
        "beta": "" if math.isnan(s.beta) else f"{s.beta:g}",
        **{f"reward at {b:g}": _mean_text(r) for b, r in zip(BUDGETS, s.rewards, strict=True)},
        "distance": _mean_text(s.distances[MAIN]),
        "end: KL": _mean_text(s.end_kl),
        "reward": _mean_text(s.end_reward),
        "its distance": _mean_text(s.end_distance),
        "calibration error": _mean_text(s.calibration, 3),
        "log p chosen": f"{s.chosen.mean:+.2f} +- {s.chosen.half:.2f}",
        "fell": f"{s.fell:.0%}",
        "dominated by": s.beaten_by,
    }


def _mean_text(value: MeanInterval, digits: int = 2) -> str:
    return "-" if math.isnan(value.mean) else f"{value.mean:.{digits}f} +- {value.half:.{digits}f}"


def leaderboard_figure(standings: Sequence[Standing]) -> str:
    """Returns the distances as SVG: a row for each loss, a panel for each size, a color for each kind of labels."""
    names = order_of(standings)
    texts, centers, height = name_rows(names)
    fig = figure.new_figure(9, max(1.4 + ROW * height, LEAST_HEIGHT))
    for column, size in enumerate(SIZES):
        axes = fig.add_subplot(1, len(SIZES), column + 1)
        for i, labels in enumerate(LABELS):
            rows = {s.loss: s.distances[MAIN] for s in standings if (s.labels, s.size) == (labels, size)}
            y = [centers[names.index(name)] + 0.18 * (i - 1.5) for name in rows]
            x, half = np.array(list(rows.values())).T
            style = {"fmt": MARKERS[i], "ms": 3.5, "elinewidth": 0.8, "color": figure.COLOURS[i]}
            axes.errorbar(x, y, xerr=half, label=WORDS.get(labels, labels), **style)
        axes.set_yticks(centers, texts if column == 0 else [""] * len(names), parse_math=False)
        axes.set_ylim(height - 0.4, -0.6)
        axes.set_title(f"{size} data", color=figure.INK, fontsize=10)
        figure.style_axes(axes, "")
    fig.supxlabel(f"distance from the optimum at {BUDGETS[MAIN]:g} nat of KL, nats", color=figure.INK, fontsize=9)
    figure.add_legend(fig.axes[-1], beside=True)
    return figure.set_svg_id(fig)


def name_rows(names: Sequence[str]) -> tuple[list[str], list[float], float]:
    """Returns names broken into lines, the centers of their rows from 0 on, and the height of all, in rows of a line.

    A name is broken after its commas, so that the coordinates of a point of the axes leave room for the panels.
    """
    texts = ["\n".join(textwrap.wrap(name.replace(",", ", "), NAME_WIDTH, break_on_hyphens=False)) for name in names]
    heights = [1 + LINE / ROW * text.count("\n") for text in texts]
    ends = np.cumsum(heights)
    return texts, (ends - np.array(heights) / 2 - 0.5).tolist(), float(ends[-1])


def render_leaderboard(found: LeaderboardResult, lines: Sequence[str]) -> str:
    """Returns the page as HTML; `lines` are sentences on the worlds."""
    conditions = [(f"{WORDS.get(labels, labels)} labels, {size} data", condition_table(found.standings, labels, size))
                  for labels, size in CONDITIONS]  # fmt: skip
    return render_page(
        "leaderboard.html",
        title="Losses where the truth is known",
        lines=lines,
        panel=figure.Panel(leaderboard_figure(found.standings), caption=NOTE),
        tables=[leaderboard_table(found.standings, size) for size in SIZES],
        conditions=conditions,
    )


def leaderboard_json(found: LeaderboardResult) -> dict[str, Any]:
    """Returns the result as JSON values: the standings, and the means over seeds of every path."""
    limits, calibration = found.limits
    return {
        "seeds": found.seeds,
        "steps": found.steps,
        "budgets": list(BUDGETS),
        "optimum": [json_values(limit) for limit in limits],
        "calibration_of_the_reference": json_values(calibration),
        "standings": [json_values(s) for s in found.standings],
        "paths": {name: _path_json(paths) for name, paths in found.paths.items()},
    }


def _path_json(paths: LossPaths) -> dict[str, Any]:
    """Returns the means over seeds of a loss's paths, rounded: condition -> a list for each strength."""
    measures = {"reward": paths.reward, "kl": paths.kl, "chosen": paths.chosen}
    of = {
        "-".join(condition): {name: _rounded(values[:, i].mean(1)) for name, values in measures.items()}
        for i, condition in enumerate(CONDITIONS)
    }
    return {"betas": json_values(tuple(paths.betas)), "steps": paths.steps.tolist(), "conditions": of}


def _rounded(values: Array) -> list[list[float | None]]:
    """Returns float[S, K] as lists; NaN and infinities become null."""
    return [json_values(tuple(row)) for row in np.round(values, 4).tolist()]
