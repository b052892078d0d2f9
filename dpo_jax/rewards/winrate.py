"""How often one policy's responses are better than another's, and the best of N: estimates with 95% intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.intervals import wilson
from dpo_jax.records import Array
from dpo_jax.rewards.judge import Verdict


class WinShare(NamedTuple):
    """A proportion of n, with Wilson's interval; NaN of none."""

    mean: float
    low: float
    high: float
    n: int


class WinTally(NamedTuple):
    """What verdicts on many matches come to.

    Attributes:
      wins: how often `a` is better, a tie counting half; of the matches that any verdict can be read of.
      ties: matches among them that are neither won nor lost, those in which the two orders disagree included.
      unread: verdicts that could not be read.
      first: how often the response read first is the better one, of the verdicts that prefer one: 0.5 without a bias.
      agree: how often both orders prefer the same response, of the matches judged in both and read in both.
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
    """Returns the mean score of a match over its verdicts, or None where none can be read."""
    scores = [v.score for v in verdicts if v.score is not None]
    return sum(scores) / len(scores) if scores else None


def tally_wins(matches: Sequence[Sequence[Verdict]]) -> WinTally:
    """Returns what the verdicts on each match come to.

    The interval of wins is that of as many games without ties, and so rather too wide where there are many.
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
    """Returns which of the first n responses to each prompt has the highest score, the first of equals.

    Args:
      scores: float[prompts, N].
      n: 1 <= n <= N.

    Returns:
      int[prompts].
    """
    return np.argmax(np.asarray(scores)[:, :n], axis=1)


def kl_bound(n: int) -> float:
    """Returns log n - (n - 1) / n, in nats: the best of n samples is at most so far from the policy they are of.

    It is KL(best of n || policy) exactly where no two responses have the same score and none has much probability
    (Stiennon et al. 2020, appendix G.3); in general a bound (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n
