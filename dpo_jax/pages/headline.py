"""Headline of a report: the figures that answer first, and a verdict in words that follows from their intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_jax.pages import metrics
from dpo_jax.pages.metrics import Measured, metric_wording

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"


class Card(NamedTuple):
    """A metric of the headline: name, value with its unit, 95% interval, and meaning; "" where unknown."""

    name: str
    value: str
    interval: str
    meaning: str


class RunVerdict(NamedTuple):
    """A verdict: "better", "worse", "undecided" or "" (none possible), and a sentence with its reason."""

    word: str
    sentence: str


class Headline(NamedTuple):
    """The headline of a run: its verdicts, the one on held-out comparisons first, and its cards."""

    verdicts: list[RunVerdict]
    cards: list[Card]


def headlines(
    finals: Sequence[Mapping[str, Measured]], others: Sequence[Mapping[str, Measured]] = ()
) -> list[Headline]:
    """Returns the headline of each run.

    The log-ratio has a card only if a run has no sampled KL.

    Args:
      finals: the last metrics of each run, by name; see `metrics.read_intervals`.
      others: NAME/METRIC -> those of each run's evaluations on other data.
    """
    sampled = all(metrics.HELD_OUT + metrics.SAMPLED_KL in final for final in finals)
    divergence = [metrics.SAMPLED_KL] if sampled else [metrics.SAMPLED_KL, metrics.LOGRATIO]
    found = []
    for final, other in zip(finals, others or [{}] * len(finals), strict=True):
        verdicts = (preference_verdict(final), reward_verdict(final))
        cards = _cards(final, divergence) + _other_cards(other)
        found.append(Headline([verdict for verdict in verdicts if verdict], cards))
    return found


def _cards(final: Mapping[str, Measured], divergence: Sequence[str]) -> list[Card]:
    """Returns accuracy, margin, divergence from the reference and true reward; loss and NLL if there is no margin."""
    first = [metrics.ACCURACY, metrics.MARGIN] if held_out(final, metrics.MARGIN) else ["loss", "nll"]
    wanted = [*first, *divergence, metrics.TRUE_REWARD["policy"]]
    return [_card(name, value) for name in wanted if (value := held_out(final, name))]


def _other_cards(other: Mapping[str, Measured]) -> list[Card]:
    """Returns how far a policy is from its reference on other data: KL, and the log-ratio of chosen responses."""
    found = []
    for key, value in other.items():
        data, _, name = key.partition("/")
        if name.removeprefix(metrics.HELD_OUT) in metrics.ON_OTHER_DATA:
            card = _card(name, value)
            found.append(card._replace(name=f"{card.name}, {data}", meaning=f"{card.meaning} On the data {data}."))
    return found


def held_out(final: Mapping[str, Measured], name: str) -> Measured | None:
    """Returns a metric on held-out data or of samples; without an evaluation, that of the last training step."""
    return next((final[key] for key in (metrics.HELD_OUT + name, name) if key in final), None)


def _card(name: str, value: Measured) -> Card:
    words = metric_wording(name)
    mean, *ends = percent_texts(value) if name == metrics.ACCURACY else number_texts(value)
    unit = words.unit if words.unit in ("", "%") else f" {words.unit}"
    interval = f"{ends[0]} to {ends[1]}{'%' * (unit == '%')}" if ends else ""
    return Card(words.name, mean + unit, interval, words.meaning)


def preference_verdict(final: Mapping[str, Measured]) -> RunVerdict | None:
    """Returns whether a policy prefers chosen responses more than its reference does; None without such metrics.

    The reference has an accuracy of 50% and a margin of 0, since both follow from log pi - log ref. A reward model, and
    a policy without a reference, is compared with chance.
    """
    accuracy, margin = held_out(final, metrics.ACCURACY), held_out(final, metrics.MARGIN)
    found = accuracy or margin
    if found is None:
        return None
    if not any(name.startswith(metrics.HELD_OUT) for name in final):
        return RunVerdict("", "No verdict: there is no evaluation on held-out data. These are values of the last step.")
    if is_reward_model(final):
        who, does, other = "The reward model", "ranks the chosen response first", "chance"
    elif held_out(final, metrics.LOGP) and not held_out(final, metrics.LOGRATIO):  # a loss without a reference
        who, does, other = "The policy", "ranks the chosen response first", "chance"
    else:
        who, does, other = "The policy", "prefers the chosen response", "the reference"
    if accuracy:
        mean, *ends = percent_texts(accuracy)
        count = "the" if accuracy.n is None else f"{accuracy.n:,.0f}"
        claim = f"{who} {does} in {mean}% of {count} held-out comparisons"
        return _against(found, 0.5, claim, f"{' to '.join(ends)}%", other)
    mean, *ends = number_texts(found)
    claim = f"{who} rewards chosen responses {mean} nats more than rejected ones"
    return _against(found, 0.0, claim, " to ".join(ends), other)


def _against(found: Measured, other_value: float, claim: str, interval: str, other: str) -> RunVerdict:
    """Returns the verdict on a metric that is better when higher, from its interval alone."""
    if found.interval is None:
        return RunVerdict("", f"{claim}. No verdict: the 95% interval is unknown; `dpo-jax eval` computes it.")
    if found.interval[0] > other_value:
        return RunVerdict(BETTER, f"{claim} ({interval}): better than {other} at the 95% level.")
    if found.interval[1] < other_value:
        return RunVerdict(WORSE, f"{claim} ({interval}): worse than {other} at the 95% level.")
    why = f"the interval includes {'50%' if other_value else '0'}, as {other} has"
    return RunVerdict(UNDECIDED, f"{claim} ({interval}): undecided, because {why}.")


def is_reward_model(final: Mapping[str, Measured]) -> bool:
    """Returns whether the metrics are those of a reward model: rewards without log-probs."""
    return held_out(final, metrics.MARGIN) is not None and held_out(final, metrics.LOGP) is None


def reward_verdict(final: Mapping[str, Measured]) -> RunVerdict | None:
    """Returns whether the samples of the policy have a higher true reward than those of the reference; None without.

    Two 95% intervals that do not overlap show a difference at the 95% level, however the two means are correlated.
    """
    pair = [final[name] for name in metrics.TRUE_REWARD.values() if name in final]
    if len(pair) < 2:
        return None
    policy, reference = (value.interval for value in pair)
    if policy is None or reference is None:
        return None
    shown = [f"{mean} ({low} to {high})" for mean, low, high in map(number_texts, pair)]
    claim = f"The true reward is {shown[0]} for samples of the policy and {shown[1]} for those of the reference"
    if policy[0] > reference[1]:
        return RunVerdict(BETTER, f"{claim}: better at the 95% level.")
    if policy[1] < reference[0]:
        return RunVerdict(WORSE, f"{claim}: worse at the 95% level.")
    return RunVerdict(UNDECIDED, f"{claim}: undecided, because the intervals overlap.")


def percent_texts(value: Measured) -> list[str]:
    """Returns mean and, if known, the ends of the interval in percent, each on its own side of 50 when rounded."""
    shares = [share for share in value[:3] if share is not None]
    tried = [[f"{100 * share:.{digits}f}" for share in shares] for digits in range(4)]
    sides = [_side(share, 0.5) for share in shares]
    return next((texts for texts in tried if [_side(float(text), 50) for text in texts] == sides), tried[-1])


def _side(value: float, middle: float) -> int:
    """Returns 1 above the middle, -1 below it, 0 there."""
    return (value > middle) - (value < middle)


def number_texts(value: Measured) -> list[str]:
    """Returns mean and, if known, the ends of the interval, with two digits of half its width."""
    half = 0.0 if value.interval is None else (value.interval[1] - value.interval[0]) / 2
    if not half > 0 or not 1e-6 < half < 1e6:
        return [f"{number:.4g}" for number in value[:3] if number is not None]
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return [f"{round(number, decimals) + 0.0:.{decimals}f}" for number in value[:3] if number is not None]  # not -0.0
