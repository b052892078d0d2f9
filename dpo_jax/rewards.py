"""Rewards: scores of a text, and preference pairs drawn from them.

A reward is a function (prompt, completion) -> float, higher is better, found by name. The paper's controlled
experiments label completions by such a ground truth (appendix C.1: four completions a prefix, so six pairs).
"""

import hashlib
import importlib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_jax import keys
from dpo_jax.data import synthetic
from dpo_jax.records import UserError

Reward = Callable[[str, str], float]

_HAPPY = """
happy happily happiness glad joy joyful cheerful merry smile smiled smiles smiling laugh laughed laughing laughter
giggle giggled fun funny love loved loves loving lovely hug hugged hugs kiss kissed kind kindness friend friends
friendly play played playing excited exciting proud nice great good wonderful beautiful pretty bright warm safe
delicious yummy sweet gentle thankful grateful thank thanks enjoy enjoyed best better brave special celebrate
cheered hooray yay
"""
_SAD = """
sad sadly sadness unhappy cry cried cries crying tear tears sob sobbed weep wept scared afraid fear frightened
scary angry mad anger upset hurt hurts pain ouch lonely alone lost broke broken bad mean cruel hate hated awful
terrible horrible ugly sorry worried worry yell yelled scream screamed shout shouted fight fought die died dead
sick cold dark hungry tired disappointed ashamed jealous gloomy miserable nasty danger dangerous
"""
HAPPY, SAD = frozenset(_HAPPY.split()), frozenset(_SAD.split())


def happy(prompt: str, completion: str) -> float:
    """Returns the number of happy words less that of sad ones in a completion, in the English of TinyStories."""
    words = re.findall(r"[a-z]+", completion.lower())
    return float(sum(word in HAPPY for word in words) - sum(word in SAD for word in words))


REWARDS: dict[str, Reward] = {"happy": happy, "synthetic": synthetic.reward}


def get(name: str) -> Reward:
    """Returns a reward by its name, or by `module:function`, which imports and so runs that module.

    Raises:
      UserError: there is no such reward; the returned function, on a score that is no finite number.
    """
    reward = _imported(name) if ":" in name else REWARDS.get(name)
    if reward is None:
        raise UserError(f"unknown reward {name!r}; {keys.closest(name, list(REWARDS))} (or give module:function)")

    def checked(prompt: str, completion: str) -> float:
        return _finite(reward(prompt, completion), f"reward {name!r}", completion)

    return checked


def _imported(name: str) -> Callable[..., Any]:
    """Returns the function that `module:function` names."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as e:  # ValueError: an empty module name
        raise UserError(f"reward {name!r}: cannot import {module_name!r} ({e}); is its folder in PYTHONPATH?") from e
    function = getattr(module, attribute, None)
    if function is None:
        known = keys.closest(attribute, [n for n in vars(module) if not n.startswith("_")])
        raise UserError(f"reward {name!r}: {module_name} has no {attribute!r}; {known}")
    if not callable(function):
        raise UserError(f"reward {name!r}: {attribute} is no function (prompt, completion) -> float")
    return function


def _finite(score: object, where: str, completion: str) -> float:
    """Returns a score as a float; anything but a finite number is a UserError."""
    try:
        number = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: the score of {completion[:60]!r} is {score!r}, no finite number")
    return number


def label(
    prompt: str, completions: Sequence[str], scores: Sequence[float], how: str, seed: int
) -> list[tuple[str, str]]:
    """Returns (chosen, rejected) pairs of the completions of one prompt.

    Args:
      prompt: their prompt; with `seed` it fixes the random draws.
      completions: K texts, among which the same text may occur several times; no pair has one text twice.
      scores: K numbers, higher is better.
      how: "bradley_terry", all pairs, i preferred to j with probability sigmoid(r_i - r_j), the paper's model of
        preference (equation 1); "ranked", all pairs of different scores, the higher preferred; "best_worst", at most
        one pair, the best and the worst of different scores.
      seed: of the draws.

    Raises:
      UserError: an unknown `how`, or a score that is not finite.
    """
    if how not in LABELLERS:
        raise UserError(f"unknown way of labelling {how!r}; {keys.closest(how, list(LABELLERS))}")
    texts = zip(completions, scores, strict=True)
    scored = [(text, _finite(score, f"prompt {prompt[:60]!r}", text)) for text, score in texts]
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return LABELLERS[how](scored, np.random.default_rng(int.from_bytes(digest)))


Scored = Sequence[tuple[str, float]]


def _bradley_terry(scored: Scored, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draws the winner of every pair from sigmoid(r_i - r_j)."""
    pairs = []
    for (a, r_a), (b, r_b) in itertools.combinations(scored, 2):
        if a != b:
            first = rng.random() < 0.5 * (1 + math.tanh((r_a - r_b) / 2))  # the sigmoid, without overflow
            pairs.append((a, b) if first else (b, a))
    return pairs


def _ranked(scored: Scored, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Prefers the higher score in every pair that has one."""
    ordered = [(x, y) if x[1] > y[1] else (y, x) for x, y in itertools.combinations(scored, 2) if x[1] != y[1]]
    return [(chosen, rejected) for (chosen, _), (rejected, _) in ordered if chosen != rejected]


def _best_worst(scored: Scored, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs the best with the worst, the first of each where several are."""
    if not scored:
        return []
    best, worst = max(scored, key=lambda x: x[1]), min(scored, key=lambda x: x[1])
    return [(best[0], worst[0])] if best[1] > worst[1] and best[0] != worst[0] else []


LABELLERS = {"bradley_terry": _bradley_terry, "ranked": _ranked, "best_worst": _best_worst}
