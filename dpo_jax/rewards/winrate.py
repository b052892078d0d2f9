"""Win rates of one policy against another, and best of N, with 95% intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.intervals import wilson
from dpo_jax.records import Array
from dpo_jax.rewards.judge import Verdict


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
