"""Registry of rewards: functions (prompts, completions) -> one score per completion, higher is better.

    happy, synthetic, vader     built in
    words:FILE                  a word list (JSON)
    logistic:FILE               a logistic regression over words and pairs of words (JSON)
    model:FOLDER                a reward model: a run with the loss bradley_terry, or a transformers folder
    classifier:FOLDER#LABEL     a transformers classifier of any family (in torch, extra `classifier`)
    module:function             your own, or one written for TRL: called with the keywords prompts and completions

`labels` samples preference pairs from scores; `judge` compares two responses, by a reward or by asking a model.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError, closest
from dpo_jax.named import import_function, name_of
from dpo_jax.records import Array
from dpo_jax.rewards import trained, words
from dpo_jax.rewards.classifier import classifier
from dpo_jax.rewards.labels import check_finite
from dpo_jax.rewards.words import Reward

REWARDS: dict[str, words.Score] = {"happy": words.happy, "synthetic": synthetic.synthetic_reward, "vader": words.vader}
FILES: dict[str, Callable[[str], words.Score]] = {"words": words.word_list, "logistic": words.logistic_regression}


KEPT: dict[str, Reward] = {}  # functions given in Python, by name


def keep_reward(function: Reward) -> str:
    """Keeps a function `(prompts, completions) -> one number each` for `get_reward`, and returns its name."""
    KEPT[name_of(function)] = function
    return name_of(function)


def _given(function: Reward) -> Callable[..., Any]:
    return lambda prompts, completions: function(prompts, completions)


def get_reward(name: str) -> Reward:
    """Returns the reward of a name. `module:function` imports, and so runs, that module.

    Raises:
      UserError: unknown reward. The returned function raises it too, for a score that is not a finite number.
    """
    kind, colon, rest = name.partition(":")
    if name in KEPT:
        reward = _given(KEPT[name])
    elif kind in FILES and colon:
        reward = _each(FILES[kind](rest))
    elif kind == "model" and colon:
        reward = trained.trained_reward(rest).of_texts
    elif kind == "classifier" and colon:
        reward = classifier(rest)
    elif colon:
        reward = _imported(name)
    elif name in REWARDS:
        reward = _each(REWARDS[name])
    else:
        known = [*REWARDS, *(f"{kind}:FILE" for kind in FILES), "model:FOLDER", "classifier:FOLDER#LABEL"]
        raise UserError(f"unknown reward {name!r}; {closest(name, known)} (or give module:function)")

    def checked(prompts: Sequence[str], completions: Sequence[str]) -> Array:
        scores = list(reward(prompts=list(prompts), completions=list(completions)))
        if len(scores) != len(completions):
            raise UserError(f"reward {name!r}: {len(scores)} scores for {len(completions)} completions")
        pairs = zip(scores, completions, strict=True)
        return np.array([check_finite(score, f"reward {name!r}", text) for score, text in pairs], np.float64)

    return checked


def _each(score: words.Score) -> Callable[..., list[float]]:
    """Returns the reward that applies a score to each completion."""
    return lambda prompts, completions: [score(p, c) for p, c in zip(prompts, completions, strict=True)]


def _imported(name: str) -> Callable[..., Any]:
    """Returns the function of `module:function`."""
    function = import_function(name, "reward")
    try:
        inspect.signature(function).bind(prompts=[], completions=[])
    except (TypeError, ValueError) as e:  # ValueError: a builtin without a signature
        raise UserError(f"reward {name!r} must take the keywords prompts and completions, lists of texts") from e
    return function
