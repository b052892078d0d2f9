"""Tables of `dpo-jax frontier`: runs, gaps to the optimum, the highest reward within a KL, differences of methods."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from dpo_jax.experiments.optimum import RewardLimit, reward_limit
from dpo_jax.experiments.points import (
    BestOf,
    FrontierResult,
    Point,
    best_of_seeds,
    difference_of_seeds,
    over_seeds,
    point_seeds,
)
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


def frontier_table(found: FrontierResult) -> list[list[str]]:
    """Returns the table of runs at their last step, the reference and the best of N; the head is the first row."""
    runs = frontier_runs(over_seeds(found.points)).items()
    ordered = sorted(runs, key=lambda run: (list(NAMES).index(run[0][0]), run[0][1]))
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
    """Returns the table of the optimum and the highest reward of each method within each KL; the head first.

    With several seeds, the highest reward of each seed, averaged.
    """
    methods = _trained_methods(found)
    rows = [["optimum", *(_limit_text(reward_limit(found.curve, b)) for b in BUDGETS)]]
    for method in methods:
        rows.append([NAMES[method], *(_interval_text(*best_of_seeds(found.points, method, b)) for b in BUDGETS)])
    reached = [[b for b in found.best_of if kl_bound(b.n) <= budget] for budget in BUDGETS]
    if all(reached):
        rows.append(["Best of N", *(_interval_text(r[-1].reward, r[-1].reward_half) for r in reached)])
    return [["reward within a KL of", *(f"{b:g}" for b in BUDGETS)], *rows]


def _trained_methods(found: FrontierResult) -> list[str]:
    """Returns the methods that have runs, in the order of tables."""
    return [m for m in NAMES if m != "sft" and any(p.method == m for p in found.points)]


def differences(found: FrontierResult, method: str = "dpo") -> list[list[str]]:
    """Returns the table of a method's highest reward within each KL less those of the others, paired by seed.

    The head is first. A method is above or below another one where the interval excludes 0. Empty with one seed, or
    without runs of the method.
    """
    others = [m for m in _trained_methods(found) if m != method]
    if len(point_seeds(found.points)) == 1 or len(others) == len(_trained_methods(found)):
        return []

    def cell(other: str, budget: float) -> str:
        mean, half = difference_of_seeds(found.points, method, other, budget)
        return _interval_text(mean, half) + (", above" if mean > half else ", below" if mean < -half else "")

    rows = [[f"{NAMES[method]} - {NAMES[m]}", *(cell(m, budget) for budget in BUDGETS)] for m in others]
    return [["difference within a KL of", *(f"{b:g}" for b in BUDGETS)], *rows]


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
