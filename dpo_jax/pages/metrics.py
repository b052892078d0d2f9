"""Metrics of run folders as the pages read them: names, values with intervals, and what each metric means.

The only file of the pages that spells names of metrics. configs/METRICS.md has the equations.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.paths import load_json
from dpo_jax.training.metrics_file import with_current_names

HELD_OUT = "eval_"  # begins the names of metrics on held-out data
ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"
LOGP, LOGRATIO, SAMPLED_KL = "logps/chosen", "logratio", "kl"
LARGEST = 1e100  # a larger number of a damaged file is not shown: axes overflow
HALF = "/half"  # ends the name of half the 95% interval of a metric in metrics.jsonl
ON_OTHER_DATA = (SAMPLED_KL, "logratios/chosen")  # what tells of forgetting
TRUE_REWARD = {who: f"true reward of the {who}" for who in ("policy", "reference")}

# name -> (name in words, unit, meaning).
WORDS = {
    "loss": ("Loss", "", "The objective, which training lowers."),
    ACCURACY: (
        "Accuracy",
        "%",
        "How often the chosen response has the higher reward; a tie counts as half. Chance has 50%, and so has a "
        "policy equal to its reference.",
    ),
    MARGIN: (
        "Margin",
        "nats",
        "Reward of the chosen response minus reward of the rejected one. A policy equal to its reference has 0.",
    ),
    "rewards/chosen": (
        "Reward of the chosen response",
        "nats",
        "beta (log pi - log ref), how far the policy has moved from the reference on a response; for a loss without a "
        "reference beta log pi or its mean over tokens; a reward model's own reward.",
    ),
    "rewards/rejected": ("Reward of the rejected response", "nats", "The same for the rejected response."),
    LOGP: ("Log-probability of the chosen response", "nats", "log pi of the policy, summed over a response's tokens."),
    "logps/rejected": ("Log-probability of the rejected response", "nats", "The same for the rejected response."),
    LOGRATIO: (
        "Log-ratio",
        "nats",
        "log pi - log ref per response of the data. Below 0, the policy finds these responses less likely than the "
        "reference. This is no KL.",
    ),
    "logratios/chosen": ("Log-ratio of the chosen response", "nats", "log pi - log ref of the chosen response."),
    "logratios/rejected": ("Log-ratio of the rejected response", "nats", "The same for the rejected response."),
    SAMPLED_KL: (
        "KL from the reference",
        "nats",
        "log pi - log ref per response that the policy samples: KL(policy || reference), how far it is from the "
        "reference.",
    ),
    "nll": ("NLL", "nats per token", "-log pi of the chosen response, per token."),
    "gradient_weight": ("Gradient weight", "", "sigmoid(-margin): how much a pair still moves the policy, 0 to 1."),
    "length_bias": (
        "Length bias",
        "",
        "Correlation of the margin with the difference in length. Near 1, the policy has learned to prefer long "
        "responses.",
    ),
    "lengths/chosen": ("Length of the chosen response", "tokens", "Scored tokens, EOS included."),
    "lengths/rejected": ("Length of the rejected response", "tokens", "The same for the rejected response."),
    "grad_norm": ("Gradient norm", "", "L2 norm of the gradient before clipping. Spikes tell of an unstable run."),
    "learning_rate": ("Learning rate", "", "Rate of each update, warm-up included."),
    "nonfinite": ("Not finite", "", "1 if loss or gradient was not finite and the update was skipped."),
    "unweighted": ("Unweighted", "", "1 if all weights of the step were 0, so that it changed nothing."),
    "examples_per_second": ("Throughput", "comparisons/s", "Comparisons per second since the step before."),
    "minutes": (
        "Time",
        "minutes",
        "Duration of the steps so far, from the throughput: without compilation, evaluation and saves.",
    ),
    TRUE_REWARD["policy"]: ("True reward", "", "Mean of the reward function over samples of the policy."),
    TRUE_REWARD["reference"]: ("True reward of the reference", "", "The same over samples of the reference."),
}


class Measured(NamedTuple):
    """A metric: mean, the ends of its 95% interval and the number of values; None where unknown.

    A mean that is not finite is NaN.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the 95% interval; None if unknown."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class Wording(NamedTuple):
    """A metric in words: name, unit and meaning; empty where there is nothing to say."""

    name: str
    unit: str
    meaning: str


def metric_wording(name: str) -> Wording:
    """Returns a metric in words, by its name with or without `eval_`; an unknown one is its own name."""
    plain = name.removeprefix(HELD_OUT)
    if plain.startswith("loss/"):
        return Wording(f"Loss {plain[5:]}", "", "The term alone, before its weight.")
    return Wording(*WORDS.get(plain, (plain, "", "")))


def read_intervals(path: Path) -> dict[str, Measured]:
    """Returns the metrics of an eval.json.

    Raises:
      UserError: it is damaged.
    """
    try:
        stored = with_current_names(load_json(path, dict).get("metrics", {}))
        return {name: _measured(m["mean"], m.get("low"), m.get("high"), m.get("n")) for name, m in stored.items()}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: metrics must hold a mean each; remove the file or write it again") from e


def read_meanings(path: Path) -> dict[str, str]:
    """Returns metric -> meaning of an eval_SUITE.json; {} of a file that has none.

    Raises:
      UserError: they are damaged.
    """
    meanings = load_json(path, dict).get("meanings", {})
    if not isinstance(meanings, dict):
        raise UserError(f"{path}: meanings must be an object of texts; remove the file or write it again")
    return {name: str(text) for name, text in meanings.items()}


def last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, Measured]:
    """Returns the last value of every evaluation metric, or of every metric if there was no evaluation."""
    newest = {key: value for line in lines for key, value in line.items() if not isinstance(value, str)}
    evaluated = {key: value for key, value in newest.items() if key.startswith(HELD_OUT)}
    found = {key: _as_float(value) for key, value in (evaluated or newest).items() if key not in ("step", "examples")}
    halves = {key: found.pop(key + HALF, math.nan) for key in [*found]}
    return {key: _measured(value, value - halves[key], value + halves[key]) for key, value in found.items()}


def _measured(mean: Any, low: Any, high: Any, n: Any = None) -> Measured:
    """Returns a metric from numbers or None; an interval with an end that is not finite is unknown."""
    ends = (_as_float(low), _as_float(high))
    known = ends if all(map(math.isfinite, ends)) else (None, None)
    return Measured(_as_float(mean), *known, None if n is None else _as_float(n))


def _as_float(value: Any) -> float:
    """Returns a number as a float; NaN for None and for what a damaged file has beyond the range of the pages."""
    return float(value) if value is not None and abs(value) < LARGEST else math.nan


def with_minutes(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, those of training with `minutes`, the duration of the steps so far.

    The throughput of the first step after a start, which is null, is left out.
    """
    found, minutes, before = [], 0.0, 0.0
    for line in lines:
        rate, examples = _as_float(line.get("examples_per_second")), _as_float(line.get("examples"))
        minutes += (examples - before) / rate / 60 if rate > 0 and examples > before else 0.0
        before = examples if examples > before else before
        known = {key: value for key, value in line.items() if key != "examples_per_second" or value is not None}
        found.append(known | ({"minutes": minutes} if "examples_per_second" in line else {}))
    return found
