"""Scores from word lists: built in, from a file, from vaderSentiment's lexicon, or a logistic regression."""

import functools
import gzip
import importlib
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.records import Array

Score = Callable[[str, str], float]
"""(prompt, completion) -> score."""
Reward = Callable[[Sequence[str], Sequence[str]], Array]
"""(prompts, completions), n texts each -> float64[n]."""
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
    """Returns the number of happy words in a completion minus that of sad words (vocabulary of TinyStories)."""
    words = WORD.findall(completion.lower())
    return float(sum(word in HAPPY for word in words) - sum(word in SAD for word in words))


def word_list(path: str) -> Score:
    """Returns the reward of a word list, a JSON object {word: weight}: the sum of weights over a completion.

    Words are sequences of the letters a to z in any case; each occurrence counts.

    Raises:
      UserError: the file cannot be read, or is not a word list.
    """
    weights = _weights(_read(path), path)
    if bad := next((word for word in weights if not WORD.fullmatch(word)), None):
        raise UserError(f"{path}: {bad!r} is not a word of lowercase letters a to z; change or remove it")
    return lambda prompt, completion: math.fsum(weights.get(word, 0.0) for word in WORD.findall(completion.lower()))


def logistic_regression(path: str) -> Score:
    """Returns the log-odds that a text is positive, by a logistic regression over words and pairs of words.

    score = bias + sum of the weights of the set of n-grams in the text, a prompt followed by its completion. The
    probability is sigmoid(score), so a Bradley-Terry label (equation 1) compares odds.

    Args:
      path: JSON, plain or gzipped: {"bias": number, "weights": {n-gram: number}}. An n-gram is a word of the characters
        [a-z'], or ! or ?, or two consecutive ones joined by a space.

    Raises:
      UserError: the file cannot be read, or is not a logistic regression.
    """
    found = _read(path)
    if set(found) != {"bias", "weights"} or not isinstance(found["weights"], dict):
        raise UserError(f'{path}: not a logistic regression; write {{"bias": number, "weights": {{n-gram: number}}}}')
    weights, bias = _weights(found["weights"], path), _weights({"bias": found["bias"]}, path)["bias"]

    def score(prompt: str, completion: str) -> float:
        return bias + math.fsum(weights.get(gram, 0.0) for gram in ngrams(prompt + completion))

    return score


def ngrams(text: str) -> set[str]:
    """Returns the set of a text's words, and of its pairs of consecutive words joined by a space."""
    words = re.findall(r"[a-z']+|[!?]", text.lower().replace("<br />", " "))
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def vader(prompt: str, completion: str) -> float:
    """Returns vaderSentiment's compound score of a completion, in [-1, 1] (Hutto and Gilbert 2014).

    Raises:
      UserError: the package vaderSentiment is not installed.
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
    """Returns the object in a JSON file; a name in .gz means gzipped."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e})") from e
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; write one in braces")
    return found


def _weights(found: Mapping[str, Any], path: str) -> dict[str, float]:
    """Returns the weights by name as floats; refuses anything but finite numbers."""
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise UserError(f"{path}: the weight of {name!r} is {value!r:.60}, not a finite number")
    return {name: float(value) for name, value in found.items()}
