"""Preference pairs sampled from scores (paper, appendix C.1: 4 completions per prefix, so 6 pairs)."""

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np

from dpo_jax.errors import UserError, closest


def check_finite(score: object, where: str, completion: str) -> float:
    """Returns a score as a float.

    Raises:
      UserError: the score is not a finite number.
    """
    try:
        number = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: the score of {completion[:60]!r} is {score!r}, not a finite number")
    return number


def label_pairs(
    prompt: str, completions: Sequence[str], scores: Sequence[float], how: str, seed: int
) -> list[tuple[str, str]]:
    """Returns (chosen, rejected) pairs of the completions of one prompt.

    Args:
      prompt: the prompt; with `seed` it fixes the random numbers.
      completions: K texts. Equal texts are not paired with each other.
      scores: K numbers, higher is better.
      how: "bradley_terry", all pairs, i preferred to j with probability sigmoid(r_i - r_j), the paper's model of
        preference (equation 1); "ranked", all pairs with different scores, the higher preferred; "best_worst", at
        most one pair, the best against the worst, if their scores differ.
      seed: seed of the random numbers.

    Raises:
      UserError: unknown `how`, or a score that is not finite.
    """
    if how not in LABELLERS:
        raise UserError(f"unknown label {how!r}; {closest(how, list(LABELLERS))}")
    texts = zip(completions, scores, strict=True)
    scored = [(text, check_finite(score, f"prompt {prompt[:60]!r}", text)) for text, score in texts]
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return LABELLERS[how](scored, np.random.default_rng(int.from_bytes(digest)))


Scored = Sequence[tuple[str, float]]


def _bradley_terry(scored: Scored, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Samples the winner of each pair with probability sigmoid(r_i - r_j)."""
    pairs = []
    for (a, r_a), (b, r_b) in itertools.combinations(scored, 2):
        if a != b:
            first = rng.random() < 0.5 * (1 + math.tanh((r_a - r_b) / 2))  # the sigmoid, without overflow
            pairs.append((a, b) if first else (b, a))
    return pairs


def _ranked(scored: Scored, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Prefers the higher score in each pair; drops pairs with equal scores."""
    ordered = [(x, y) if x[1] > y[1] else (y, x) for x, y in itertools.combinations(scored, 2) if x[1] != y[1]]
    return [(chosen, rejected) for (chosen, _), (rejected, _) in ordered if chosen != rejected]


def _best_worst(scored: Scored, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs the first of the best with the first of the worst."""
    if not scored:
        return []
    best, worst = max(scored, key=lambda x: x[1]), min(scored, key=lambda x: x[1])
    return [(best[0], worst[0])] if best[1] > worst[1] and best[0] != worst[0] else []


LABELLERS = {"bradley_terry": _bradley_terry, "ranked": _ranked, "best_worst": _best_worst}
