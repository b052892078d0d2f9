"""Win rates of one policy against another, and best of N, with 95% intervals."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.intervals import Z95, wilson
from dpo_jax.records import Array
from dpo_jax.rewards.judge import Verdict

PRIOR = 10.0  # standard deviation of the coefficients of `controlled_share`, in log-odds
FAR = 100.0  # log-odds from the best coefficient at which none is in its interval


class WinShare(NamedTuple):
    """A proportion of n with Wilson's interval; NaN if n is 0."""

    mean: float
    low: float
    high: float
    n: int


class WinTally(NamedTuple):
    """Summary of the verdicts on many matches.

    Attributes:
      wins: share of matches won by `a`, ties counting half, among the matches with a readable verdict.
      ties: number of those matches that are neither won nor lost, or in which the two orders disagree.
      unread: number of verdicts that could not be read.
      first: share of verdicts for the response read first, among those for either; 0.5 without a position bias.
      agree: share of matches in which both orders have the same verdict, among those readable in both orders.
    """

    wins: WinShare
    ties: int
    unread: int
    first: WinShare
    agree: WinShare


def win_share(successes: float, n: int) -> WinShare:
    """Returns a proportion with its interval."""
    return WinShare(successes / n if n else math.nan, *wilson(successes, n), n)


def match_outcome(verdicts: Sequence[Verdict]) -> float | None:
    """Returns the mean score of a match over its verdicts, or None if no verdict can be read."""
    scores = [v.score for v in verdicts if v.score is not None]
    return sum(scores) / len(scores) if scores else None


def tally_wins(matches: Sequence[Sequence[Verdict]]) -> WinTally:
    """Returns the summary of the verdicts on each match.

    The interval of `wins` is that of matches without ties, so it is too wide if there are many ties.
    """
    outcomes = [o for o in map(match_outcome, matches) if o is not None]
    single = [v for verdicts in matches for v in verdicts]
    preferring = [v for v in single if v.a_first is not None and v.score in (0.0, 1.0)]
    pairs = [[v.score for v in verdicts] for verdicts in matches if len(verdicts) == 2]
    read = [scores for scores in pairs if None not in scores]
    return WinTally(
        win_share(sum(outcomes), len(outcomes)),
        sum(o == 0.5 for o in outcomes),
        sum(v.score is None for v in single),
        win_share(sum(v.a_first == (v.score == 1.0) for v in preferring), len(preferring)),
        win_share(sum(one == two for one, two in read), len(read)),
    )


def controlled_share(outcomes: Sequence[float], differences: Array) -> WinShare:
    """Returns the share of wins between responses of equal length.

    After Dubois et al. 2024 (arXiv 2404.04475), without their term for a prompt's difficulty: P(win) =
    sigmoid(a + b tanh(d / s)) is fitted to the matches, with s the standard deviation of d. The share is sigmoid(a).
    Its interval holds every a whose best fit has a penalized log-likelihood at most 1.92 below the maximum. The
    penalty, a wide normal prior on a and b, keeps them finite where all matches are won. Where all lengths differ
    alike, it alone decides, and the interval is wide.

    Args:
      outcomes: 1 for a win, 0 for a loss, 0.5 for a tie.
      differences: d of each match, the length of the response less that of the other.
    """
    from scipy.optimize import brentq, minimize_scalar  # here, because commands without it start faster
    from scipy.special import expit

    if not len(outcomes):
        return win_share(0, 0)
    won, longer = np.asarray(outcomes, float), np.tanh(np.asarray(differences) / (np.std(differences) or 1.0))

    def loss(a: float, b: float) -> float:
        z = a + b * longer
        return float(np.sum(np.logaddexp(0.0, z) - won * z)) + (a * a + b * b) / (2 * PRIOR**2)

    def least(a: float) -> float:
        found: Any = minimize_scalar(lambda b: loss(a, b))
        return found.fun

    best: Any = minimize_scalar(least)
    low, high = (brentq(lambda a: least(a) - best.fun - Z95**2 / 2, best.x, best.x + far) for far in (-FAR, FAR))
    return WinShare(float(expit(best.x)), float(expit(low)), float(expit(high)), len(won))


def pick_best(scores: Array, n: int) -> Array:
    """Returns the index of the highest score among the first n responses to each prompt; the first if several tie.

    Args:
      scores: float[prompts, N].
      n: 1 <= n <= N.

    Returns:
      int[prompts].
    """
    return np.argmax(np.asarray(scores)[:, :n], axis=1)


def kl_bound(n: int) -> float:
    """Returns log n - (n - 1) / n, in nats: an upper bound of KL(best of n samples || policy).

    It is exact if all scores differ and every response has small probability (Stiennon et al. 2020, appendix G.3);
    otherwise it is an upper bound (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n
