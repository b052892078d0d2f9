"""Responses with scores: pairs with a score each, and rankings."""

import itertools
from typing import Any, NamedTuple

from dpo_jax.data.sources.base import TIE, Item, Note
from dpo_jax.data.sources.values import Example, number_column, value_of
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

RATINGS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


class Rated(NamedTuple):
    """A prompt, its responses in the order of the data, and a score for each."""

    prompt: str | Chat
    responses: list[Any]
    scores: list[float]


def pair_scores(where: str, example: Example) -> tuple[float, ...] | Note:
    """Returns the scores of a pair, or a note if they say nothing; the first must be higher unless a preference is."""
    keys = next((pair for pair in RATINGS if set(pair) & set(example)), None)
    if keys is None and "scores" not in example:
        return ()
    if keys and not set(keys) <= set(example):
        return Note("examples with the score of one response only; it is ignored")
    values = [value_of(where, example, key) for key in keys] if keys else example["scores"]
    if not isinstance(values, list) or len(values) != 2:
        raise UserError(f"{where}: 'scores' must be a list of two numbers, the chosen one's first")
    better, worse = (number_column(where, (keys or ("scores",) * 2)[i], value) for i, value in enumerate(values))
    if better == worse and "preference" not in example:
        return TIE
    if better < worse and "preference" not in example:
        raise UserError(
            f"{where}: scores {better:g} (chosen) and {worse:g} (rejected): the chosen one must have the higher score; "
            "swap the two, or remove the example"
        )
    return better, worse


def ranked(where: str, rated: Rated, responses: int) -> list[Item]:
    """Returns comparisons of rated responses, best first. Notes count pairs of equal scores, which are left out.

    Args:
      where: `file:line`, with which error messages begin.
      rated: the responses and their scores.
      responses: responses per comparison: 2 gives all pairs, 1 or 0 the best response or none, more all of them.

    Raises:
      UserError: more than 2 are asked for, and the ranking has another number or a tie.
    """
    best = sorted(range(len(rated.scores)), key=lambda i: -rated.scores[i])
    if responses == 2:
        pairs = itertools.combinations(best, 2)
        return [_select(where, rated, (i, j)) if rated.scores[i] > rated.scores[j] else TIE for i, j in pairs]
    if responses > 2 and len(best) != responses:
        raise UserError(f"{where}: {len(best)} responses, and the loss needs {responses}; give that many")
    chosen = best[:responses]
    if responses > 2 and len({rated.scores[i] for i in chosen}) < responses:
        raise UserError(f"{where}: two responses have the same score, a tie; remove the example")
    return [_select(where, rated, chosen)]


def _select(where: str, rated: Rated, places: Any) -> Comparison:
    responses, scores = (tuple(values[i] for i in places) for values in (rated.responses, rated.scores))
    return Comparison(rated.prompt, responses, where=where, scores=scores)
