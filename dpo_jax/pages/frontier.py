"""Figures, page and JSON of `dpo-jax frontier`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.experiments.optimum import reward_limit
from dpo_jax.experiments.points import FrontierResult, Point, over_seeds, point_seeds
from dpo_jax.pages import figure
from dpo_jax.pages.frontier_tables import (
    BUDGETS,
    NAMES,
    STRENGTHS,
    budgets,
    differences,
    frontier_runs,
    frontier_table,
    optima,
    point_gap,
)
from dpo_jax.pages.output import json_values, render_page
from dpo_jax.rewards.winrate import kl_bound

UNORDERED = ("sft", "preferred_ft")  # without a strength: one run, and runs that differ in their seed
ERROR_BARS: dict[str, Any] = {"ms": 5, "elinewidth": 0.8, "capsize": 2, "alpha": 0.9}
CURVE_POINTS = 200
STYLE = "<style>svg { color: #222 } @media (prefers-color-scheme: dark) { svg { color: #ddd } }</style>"
CAPTIONS = {
    "frontier": "The paper's figure 2, left: each run at its last step with 95% intervals, labeled with its strength. "
    "Small points: earlier steps; with several seeds, the last step of each.",
    "paths": "The runs of DPO step by step, from the reference at the left. Where a path goes right but not up, the "
    "policy moves away from the reference without more reward; where it goes down, the policy is over-optimized.",
    "likelihoods": "Log-probabilities of held-out pairs. DPO raises the margin between chosen and rejected responses. "
    "The log-probability of the chosen responses may fall too, since they share most of their words with the rejected "
    "ones.",
}


def frontier_curve(found: FrontierResult) -> str:
    """Returns figure 2 (left) of the paper as SVG: the runs of each method, the best of N and the optimum.

    The last points of a method's runs are joined in the order of their strengths, and labeled with them; runs that
    differ in their seed only are not. With several seeds these are means, and each seed's last point is small; with
    one, the points of earlier steps are.
    """
    fig, axes = _new_axes()
    _draw_optimum(axes, found, max((p.kl for p in found.points), default=1.0))
    for i, method in enumerate(m for m in NAMES if any(p.method == m for p in found.points)):
        _draw_method(axes, found, method, i)
    if found.best_of:
        x, y = [kl_bound(b.n) for b in found.best_of], [b.reward for b in found.best_of]
        style: dict[str, Any] = {"color": figure.COLOURS[7], "label": "Best of N (KL: bound)"} | ERROR_BARS
        axes.errorbar(x, y, [b.reward_half for b in found.best_of], fmt="^--", lw=1, **style)
        figure.label_points(axes, x, y, [str(b.n) for b in found.best_of], figure.COLOURS[7], 2)
    drawn = [*(p.kl for p in found.points), *(kl_bound(b.n) for b in found.best_of)]
    farthest = max(1.0, *drawn)
    axes.set_xlim(min(0.0, *drawn) - 0.005 * farthest, 1.2 * farthest)  # intervals over few seeds may go much further
    return _finish_reward(fig, axes)


def _draw_method(axes: "figure.Axes", found: FrontierResult, method: str, i: int) -> None:
    """Draws the last points of a method's runs with their intervals, and small ones without, in color `i`."""
    color = figure.COLOURS[i]
    runs = sorted(run for run in frontier_runs(over_seeds(found.points)).items() if run[0][0] == method)
    last = [path[-1] for _, path in runs]
    if len(point_seeds(found.points)) > 1:
        small = [p for p in found.points if any(p[:3] == mean[:3] for mean in last)]
    else:
        small = [p for _, path in runs for p in path[:-1]]
    axes.plot([p.kl for p in small], [p.reward for p in small], ".", color=color, ms=3, alpha=0.5)
    x, y = [p.kl for p in last], [p.reward for p in last]
    kind, joined = _strength_name(method), method not in UNORDERED
    below = [min(p.kl_half, max(p.kl, 0.0)) for p in last]  # no KL is below 0
    errors = {"xerr": [below, [p.kl_half for p in last]], "yerr": [p.reward_half for p in last]}
    label = NAMES[method] + (f", by {kind}" if joined else f", each {kind}" if kind else "")
    marker = "o-" if joined else "s" if method == "sft" else "o"
    axes.errorbar(x, y, **errors, fmt=marker, lw=1.2, color=color, label=label, **ERROR_BARS)
    if joined:
        figure.label_points(axes, x, y, [f"{p.strength:g}" for p in last], color, i)


def _strength_name(method: str) -> str:
    """Returns what the strength of a method is: beta, target KL, ..."""
    return STRENGTHS.get(method, "").partition(" {")[0]


def frontier_paths(found: FrontierResult, method: str = "dpo") -> str:
    """Returns the KL and reward of a method's runs, step by step, as SVG; "" if it has no runs."""
    paths = _method_paths(found, method)
    if not paths:
        return ""
    fig, axes = _new_axes()
    _draw_optimum(axes, found, max(p.kl for _, path in paths for p in path))
    for i, (label, path) in enumerate(paths):
        x, y = [p.kl for p in path], [p.reward for p in path]
        axes.plot(x, y, "o-", color=figure.COLOURS[i % 10], ms=4, lw=1.4, label=label)
    return _finish_reward(fig, axes)


def likelihoods(found: FrontierResult, method: str = "dpo") -> str:
    """Returns the log-probs of held-out chosen and rejected responses over the steps of a method's runs as SVG."""
    paths = _method_paths(found, method)
    if not paths:
        return ""
    fig, axes = _new_axes()
    for i, (label, path) in enumerate(paths):
        steps, style = [p.step for p in path], {"color": figure.COLOURS[i % 10], "ms": 3.5, "lw": 1.4}
        axes.plot(steps, [p.chosen for p in path], "o-", label=f"{label}, chosen", **style)
        axes.plot(steps, [p.rejected for p in path], "s:", label=f"{label}, rejected", **style)
    return _finish(fig, axes, "steps", "mean log-probability of held-out responses")


def _method_paths(found: FrontierResult, method: str) -> list[tuple[str, list[Point]]]:
    """Returns (label, points) of each run of a method, by rising strength; a run starts at the reference."""
    points = over_seeds(found.points)
    start = [p for p in points if p.method == "sft"]
    runs = sorted((strength, path) for (name, strength), path in frontier_runs(points).items() if name == method)
    return [(STRENGTHS[method].format(strength), [*start, *path]) for strength, path in runs]


def _new_axes() -> "tuple[figure.Figure, figure.Axes]":
    fig = figure.new_figure(7.5, 4.4)
    return fig, fig.add_subplot()


def _draw_optimum(axes: "figure.Axes", found: FrontierResult, largest_kl: float) -> None:
    """Draws the optimum with its interval and, beyond the last known optimum, its tangent: an upper bound."""
    x, y = [o.kl for o in found.curve], [o.reward for o in found.curve]
    fine = np.linspace(x[0], x[-1], CURVE_POINTS)  # straight between the optima on a linear scale only
    axes.plot(fine, np.interp(fine, x, y), color=figure.INK, lw=1.8, label="optimum")
    low, high = (np.interp(fine, x, [o.reward + sign * o.reward_half for o in found.curve]) for sign in (-1, 1))
    axes.fill_between(fine, low, high, color=figure.INK, alpha=0.12, lw=0)
    highest = max(r.reward for r in (*found.points, *found.best_of))
    if largest_kl > x[-1] and highest > y[-1] and len(x) > 1:
        # The tangent ends at the highest measured reward: a longer one would stretch the axis over empty space.
        end = min(largest_kl, x[-1] + (highest - y[-1]) / found.curve[-1].beta)
        beyond = np.linspace(x[-1], end, CURVE_POINTS)
        bound = [reward_limit(found.curve, float(kl)).reward for kl in beyond]
        axes.plot(beyond, bound, ls=":", color=figure.INK, lw=1.4, label="upper bound")


def _finish_reward(fig: "figure.Figure", axes: "figure.Axes") -> str:
    """Returns a figure of reward against KL as SVG; the scale of the KL is that of its square root."""
    figure.set_square_root_scale(axes, BUDGETS)
    return _finish(fig, axes, "KL(policy || reference), nats (square-root scale)", "true reward")


def _finish(fig: "figure.Figure", axes: "figure.Axes", x_label: str, y_label: str) -> str:
    figure.add_legend(axes, beside=True)
    return figure.figure_svg(fig, axes, x_label, y_label)


def standalone_figure(svg: str) -> str:
    """Returns a figure as the content of an SVG file, with a text color for light and for dark mode."""
    head, end, rest = svg.partition(">")
    return f"{head}{end}{STYLE}{rest}"


def frontier_figures(found: FrontierResult) -> dict[str, str]:
    """Returns name -> SVG of the figures that have data."""
    makers: Mapping[str, Callable[[FrontierResult], str]] = {
        "frontier": frontier_curve,
        "paths": frontier_paths,
        "likelihoods": likelihoods,
    }
    return {name: svg for name, make in makers.items() if (svg := make(found))}


def render_frontier(found: FrontierResult, lines: Sequence[str]) -> str:
    """Returns the page as HTML; `lines` are sentences on the experiment."""
    return render_page(
        "frontier.html",
        title="Reward against KL",
        lines=lines,
        panels=[figure.Panel(svg, caption=CAPTIONS[name]) for name, svg in frontier_figures(found).items()],
        budgets=budgets(found),
        differences=differences(found),
        runs=frontier_table(found),
        optima=optima(found),
    )


def frontier_json(found: FrontierResult) -> dict[str, Any]:
    """Returns the result as JSON values; infinities become null."""
    return {
        "points": [json_values(p) | {"gap": json_values(point_gap(found, p))} for p in found.points],
        "optimum": [json_values(o) for o in found.curve],
        "left_out": [json_values(o) for o in found.left_out],
        "best_of": [json_values(b) | {"kl_bound": kl_bound(b.n)} for b in found.best_of],
        "prompts": found.prompts,
        "pairs": found.pairs,
        "listed": found.enumerated,
    }
