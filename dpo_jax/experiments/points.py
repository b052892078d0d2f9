"""The result of an experiment: the file of its measurements, means over seeds, differences between methods."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.experiments.optimum import Optimum
from dpo_jax.intervals import MeanInterval, mean_t_interval
from dpo_jax.training.metrics_file import read_metrics


class Point(NamedTuple):
    """Measurement of a policy at one step of one run.

    Attributes:
      method: sft, dpo, ...
      strength: strength of the constraint to the reference: beta, alpha or a target KL; the seed of Preferred-FT; 0 of
        the reference itself (sft).
      step: updates done.
      reward: mean true reward; `reward_half` is half its 95% interval.
      kl: mean of log pi - log pi_ref over whole completions, nats; `kl_half` likewise.
      chosen: mean log-prob of the chosen responses of held-out pairs; `rejected` likewise.
      tokens: mean length of a completion.
      cut: share of completions that reach `max_new_tokens` without EOS.
      seed: of the run's pairs, samples and order, and of the completions measured.
    """

    method: str
    strength: float
    step: int
    reward: float
    reward_half: float
    kl: float
    kl_half: float
    chosen: float
    rejected: float
    tokens: float
    cut: float
    seed: int = 0


class BestOf(NamedTuple):
    """The best of n completions of the reference: mean reward and half its 95% interval.

    Its KL is at most `winrate.kl_bound(n)`.
    """

    n: int
    reward: float
    reward_half: float


class FrontierResult(NamedTuple):
    """Result of an experiment.

    Attributes:
      points: measurements of all runs, the reference first.
      curve: the reference and the optima, by falling beta.
      left_out: optima with too few effective samples.
      best_of: the best of N for each N.
      enumerated: True if the optima are exact sums over all responses, False for estimates from samples.
      prompts: number of held-out prompts.
      pairs: number of training pairs.
      other_seeds: measurements in the folder that are left out, because they are of other seeds than those asked for.
    """

    points: list[Point]
    curve: list[Optimum]
    left_out: list[Optimum]
    best_of: list[BestOf]
    enumerated: bool
    prompts: int
    pairs: int
    other_seeds: int = 0


def frontier_points(path: Path, seed: int) -> list[Point]:
    """Returns the points of a file, none if it does not exist; null becomes NaN.

    Args:
      path: the file.
      seed: of rows without one, as they were written before there were several seeds: the config's.
    """
    rows = read_metrics(path) if path.is_file() else []

    def point(row: dict[str, Any]) -> Point:
        found: dict[str, Any] = {"seed": seed, **row}
        values: dict[str, Any] = {name: math.nan if found[name] is None else found[name] for name in Point._fields}
        return Point(**values)

    return [point(row) for row in rows]


def point_seeds(points: Iterable[Point]) -> list[int]:
    """Returns the seeds of points in rising order."""
    return sorted({p.seed for p in points})


def over_seeds(points: Sequence[Point]) -> list[Point]:
    """Returns one point for each step of each run: the means over its seeds, with intervals by Student's t.

    With one seed these are the points themselves, whose intervals are over prompts.
    """
    if len(point_seeds(points)) == 1:
        return list(points)
    grouped: dict[Any, list[Point]] = {}
    for point in points:
        grouped.setdefault(point[:3], []).append(point)
    return [_mean_point(group) for group in grouped.values()]


def _mean_point(group: Sequence[Point]) -> Point:
    """Returns the mean of the points of one step of one run."""
    reward, kl = (mean_t_interval([getattr(p, name) for p in group]) for name in ("reward", "kl"))
    rest = {name: float(np.mean([getattr(p, name) for p in group])) for name in ("chosen", "rejected", "tokens", "cut")}
    return group[0]._replace(reward=reward[0], reward_half=reward[1], kl=kl[0], kl_half=kl[1], **rest)


def best_within(points: Sequence[Point], method: str, budget: float) -> Point:
    """Returns the point with the highest reward among the reference and the method's points of at most this KL."""
    allowed = [p for p in points if p.method in ("sft", method) and (p.kl <= budget or p.method == "sft")]
    return max(allowed, key=lambda p: p.reward)


def best_of_seeds(points: Sequence[Point], method: str, budget: float) -> MeanInterval:
    """Returns the highest reward of a method within a KL: of each seed, averaged over seeds.

    The interval is over seeds, or over prompts if there is one seed.
    """
    best = [best_within(own, method, budget) for own in _by_seed(points)]
    if len(best) == 1:
        return MeanInterval(best[0].reward, best[0].reward_half)
    return mean_t_interval([p.reward for p in best])


def difference_of_seeds(points: Sequence[Point], method: str, other: str, budget: float) -> MeanInterval:
    """Returns the highest reward of a method within a KL less another method's, paired by seed; two seeds or more."""
    best = [[best_within(own, name, budget).reward for name in (method, other)] for own in _by_seed(points)]
    return mean_t_interval([one - two for one, two in best])


def _by_seed(points: Sequence[Point]) -> list[list[Point]]:
    """Returns the points of each seed."""
    return [[p for p in points if p.seed == seed] for seed in point_seeds(points)]
