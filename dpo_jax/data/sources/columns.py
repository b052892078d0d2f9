"""The usual columns of preference data to comparisons.

columns                            example of
prompt, chosen, rejected           a pair, of texts or of messages. Messages need no prompt: it is the turns with which
                                   both begin. A text prompt beside messages is a user's turn. Scores may stand in
                                   score_chosen and score_rejected, or in scores.
prompt, completions, scores        a ranking; `responses` is the same as `completions`
prompt, completion, label          an unpaired response, label true if it is wanted
prompt, completion                 supervised fine-tuning
messages (or conversations)        in place of prompt and completion: the last turn is the completion
preference                         the probability that chosen is the better one, 1 by default
weight                             multiplies the loss
system, tools, chat_template_kwargs    of a conversation
"""

import itertools
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from dpo_jax.data.sources import conversations as talk
from dpo_jax.data.sources.base import Item, Note
from dpo_jax.data.sources.formats import shorten, type_name
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

FLOAT32_MAX = 3.4028234e38
SURROGATE = re.compile("[\ud800-\udfff]")
CONVERSATION = ("messages", "conversations", "conversation")
LISTS = ("completions", "responses")
RATINGS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
READ = {"prompt", "chosen", "rejected", "completion", "label", "scores", "preference", "weight", "system", "tools"}
READ |= {"chat_template_kwargs", "provenance", *CONVERSATION, *LISTS, *RATINGS[0], *RATINGS[1]}
SHOWN = 20  # column names in a message
Example = dict[str, Any]


class Rated(NamedTuple):
    """A prompt, its responses in the order of the data, and a score for each."""

    prompt: str | Chat
    responses: list[Any]
    scores: list[float]


def comparisons_from_columns(where: str, example: Example, responses: int) -> list[Item]:
    """Returns the comparisons of an example, and notes on what is left out.

    Args:
      where: `file:line`, with which error messages begin.
      example: values by column name.
      responses: responses per comparison. A ranking of more gives all pairs of unequal scores for 2, and its best
        response for 1.

    Raises:
      UserError: a column is wrong or missing.
    """
    example, notes = _without_text_prompt(example)
    return [*_comparisons(where, example, responses), *notes]


def _comparisons(where: str, example: Example, responses: int) -> list[Item]:
    if responses == 0:
        return [Comparison(_prompt(where, example), (), where=where)]
    fields = {"weight": _number(where, example, "weight", 1.0, 0, FLOAT32_MAX), "where": where}
    if (key := _first(example, LISTS)) and isinstance(example[key], list):
        found = ranked(where, _rating(where, example, key), responses)
        return [item._replace(**fields) if isinstance(item, Comparison) else item for item in found]
    if responses > 2:
        message = f"the loss needs {responses} ranked responses: columns prompt, completions, scores"
        raise UserError(f"{where}: {message}; the columns are: {_columns(example)}")
    if "label" in example and not {"chosen", "rejected"} & set(example):
        return _unpaired(where, example, responses, fields)
    if responses == 2:
        preference = _number(where, example, "preference", 1.0, 0, 1)
        return [_pair(where, example)._replace(**fields, preference=preference, scores=_scores(where, example))]
    prompt, response = _single_response(where, example)
    return [Comparison(prompt, (response,), **fields)]


def _without_text_prompt(example: Example) -> tuple[Example, list[Item]]:
    """Returns an example without a text prompt beside responses that are messages, and a note if the prompt is lost.

    If the responses begin with an answer, the text becomes a user's turn before them. Otherwise they hold the whole
    conversation, with the text as one of its turns.
    """
    sides = [example.get(key) for key in ("chosen", "rejected")]
    if not isinstance(example.get("prompt"), str) or not all(isinstance(side, list) for side in sides):
        return example, []
    turns = [turn for side in sides for turn in side or [] if isinstance(turn, dict)]
    if all(talk.role(side[0]) == "assistant" for side in sides if side):
        return example | {"prompt": [{"role": "user", "content": example["prompt"]}]}, []
    known = any(example["prompt"].strip() == str(turn.get("content", turn.get("value"))).strip() for turn in turns)
    note = Note("examples whose messages lack the text in column 'prompt'; it is ignored")
    return {key: value for key, value in example.items() if key != "prompt"}, [] if known else [note]


def text_column(where: str, example: Example, key: str) -> str:
    """Returns the text in a column.

    Raises:
      UserError: the column is missing, or is not text.
    """
    value = _value(where, example, key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, not {type_name(value)}")
    if SURROGATE.search(value):
        raise UserError(
            f"{where}: {key!r} holds half of a surrogate pair, which is not text; fix or remove the example"
        )
    return value


def number_column(where: str, key: str, value: Any, least: float = -FLOAT32_MAX, most: float = FLOAT32_MAX) -> float:
    """Returns a finite number between `least` and `most`.

    Raises:
      UserError: the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {key!r} must be a number, not {type_name(value)}")
    if not least <= value <= most or math.isnan(value):
        bounds = "finite" if least == -FLOAT32_MAX else f"from {least:g} to {most:g}"
        bounds = "finite and not negative" if (least, most) == (0, FLOAT32_MAX) else bounds
        raise UserError(f"{where}: {key!r} must be {bounds}, not {shorten(value)}")
    return float(value)


def binary_label(where: str, key: str, value: Any) -> bool:
    """Returns a label: true or false, 1 or 0.

    Raises:
      UserError: the value is something else.
    """
    if value not in (0, 1) or not isinstance(value, bool | int):
        raise UserError(f"{where}: {key!r} must be true or false, not {shorten(value)}")
    return bool(value)


def _number(where: str, example: Example, key: str, default: float, least: float, most: float) -> float:
    return number_column(where, key, example[key], least, most) if key in example else default


def _columns(example: Example) -> str:
    return as_list(example) or "none"


def as_list(names: Iterable[str]) -> str:
    """Returns column names as a message shows them: sorted, shortened, at most 20."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(" ".join(name[:60].split()) for name in ordered[:SHOWN]) + more


def _first(example: Example, keys: tuple[str, ...]) -> str:
    return next((key for key in keys if key in example), "")


def _value(where: str, example: Example, key: str) -> Any:
    if key not in example:
        raise UserError(f"{where}: no column {key!r}; the columns are: {_columns(example)}")
    return example[key]


def _prompt(where: str, example: Example) -> str | Chat:
    """Returns the prompt, from whichever column has it."""
    if isinstance(example.get("prompt"), list | dict):
        return talk.as_chat(where, talk.as_messages(where, "prompt", example["prompt"]), example)
    if "prompt" not in example and (key := _first(example, CONVERSATION)):
        turns = talk.as_messages(where, key, example[key])
        return talk.as_chat(where, turns[:-1] if turns[-1]["role"] == "assistant" else turns, example)
    if "prompt" not in example and {"chosen", "rejected"} <= set(example):
        return _pair(where, example).prompt
    return text_column(where, example, "prompt")


def _response(where: str, example: Example, key: str, prompt: str | Chat, value: Any = None) -> Any:
    """Returns a response to a prompt: a text if the prompt is one, a message if it is a conversation."""
    value = _value(where, example, key) if value is None else value
    if isinstance(prompt, str):
        return text_column(where, {key: value}, key)
    if isinstance(value, str):
        return {"role": "assistant", "content": text_column(where, {key: value}, key)}
    turns = talk.as_messages(where, key, value)
    before = list(prompt.messages)
    # Some data sets repeat the conversation in each response.
    return talk.as_answer(where, key, turns[len(before) :] if turns[: len(before)] == before else turns)


def _single_response(where: str, example: Example) -> tuple[str | Chat, Any]:
    """Returns (prompt, response) for one response: the completion, the last turn, or the chosen response."""
    key = _first(example, ("completion", "chosen"))
    if key and ("prompt" in example or _first(example, CONVERSATION)):
        prompt = _prompt(where, example)
        return prompt, _response(where, example, key, prompt)
    if key:
        pair = _pair(where, example)
        return pair.prompt, pair.responses[0]
    if conversation := _first(example, CONVERSATION):
        turns = talk.as_messages(where, conversation, example[conversation])
        return talk.as_chat(where, turns[:-1], example), talk.as_answer(where, conversation, turns[-1:])
    return text_column(where, example, "prompt"), text_column(where, example, "completion")


def _pair(where: str, example: Example) -> Comparison:
    if not {"chosen", "rejected"} & set(example):
        message = "the loss needs pairs: columns prompt, chosen, rejected"
        raise UserError(f"{where}: {message}; the columns are: {_columns(example)}")
    given = [_value(where, example, key) for key in ("chosen", "rejected")]
    if "prompt" in example or _first(example, CONVERSATION):
        prompt = _prompt(where, example)
        responses = tuple(_response(where, example, key, prompt) for key in ("chosen", "rejected"))
    elif all(isinstance(value, list) for value in given):
        chosen, rejected = (talk.as_messages(where, k, v) for k, v in zip(("chosen", "rejected"), given, strict=True))
        size = talk.common_turns(chosen, rejected)
        if not size:
            raise UserError(f"{where}: 'chosen' and 'rejected' begin with different messages, so they have no prompt")
        prompt = talk.as_chat(where, chosen[:size], example)
        responses = (talk.as_answer(where, "chosen", chosen[size:]), talk.as_answer(where, "rejected", rejected[size:]))
    else:
        raise UserError(f"{where}: no column 'prompt'; for transcripts such as Anthropic HH's set data.name to hh")
    return Comparison(prompt, responses)


def _scores(where: str, example: Example) -> tuple[float, ...]:
    """Returns the scores of a pair; the first must be higher unless the example has a preference."""
    keys = next((pair for pair in RATINGS if set(pair) & set(example)), None)
    if keys is None and "scores" not in example:
        return ()
    values = [_value(where, example, key) for key in keys] if keys else example["scores"]
    if not isinstance(values, list) or len(values) != 2:
        raise UserError(f"{where}: 'scores' must be a list of two numbers, the chosen one's first")
    better, worse = (number_column(where, (keys or ("scores",) * 2)[i], value) for i, value in enumerate(values))
    if better <= worse and "preference" not in example:
        fault = "a tie, which prefers neither" if better == worse else "the chosen one must have the higher score"
        raise UserError(f"{where}: scores {better:g} (chosen) and {worse:g} (rejected): {fault}; remove the example")
    return better, worse


def _unpaired(where: str, example: Example, responses: int, fields: dict[str, Any]) -> list[Item]:
    """Returns an unpaired response, in first place if wanted, else in second. One response per prompt: wanted only."""
    wanted = binary_label(where, "label", example["label"])
    prompt, response = _single_response(where, example)
    if responses == 1:
        return [Comparison(prompt, (response,), **fields) if wanted else Note("unwanted responses left out")]
    return [Comparison(prompt, (response, None) if wanted else (None, response), **fields)]


def _rating(where: str, example: Example, key: str) -> Rated:
    """Returns the responses of a ranking with their scores, in the order of the example."""
    prompt, given = _prompt(where, example), example[key]
    scores = _value(where, example, "scores")
    if not isinstance(scores, list) or len(scores) != len(given) or not given:
        raise UserError(f"{where}: 'scores' must be a list of numbers, one for each of {key!r}")
    responses = [_response(where, example, key, prompt, value) for value in given]
    return Rated(prompt, responses, [number_column(where, "scores", score) for score in scores])


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
        ties = Note("pairs of equal scores left out")
        pairs = itertools.combinations(best, 2)
        return [_select(where, rated, (i, j)) if rated.scores[i] > rated.scores[j] else ties for i, j in pairs]
    if responses > 2 and len(best) != responses:
        raise UserError(f"{where}: {len(best)} responses, and the loss needs {responses}; give that many")
    chosen = best[:responses]
    if responses > 2 and len({rated.scores[i] for i in chosen}) < responses:
        raise UserError(f"{where}: two responses have the same score, a tie; remove the example")
    return [_select(where, rated, chosen)]


def _select(where: str, rated: Rated, places: Any) -> Comparison:
    responses, scores = (tuple(values[i] for i in places) for values in (rated.responses, rated.scores))
    return Comparison(rated.prompt, responses, where=where, scores=scores)
