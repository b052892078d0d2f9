"""Standings of losses in worlds whose optimum is known, of the paths of `leaderboard`, with intervals over seeds.

A run is stopped where its KL first reaches a budget, or at its end. Between two measured steps KL and reward are taken
to be linear: the mixture of the two policies has that reward, and at most that KL.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from dpo_jax.errors import UserError
from dpo_jax.experiments.leaderboard import CONDITIONS, LossPaths
from dpo_jax.experiments.table_world import ExactFrontier
from dpo_jax.intervals import MeanInterval, mean_t_interval
from dpo_jax.records import Array

BUDGETS = (0.5, 1.0, 2.0)  # nats
MAIN = 1  # the budget of the order and of the strength that is shown, an index


class Standing(NamedTuple):
    """A loss under one condition; means are over seeds (Student's t).

    Attributes:
      loss: its name.
      labels, size: the condition.
      beta: the strength with the highest mean reward at the main budget; NaN for a loss without beta.
      rewards: true reward at each budget, nats.
      distances: the highest reward at each budget less that.
      end_kl, end_reward, end_distance: of the last step at `beta`; the distance is that at its own KL.
      calibration: error of the reward that the loss fits at the last step, as in `LossPaths`; NaN if it fits none.
      chosen: by how much the log-probs of the chosen responses have risen at the last step, nats.
      fell: the share of seeds in which they have fallen.
      beaten_by: a loss with a higher reward at every budget (95%, Bonferroni), or "".
    """

    loss: str
    labels: str
    size: str
    beta: float
    rewards: tuple[MeanInterval, ...]
    distances: tuple[MeanInterval, ...]
    end_kl: MeanInterval
    end_reward: MeanInterval
    end_distance: MeanInterval
    calibration: MeanInterval
    chosen: MeanInterval
    fell: float
    beaten_by: str


def stopped_at(kl: Array, reward: Array, start: Array, budget: float) -> Array:
    """Returns the reward where a path's KL first reaches a budget, or at its end, float[...].

    Args:
      kl: float[..., K].
      reward: float[..., K].
      start: float[...], the reward of the reference, whose KL is 0.
      budget: nats, above 0.
    """
    kl = np.concatenate([np.zeros_like(kl[..., :1]), kl], -1)
    reward = np.concatenate([np.broadcast_to(start, reward.shape[:-1])[..., None], reward], -1)
    reached = kl >= budget
    after = np.where(reached.any(-1), reached.argmax(-1), kl.shape[-1] - 1)[..., None]
    low, high, before, beyond = (np.take_along_axis(x, after - i, -1)[..., 0] for x in (kl, reward) for i in (1, 0))
    part = np.clip((budget - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    return np.where(reached.any(-1), before + part * (beyond - before), beyond)


def without_own_choice(values: Array) -> Array:
    """Returns float[N] of float[S, N]: each seed at the strength that is best on average over the other seeds."""
    others = values.sum(1, keepdims=True) - values
    return values[others.argmax(0), np.arange(values.shape[1])]


def finite_strengths(paths: LossPaths) -> LossPaths:
    """Returns the paths of the strengths whose policies have numbers to the end, in all worlds."""
    kept = np.isfinite(paths.reward + paths.kl).all((1, 2, 3))
    betas = tuple(beta for beta, keep in zip(paths.betas, kept, strict=True) if keep)
    return LossPaths(betas, paths.steps, *(x[kept] for x in paths[2:]))


def dominators(rewards: Array) -> list[list[int]]:
    """Returns, for each loss, the losses with a higher reward at every budget.

    Differences are by seed; their 95% interval, widened for the number of other losses (Bonferroni), is above 0.

    Args:
      rewards: float[L, budgets, N].
    """
    count, _, seeds = rewards.shape
    quantile = student.ppf(1 - 0.025 / max(count - 1, 1), seeds - 1)
    gaps = rewards[None] - rewards[:, None]  # [L, other, budgets, N]
    lower = gaps.mean(-1) - quantile * gaps.std(-1, ddof=1) / math.sqrt(seeds)
    return [[int(j) for j in np.flatnonzero(row)] for row in (lower > 0).all(-1)]


def standings_of(found: Mapping[str, LossPaths], frontiers: Sequence[ExactFrontier]) -> list[Standing]:
    """Returns the standing of every loss under every condition; losses without a usable strength are left out.

    Raises:
      UserError: no loss has a usable strength.
    """
    usable = {name: finite_strengths(paths) for name, paths in found.items()}
    usable = {name: paths for name, paths in usable.items() if paths.betas}
    if not usable:
        raise UserError(
            f"the policies of {', '.join(found)} become NaN at every strength; give other losses, or another --beta"
        )
    return [row for c in range(len(CONDITIONS)) for row in _condition(usable, frontiers, c)]


def _condition(found: Mapping[str, LossPaths], frontiers: Sequence[ExactFrontier], c: int) -> list[Standing]:
    """Returns the standings under one condition, in the order of the losses."""
    start = np.array([f.start for f in frontiers])
    every = {
        name: np.stack([stopped_at(p.kl[:, c], p.reward[:, c], start, budget) for budget in BUDGETS])
        for name, p in found.items()
    }  # [budgets, S, N]
    rewards = np.stack([[without_own_choice(values) for values in of] for of in every.values()])
    names, beaten = list(found), dominators(rewards)
    at_main = rewards[:, MAIN].mean(-1)
    by = [names[max(others, key=lambda j: at_main[j])] if others else "" for others in beaten]
    best = [int(of[MAIN].mean(-1).argmax()) for of in every.values()]
    return [_standing(name, found[name], frontiers, (c, best[i]), rewards[i], by[i]) for i, name in enumerate(names)]


def _standing(
    name: str, paths: LossPaths, frontiers: Sequence[ExactFrontier], at: tuple[int, int], rewards: Array, beaten_by: str
) -> Standing:
    """Returns the standing of a loss under condition and at strength `at`, with its rewards, float[budgets, N]."""
    c, s = at
    limits = np.array([[f.at(budget) for f in frontiers] for budget in BUDGETS])
    kl, reward, chosen = (x[s, c, :, -1] for x in (paths.kl, paths.reward, paths.chosen))
    end = np.array([f.at(x) for f, x in zip(frontiers, kl, strict=True)])
    return Standing(
        name, *CONDITIONS[c], paths.betas[s],
        rewards=tuple(map(mean_t_interval, rewards)),
        distances=tuple(map(mean_t_interval, limits - rewards)),
        end_kl=mean_t_interval(kl), end_reward=mean_t_interval(reward), end_distance=mean_t_interval(end - reward),
        calibration=mean_t_interval(paths.calibration[s, c]), chosen=mean_t_interval(chosen),
        fell=float((chosen < 0).mean()), beaten_by=beaten_by,
    )  # fmt: skip
