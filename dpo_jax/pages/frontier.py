"""What `dpo-jax frontier` found: its tables and figures, on one page without scripts or anything from a network."""

import html
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.experiments.frontier import FrontierResult
from dpo_jax.experiments.optimum import RewardLimit, reward_limit
from dpo_jax.experiments.world import Point
from dpo_jax.pages import figure
from dpo_jax.pages.run import STYLE as PAGE_STYLE
from dpo_jax.pages.run import TEMPLATE
from dpo_jax.rewards.winrate import kl_bound

NAMES = {
    "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "ppo_gt": "PPO-GT", "online_dpo": "Online DPO",
    "unlikelihood": "Unlikelihood", "preferred_ft": "Preferred-FT", "best_of": "Best of N",
}  # fmt: skip
STRENGTHS = {
    "dpo": "beta {:g}", "ppo": "target KL {:g}", "ppo_gt": "target KL {:g}",
    "online_dpo": "beta {:g}", "unlikelihood": "alpha {:g}", "preferred_ft": "seed {:g}",
}  # fmt: skip
BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
HEAD = ("method", "strength", "step", "reward", "KL", "optimum", "gap", "log p chosen", "rejected", "tokens", "cut")
STYLE = "<style>svg { color: #222 } @media (prefers-color-scheme: dark) { svg { color: #ddd } }</style>"


class Gap(NamedTuple):
    """How much less reward a policy has than the best at its KL.

    Attributes:
      mean: reward; an upper bound where the optimum is not known.
      half: half its 95% interval, as if the errors of reward, KL and optimum were independent.
      known: whether the optimum at this KL is known.
    """

    mean: float
    half: float
    known: bool


def frontier_gap(found: FrontierResult, reward: float, reward_half: float, kl: float, kl_half: float) -> Gap:
    """Returns the distance to the optimum at equal KL."""
    best = reward_limit(found.curve, kl)
    return Gap(best.reward - reward, math.hypot(reward_half, best.half, best.slope * kl_half), best.known)


def describe_point(found: FrontierResult, point: Point) -> Gap:
    """Returns the distance of a point."""
    return frontier_gap(found, point.reward, point.reward_half, point.kl, point.kl_half)


def frontier_runs(points: Iterable[Point]) -> dict[tuple[str, float], list[Point]]:
    """Returns the points of each run, (method, strength), in the order of their steps."""
    grouped: dict[tuple[str, float], list[Point]] = {}
    for point in sorted(points, key=lambda p: p.step):
        grouped.setdefault((point.method, point.strength), []).append(point)
    return grouped


def within(points: Sequence[Point], method: str, budget: float) -> Point:
    """Returns the point of a method, or the reference, with the most reward among those of at most so much KL."""
    allowed = [p for p in points if p.method in ("sft", method) and (p.kl <= budget or p.method == "sft")]
    return max(allowed, key=lambda p: p.reward)


def frontier_table(found: FrontierResult) -> list[list[str]]:
    """Returns a row for each run at its last step, the reference and the best of N; the head first."""
    ordered = sorted(frontier_runs(found.points).items(), key=lambda run: (list(NAMES).index(run[0][0]), run[0][1]))
    rows = [_cells(found, path[-1]) for _, path in ordered]
    for best in found.best_of:
        kl = kl_bound(best.n)
        distance = frontier_gap(found, best.reward, best.reward_half, kl, 0.0)
        reward, limit_ = _pm(best.reward, best.reward_half), _limit(reward_limit(found.curve, kl))
        rows.append(["Best of N", f"N {best.n}", "", reward, f"<= {kl:.2f}", limit_, _gap(distance), "", "", "", ""])
    return [list(HEAD), *rows]


def _cells(found: FrontierResult, point: Point) -> list[str]:
    return [
        NAMES[point.method], STRENGTHS.get(point.method, "").format(point.strength), str(point.step),
        _pm(point.reward, point.reward_half), _pm(point.kl, point.kl_half), _limit(reward_limit(found.curve, point.kl)),
        _gap(describe_point(found, point)), f"{point.chosen:.1f}", f"{point.rejected:.1f}", f"{point.tokens:.1f}",
        f"{point.cut:.0%}",
    ]  # fmt: skip


def _pm(mean: float, half: float) -> str:
    return f"{mean:.2f} +- {half:.2f}"


def _limit(best: RewardLimit) -> str:
    return ("" if best.known else "<= ") + (f"{best.reward:.2f}" if math.isfinite(best.reward) else "?")


def _gap(distance: Gap) -> str:
    if not math.isfinite(distance.mean):
        return "?"
    return f"{distance.mean:.2f} +- {distance.half:.2f}" if distance.known else f"<= {distance.mean:.2f}"


def budgets(found: FrontierResult) -> list[list[str]]:
    """Returns the most reward that each method reaches within each KL, and how far that is from the optimum there."""
    methods = [m for m in NAMES if any(p.method == m for p in found.points) and m != "sft"]
    rows = [["optimum", *(_limit(reward_limit(found.curve, b)) for b in BUDGETS)]]
    for method in methods:
        best = [within(found.points, method, b) for b in BUDGETS]
        rows.append([NAMES[method], *(_pm(p.reward, p.reward_half) for p in best)])
    reached = [[b for b in found.best_of if kl_bound(b.n) <= budget] for budget in BUDGETS]
    if all(reached):
        rows.append(["Best of N", *(_pm(r[-1].reward, r[-1].reward_half) for r in reached)])
    return [["reward within a KL of", *(f"{b:g}" for b in BUDGETS)], *rows]


def optima(found: FrontierResult) -> list[list[str]]:
    """Returns the optimum at each beta, those left out too."""
    rows = [
        [
            "reference" if math.isinf(o.beta) else f"beta {o.beta:g}", _pm(o.reward, o.reward_half),
            _pm(o.kl, o.kl_half), "all" if math.isinf(o.effective) else f"{o.effective:.0f}",
            "left out: too few" if o in found.left_out else "",
        ]
        for o in (*found.curve, *found.left_out)
    ]  # fmt: skip
    return [["optimum", "reward", "KL", "effective samples", ""], *rows]


def frontier_curve(found: FrontierResult) -> str:
    """Returns figure 2 (left) as SVG: every point of every method, the best of N and the optimum."""
    fig, axes = _figure()
    _optimum(axes, found, max((p.kl for p in found.points), default=1.0))
    for i, method in enumerate(m for m in NAMES if any(p.method == m for p in found.points)):
        those = [p for p in found.points if p.method == method]
        x, y = [p.kl for p in those], [p.reward for p in those]
        around = {"xerr": [p.kl_half for p in those], "yerr": [p.reward_half for p in those]}
        style = {"fmt": "s" if method == "sft" else "o", "ms": 4, "lw": 0, "elinewidth": 0.6, "alpha": 0.85}
        axes.errorbar(x, y, **around, color=figure.COLOURS[i], label=NAMES[method], **style)
    if found.best_of:
        x, y = [kl_bound(b.n) for b in found.best_of], [b.reward for b in found.best_of]
        axes.plot(x, y, "^--", color=figure.COLOURS[7], ms=4, lw=1, label="Best of N (KL: bound)")
    return _drawn(fig, axes, "KL(policy || reference), nats", "true reward")


def frontier_paths(found: FrontierResult, method: str = "dpo") -> str:
    """Returns the way of each run of a method through KL and reward as SVG; "" where there is none."""
    of_method = {key: path for key, path in frontier_runs(found.points).items() if key[0] == method}
    if not of_method:
        return ""
    fig, axes = _figure()
    start = [p for p in found.points if p.method == "sft"]
    _optimum(axes, found, max(p.kl for path in of_method.values() for p in path))
    for i, ((_, strength), path) in enumerate(sorted(of_method.items())):
        x, y = zip(*((p.kl, p.reward) for p in (*start, *path)), strict=True)
        axes.plot(x, y, "o-", color=figure.COLOURS[i % 10], ms=4, lw=1.4, label=STRENGTHS[method].format(strength))
    return _drawn(fig, axes, "KL(policy || reference), nats", "true reward")


def likelihoods(found: FrontierResult, method: str = "dpo") -> str:
    """Returns the log-probs of held-out chosen and rejected responses over the steps of a method's runs as SVG."""
    of_method = {key: path for key, path in frontier_runs(found.points).items() if key[0] == method}
    if not of_method:
        return ""
    fig, axes = _figure()
    start = [p for p in found.points if p.method == "sft"]
    for i, ((_, strength), path) in enumerate(sorted(of_method.items())):
        whole, colour = [*start, *path], figure.COLOURS[i % 10]
        for name, dash in (("chosen", "o-"), ("rejected", "s:")):
            label = f"{STRENGTHS[method].format(strength)}, {name}"
            y = [getattr(p, name) for p in whole]
            axes.plot([p.step for p in whole], y, dash, color=colour, ms=3.5, lw=1.4, label=label)
    return _drawn(fig, axes, "steps", "mean log-probability of held-out responses")


def _figure() -> "tuple[figure.Figure, figure.Axes]":
    fig = figure.new_figure(7.5, 4.6)
    return fig, fig.add_subplot()


def _optimum(axes: "figure.Axes", found: FrontierResult, most: float) -> None:
    """Draws the optimum with its interval, and dashed the tangent that nothing is above where it is not known."""
    x, y = [o.kl for o in found.curve], [o.reward for o in found.curve]
    half = [o.reward_half for o in found.curve]
    axes.plot(x, y, color=figure.INK, lw=1.6, label="optimum")
    low, high = ([a + s * h for a, h in zip(y, half, strict=True)] for s in (-1, 1))
    axes.fill_between(x, low, high, color=figure.INK, alpha=0.12, lw=0)
    highest = max(r.reward for r in (*found.points, *found.best_of))
    if most > x[-1] and highest > y[-1] and len(x) > 1:  # up to where it would be all that is seen
        end = min(most, x[-1] + (highest - y[-1]) / found.curve[-1].beta)
        tangent = [y[-1], reward_limit(found.curve, end).reward]
        axes.plot([x[-1], end], tangent, ls=":", color=figure.INK, lw=1.2, label="above it nothing is")


def _drawn(fig: "figure.Figure", axes: "figure.Axes", x: str, y: str) -> str:
    axes.set_ylabel(y, color=figure.INK, fontsize=9)
    axes.legend(frameon=False, labelcolor=figure.INK, fontsize=8)
    return figure.figure_svg(fig, axes, x)


def standalone_figure(svg: str) -> str:
    """Returns a figure as a file of its own, in the colours of whoever looks at it."""
    head, end, rest = svg.partition(">")
    return f"{head}{end}{STYLE}{rest}"


def frontier_figures(found: FrontierResult) -> dict[str, str]:
    """Returns the figures as SVG by name, those for which there is something to draw."""
    makers: Mapping[str, Callable[[FrontierResult], str]] = {
        "frontier": frontier_curve,
        "paths": frontier_paths,
        "likelihoods": likelihoods,
    }
    return {name: drawn for name, make in makers.items() if (drawn := make(found))}


NOTES = {
    "frontier": "The paper's figure 2, left: every measurement of every run, with 95% intervals.",
    "paths": "DPO from the reference (left) step by step. Where a way goes right without going up, the policy moves "
    "away from the reference without reward for it; where it goes down, it is over-optimised.",
    "likelihoods": "Log-probabilities of held-out pairs. DPO raises the margin between chosen and rejected; that of "
    "the chosen ones may fall with it, as they share most of their words with the rejected.",
}


def render_frontier(found: FrontierResult, lines: Sequence[str]) -> str:
    """Returns the whole page as HTML; `lines` say in words what was done."""
    drawn = frontier_figures(found)
    shown = "".join(f"<figure>{drawn[n]}<figcaption>{NOTES[n]}</figcaption></figure>" for n in drawn)
    note = (
        "Reward and KL: means over one completion of each held-out prompt at temperature 1, with 95% intervals. "
        "Optimum: the most reward of any policy at that KL; gap: how much less the run has. <=: beyond the last beta "
        "of which enough is known, a bound, which no policy exceeds. KL of the best of N: its bound."
    )
    parts = [
        "<h1>Reward against KL</h1>",
        *(f"<p>{_escape(line)}</p>" for line in lines),
        f'<div class="figures">{shown}</div>',
        "<h2>Most reward within a KL</h2>" + _table(budgets(found)),
        "<h2>Runs at their last step</h2>" + _table(frontier_table(found)) + f'<p class="note">{note}</p>',
        "<h2>The optimum</h2>" + _table(optima(found)),
    ]
    return TEMPLATE.format(title="Reward against KL", style=PAGE_STYLE, body="\n".join(parts))


def frontier_json(found: FrontierResult) -> dict[str, Any]:
    """Returns all of it as JSON has it; infinities become null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def rows(records: Iterable[Any], **more: Callable[[Any], Any]) -> list[dict[str, Any]]:
        every = ({k: plain(v) for k, v in r._asdict().items()} | {k: f(r) for k, f in more.items()} for r in records)
        return list(every)

    def distance(point: Point) -> dict[str, Any]:
        return {k: plain(v) for k, v in describe_point(found, point)._asdict().items()}

    return {
        "points": rows(found.points, gap=distance),
        "optimum": rows(found.curve),
        "left_out": rows(found.left_out),
        "best_of": rows(found.best_of, kl_bound=lambda b: kl_bound(b.n)),
        "prompts": found.prompts,
        "pairs": found.pairs,
        "listed": found.listed,
    }


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = itertools.chain([("th", rows[0])], (("td", row) for row in rows[1:]))
    lines = ("<tr>" + "".join(f"<{tag}>{_escape(c)}</{tag}>" for c in row) + "</tr>" for tag, row in cells)
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _escape(value: object) -> str:
    """Returns any text so that a browser shows it and never obeys it."""
    return html.escape(str(value))
