"""Tables, figures and page of `dpo-jax frontier`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.experiments.frontier import BestOf, FrontierResult
from dpo_jax.experiments.optimum import RewardLimit, reward_limit
from dpo_jax.experiments.world import Point
from dpo_jax.pages import figure
from dpo_jax.pages.output import json_values, render_page
from dpo_jax.rewards.winrate import kl_bound

NAMES = {
    "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "ppo_gt": "PPO-GT", "online_dpo": "Online DPO",
    "unlikelihood": "Unlikelihood", "preferred_ft": "Preferred-FT", "best_of": "Best of N",
}  # fmt: skip
STRENGTHS = {
    "dpo": "beta {:g}", "ppo": "target KL {:g}", "ppo_gt": "target KL {:g}",
    "online_dpo": "beta {:g}", "unlikelihood": "alpha {:g}", "preferred_ft": "seed {:g}",
}  # fmt: skip
UNORDERED = ("sft", "preferred_ft")  # without a strength: one run, and runs that differ in their seed
ERROR_BARS: dict[str, Any] = {"ms": 5, "elinewidth": 0.8, "capsize": 2, "alpha": 0.9}
CURVE_POINTS = 200
BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
STYLE = "<style>svg { color: #222 } @media (prefers-color-scheme: dark) { svg { color: #ddd } }</style>"
CAPTIONS = {
    "frontier": "The paper's figure 2, left: each run at its last step with 95% intervals, labeled with its strength. "
    "Small points: earlier steps.",
    "paths": "The runs of DPO step by step, from the reference at the left. Where a path goes right but not up, the "
    "policy moves away from the reference without more reward; where it goes down, the policy is over-optimized.",
    "likelihoods": "Log-probabilities of held-out pairs. DPO raises the margin between chosen and rejected responses. "
    "The log-probability of the chosen responses may fall too, since they share most of their words with the rejected "
    "ones.",
}


class Gap(NamedTuple):
    """Difference between the highest reward at a policy's KL and its reward.

    Attributes:
      mean: reward; an upper bound if the optimum at this KL is not known.
      half: half its 95% interval, from independent errors of reward, KL and optimum.
      known: whether the optimum at this KL is known.
    """

    mean: float
    half: float
    known: bool


def frontier_gap(found: FrontierResult, reward: float, reward_half: float, kl: float, kl_half: float) -> Gap:
    """Returns the gap to the optimum at equal KL; `reward_half` and `kl_half` are half the 95% intervals."""
    best = reward_limit(found.curve, kl)
    return Gap(best.reward - reward, math.hypot(reward_half, best.half, best.slope * kl_half), best.known)


def point_gap(found: FrontierResult, point: Point) -> Gap:
    """Returns the gap of a measured policy."""
    return frontier_gap(found, point.reward, point.reward_half, point.kl, point.kl_half)


def frontier_runs(points: Iterable[Point]) -> dict[tuple[str, float], list[Point]]:
    """Returns (method, strength) -> the points of that run in the order of their steps."""
    grouped: dict[tuple[str, float], list[Point]] = {}
    for point in sorted(points, key=lambda p: p.step):
        grouped.setdefault((point.method, point.strength), []).append(point)
    return grouped


def best_within(points: Sequence[Point], method: str, budget: float) -> Point:
    """Returns the point with the highest reward among the reference and the method's points of at most this KL."""
    allowed = [p for p in points if p.method in ("sft", method) and (p.kl <= budget or p.method == "sft")]
    return max(allowed, key=lambda p: p.reward)


def frontier_table(found: FrontierResult) -> list[list[str]]:
    """Returns the table of runs at their last step, the reference and the best of N; the head is the first row."""
    ordered = sorted(frontier_runs(found.points).items(), key=lambda run: (list(NAMES).index(run[0][0]), run[0][1]))
    rows = [_cells(found, path[-1]) for _, path in ordered]
    head = list(rows[0])
    rows += [_best_of_cells(found, best) for best in found.best_of]
    return [head, *([row.get(name, "") for name in head] for row in rows)]


def _cells(found: FrontierResult, point: Point) -> dict[str, str]:
    """Returns the row of a point by the names of the columns."""
    return {
        "method": NAMES[point.method],
        "strength": STRENGTHS.get(point.method, "").format(point.strength),
        "step": str(point.step),
        "reward": _interval_text(point.reward, point.reward_half),
        "KL": _interval_text(point.kl, point.kl_half),
        "optimum": _limit_text(reward_limit(found.curve, point.kl)),
        "gap": _gap_text(point_gap(found, point)),
        "log p chosen": f"{point.chosen:.1f}",
        "rejected": f"{point.rejected:.1f}",
        "tokens": f"{point.tokens:.1f}",
        "cut": f"{point.cut:.0%}",
    }


def _best_of_cells(found: FrontierResult, best: BestOf) -> dict[str, str]:
    """Returns the row of the best of N by the names of the columns."""
    kl = kl_bound(best.n)
    return {
        "method": NAMES["best_of"],
        "strength": f"N {best.n}",
        "reward": _interval_text(best.reward, best.reward_half),
        "KL": f"<= {kl:.2f}",
        "optimum": _limit_text(reward_limit(found.curve, kl)),
        "gap": _gap_text(frontier_gap(found, best.reward, best.reward_half, kl, 0.0)),
    }


def _interval_text(mean: float, half: float) -> str:
    return f"{mean:.2f} +- {half:.2f}"


def _limit_text(best: RewardLimit) -> str:
    return ("" if best.known else "<= ") + (f"{best.reward:.2f}" if math.isfinite(best.reward) else "?")


def _gap_text(gap: Gap) -> str:
    if not math.isfinite(gap.mean):
        return "?"
    return _interval_text(gap.mean, gap.half) if gap.known else f"<= {gap.mean:.2f}"


def budgets(found: FrontierResult) -> list[list[str]]:
    """Returns the table of the optimum and the highest reward of each method within each KL; the head first."""
    methods = [m for m in NAMES if any(p.method == m for p in found.points) and m != "sft"]
    rows = [["optimum", *(_limit_text(reward_limit(found.curve, b)) for b in BUDGETS)]]
    for method in methods:
        best = [best_within(found.points, method, b) for b in BUDGETS]
        rows.append([NAMES[method], *(_interval_text(p.reward, p.reward_half) for p in best)])
    reached = [[b for b in found.best_of if kl_bound(b.n) <= budget] for budget in BUDGETS]
    if all(reached):
        rows.append(["Best of N", *(_interval_text(r[-1].reward, r[-1].reward_half) for r in reached)])
    return [["reward within a KL of", *(f"{b:g}" for b in BUDGETS)], *rows]


def optima(found: FrontierResult) -> list[list[str]]:
    """Returns the table of the optimum at each beta, with the ones that were left out; the head first."""
    rows = [
        [
            "reference" if math.isinf(o.beta) else f"beta {o.beta:g}",
            _interval_text(o.reward, o.reward_half),
            _interval_text(o.kl, o.kl_half),
            "all" if math.isinf(o.effective) else f"{o.effective:.0f}",
            "left out: too few" if o in found.left_out else "",
        ]
        for o in (*found.curve, *found.left_out)
    ]
    return [["optimum", "reward", "KL", "effective samples", ""], *rows]


def frontier_curve(found: FrontierResult) -> str:
    """Returns figure 2 (left) of the paper as SVG: the runs of each method, the best of N and the optimum.

    The last points of a method's runs are joined in the order of their strengths, and labeled with them; runs that
    differ in their seed only are not. Points of earlier steps are small.
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
    return _finish_reward(fig, axes)


def _draw_method(axes: "figure.Axes", found: FrontierResult, method: str, i: int) -> None:
    """Draws the last points of a method's runs with their intervals, and the earlier ones without, in color `i`."""
    color = figure.COLOURS[i]
    runs = sorted(run for run in frontier_runs(found.points).items() if run[0][0] == method)
    last = [path[-1] for _, path in runs]
    earlier = [p for _, path in runs for p in path[:-1]]
    axes.plot([p.kl for p in earlier], [p.reward for p in earlier], ".", color=color, ms=3, alpha=0.5)
    x, y = [p.kl for p in last], [p.reward for p in last]
    kind, joined = _strength_name(method), method not in UNORDERED
    errors = {"xerr": [p.kl_half for p in last], "yerr": [p.reward_half for p in last]}
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
    start = [p for p in found.points if p.method == "sft"]
    runs = sorted((strength, path) for (name, strength), path in frontier_runs(found.points).items() if name == method)
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
