"""Scores from lists of words: built in, from a file, from vaderSentiment's lexicon, or learnt (logistic regression)."""

import functools
import gzip
import importlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.errors import UserError

Score = Callable[[str, str], float]
"""(prompt, completion) -> score of one completion."""
WORD = re.compile(r"[a-z]+")
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
    words = WORD.findall(completion.lower())
    return float(sum(word in HAPPY for word in words) - sum(word in SAD for word in words))


def word_list(path: str) -> Score:
    """Returns the reward of a word list: a JSON object {word: weight}, summed over the words of a completion.

    Words are sequences of the letters a to z in any case; each occurrence counts.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    weights = _weights(_read(path), path)
    if bad := next((word for word in weights if not WORD.fullmatch(word)), None):
        raise UserError(f"{path}: {bad!r} is no word of letters a to z, so it would never be found")
    return lambda prompt, completion: math.fsum(weights.get(word, 0.0) for word in WORD.findall(completion.lower()))


def logistic_regression(path: str) -> Score:
    """Returns the log-odds that a text is positive, by a logistic regression over its set of words and pairs of words.

    score = bias + sum of the weights of the set of n-grams in the prompt and its completion, read as one text; the
    probability is sigmoid(score), and so a Bradley-Terry draw (equation 1) compares the odds.

    Args:
      path: JSON, perhaps gzipped: {"bias": number, "weights": {n-gram: number}}. An n-gram is a word of the characters
        [a-z'], or ! or ?, or two such that follow each other, with a space between them.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    found = _read(path)
    if set(found) != {"bias", "weights"} or not isinstance(found["weights"], dict):
        raise UserError(f"{path}: no logistic regression; it is an object of a bias and of weights by n-gram")
    weights, bias = _weights(found["weights"], path), _weights({"bias": found["bias"]}, path)["bias"]

    def score(prompt: str, completion: str) -> float:
        return bias + math.fsum(weights.get(gram, 0.0) for gram in ngrams(prompt + completion))

    return score


def ngrams(text: str) -> set[str]:
    """Returns the words of a text, and every two that follow each other with a space between them."""
    words = re.findall(r"[a-z']+|[!?]", text.lower().replace("<br />", " "))
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def vader(prompt: str, completion: str) -> float:
    """Returns vaderSentiment's compound score of a completion, in [-1, 1] (Hutto and Gilbert 2014).

    Raises:
      UserError: the package is not installed.
    """
    return _analyser().polarity_scores(completion)["compound"]


@functools.cache
def _analyser() -> Any:
    try:
        module = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError as e:
        raise UserError("reward 'vader' needs the package vaderSentiment; install dpo_jax[vader]") from e
    return module.SentimentIntensityAnalyzer()


def _read(path: str) -> dict[str, Any]:
    """Returns the object in a JSON file, gzipped if its name ends in .gz."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e})") from e
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object")
    return found


def _weights(found: Mapping[str, Any], path: str) -> dict[str, float]:
    """Returns numbers by name, checked."""
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{path}: the weight of {name!r} is {value!r}, no finite number")
    return {name: float(value) for name, value in found.items()}
