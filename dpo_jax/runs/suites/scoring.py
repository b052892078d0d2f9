"""Rewards of given answers, for the suites that rank them, and accuracies with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax import losses
from dpo_jax.data.prompt_text import PromptText
from dpo_jax.intervals import wilson
from dpo_jax.models.huggingface.folder import load_tokenizer, model_folder
from dpo_jax.rewards.registry import get_reward
from dpo_jax.runs.suites.registry import SuiteTask
from dpo_jax.runs.suites.subject import as_prompt, implicit_rewards
from dpo_jax.training.load import load_run_tokenizer
from dpo_jax.training.restore import asks_in_turns
from dpo_jax.training.tables import prompt_texts

MODEL = "model:"


def score_answers(
    task: SuiteTask, prompts: Sequence[Any], answers: Sequence[str], wheres: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns a reward of each answer to its prompt, float64[n], and notes.

    The reward is that of `--reward`; for a run that has trained a reward model its own; else the policy's implicit one.

    Args:
      task: of the suite.
      prompts: n texts or lists of messages.
      answers: n texts.
      wheres: `file:line` of each, for messages.
    """
    settings = task.settings
    name = settings.reward or (f"{MODEL}{task.path}" if losses.build(settings.loss).rewards else "")
    if not name:
        return implicit_rewards(task.subject(), prompts, answers, wheres)
    score = get_reward(name)
    return score(_prompts_for(task, name, prompts), list(answers)), (f"reward: {name}",)


def _prompts_for(task: SuiteTask, reward: str, prompts: Sequence[Any]) -> list[str]:
    """Returns prompts as texts; a reward model renders the conversation behind one by its own template."""
    settings, folder = task.settings, reward.removeprefix(MODEL)
    if not reward.startswith(MODEL):
        tokenizer = load_run_tokenizer(settings.model)
        chats = asks_in_turns(task.path, tokenizer, settings)
        return prompt_texts([as_prompt(prompt, chats) for prompt in prompts], tokenizer, settings.data)
    own, tokenizer = folder == task.path, load_tokenizer(model_folder(folder))
    auto = asks_in_turns(folder, tokenizer, settings) if own else bool(tokenizer.chat_template)
    chats = auto if settings.raw is None else not settings.raw
    return [PromptText(p if isinstance(p, str) else "", as_prompt(p, chats)) for p in prompts]


def proportion(credits: Sequence[float], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Returns the (weighted) mean of credits in [0, 1], Wilson's 95% interval, and their number.

    With weights w the interval is that of the effective sample size (sum w)^2 / sum w^2.
    """
    values = np.asarray(credits, np.float64)
    w = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    mean, n = float((w * values).sum() / w.sum()), float(w.sum() ** 2 / (w**2).sum())
    low, high = wilson(min(mean, 1.0) * n, n)
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


def averaged(parts: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """Returns the weighted mean of independent scores, with an interval from theirs: half widths add in quadrature."""
    total = sum(weights[name] for name in parts)
    mean = sum(weights[name] * part["mean"] for name, part in parts.items()) / total
    below, above = (
        math.hypot(*(weights[name] * (part[end] - part["mean"]) for name, part in parts.items())) / total
        for end in ("low", "high")
    )
    n = sum(part["n"] for part in parts.values())
    return {"mean": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above), "n": n}
