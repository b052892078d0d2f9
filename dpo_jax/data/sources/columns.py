"""The usual columns of preference data to comparisons.

prompt, chosen, rejected           a pair; texts, or messages; with messages the prompt may be left out, and is then
                                   what both begin with (a text beside messages is a turn of the user's); scores in
                                   score_chosen, score_rejected or scores
prompt, completions, scores        a ranking; `responses` is the same as `completions`
prompt, completion, label          an unpaired response, true if it is wanted
prompt, completion                 an example
messages (or conversations)        in place of prompt and completion; the last turn is the completion
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
SHOWN = 20  # names of columns that a message shows
Row = dict[str, Any]


class Rated(NamedTuple):
    """A prompt, and its responses with what is known of each."""

    prompt: str | Chat
    responses: list[Any]
    scores: list[float]


def comparisons_from_columns(where: str, row: Row, responses: int) -> list[Item]:
    """The comparisons in a row, each with so many responses.

    Two of a ranking are all its pairs with unequal scores; of more, all must be there. One response is the best one.

    Raises:
      UserError: naming the row and the column that is wrong or missing.
    """
    row, notes = _without_text_prompt(row)
    return [*_comparisons(where, row, responses), *notes]


def _comparisons(where: str, row: Row, responses: int) -> list[Item]:
    if responses == 0:
        return [Comparison(_prompt(where, row), (), where=where)]
    fields = {"weight": _number(where, row, "weight", 1.0, 0, FLOAT32_MAX), "where": where}
    if (key := _first(row, LISTS)) and isinstance(row[key], list):
        found = ranked(where, _rating(where, row, key), responses)
        return [item._replace(**fields) if isinstance(item, Comparison) else item for item in found]
    if responses > 2:
        message = f"the loss needs {responses} ranked responses: columns prompt, completions, scores"
        raise UserError(f"{where}: {message}; the columns are: {_columns(row)}")
    if "label" in row and not {"chosen", "rejected"} & set(row):
        return _unpaired(where, row, responses, fields)
    if responses == 2:
        preference = _number(where, row, "preference", 1.0, 0, 1)
        return [_pair(where, row)._replace(**fields, preference=preference, scores=_scores(where, row))]
    prompt, response = _example(where, row)
    return [Comparison(prompt, (response,), **fields)]


def _without_text_prompt(row: Row) -> tuple[Row, list[Item]]:
    """A row whose responses are messages beside a prompt that is text, in the form that others have: the text is a
    user's turn before responses that begin with an answer, else a turn of theirs once more."""
    sides = [row.get(key) for key in ("chosen", "rejected")]
    if not isinstance(row.get("prompt"), str) or not all(isinstance(side, list) for side in sides):
        return row, []
    turns = [turn for side in sides for turn in side or [] if isinstance(turn, dict)]
    if all(talk.role(side[0]) == "assistant" for side in sides if side):
        return row | {"prompt": [{"role": "user", "content": row["prompt"]}]}, []
    known = any(row["prompt"].strip() == str(turn.get("content", turn.get("value"))).strip() for turn in turns)
    note = Note("rows whose messages do not hold the text in the column 'prompt', which is left out")
    return {key: value for key, value in row.items() if key != "prompt"}, [] if known else [note]


def text_column(where: str, row: Row, key: str) -> str:
    """The text in a column of a row, or a `UserError` that says what is there instead."""
    value = _value(where, row, key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, not {type_name(value)}")
    if SURROGATE.search(value):
        raise UserError(f"{where}: {key!r} holds half of a surrogate pair, which is not text; repair or remove the row")
    return value


def number_column(where: str, key: str, value: Any, least: float = -FLOAT32_MAX, most: float = FLOAT32_MAX) -> float:
    """A finite number within bounds, or a `UserError` that says what is there instead."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {key!r} must be a number, not {type_name(value)}")
    if not least <= value <= most or math.isnan(value):
        bounds = "finite" if least == -FLOAT32_MAX else f"from {least:g} to {most:g}"
        bounds = "finite and not negative" if (least, most) == (0, FLOAT32_MAX) else bounds
        raise UserError(f"{where}: {key!r} must be {bounds}, not {shorten(value)}")
    return float(value)


def binary_label(where: str, key: str, value: Any) -> bool:
    """A label that is true or false, 1 or 0, or a `UserError` that says what it is instead."""
    if value not in (0, 1) or not isinstance(value, bool | int):
        raise UserError(f"{where}: {key!r} must be true or false, not {shorten(value)}")
    return bool(value)


def _number(where: str, row: Row, key: str, default: float, least: float, most: float) -> float:
    return number_column(where, key, row[key], least, most) if key in row else default


def _columns(row: Row) -> str:
    return as_list(row) or "none"


def as_list(names: Iterable[str]) -> str:
    """Names of columns as a message shows them."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(" ".join(name[:60].split()) for name in ordered[:SHOWN]) + more


def _first(row: Row, keys: tuple[str, ...]) -> str:
    return next((key for key in keys if key in row), "")


def _value(where: str, row: Row, key: str) -> Any:
    if key not in row:
        raise UserError(f"{where}: no column {key!r}; the columns are: {_columns(row)}")
    return row[key]


def _prompt(where: str, row: Row) -> str | Chat:
    """What a response follows, wherever the row has it."""
    if isinstance(row.get("prompt"), list | dict):
        return talk.as_chat(where, talk.as_messages(where, "prompt", row["prompt"]), row)
    if "prompt" not in row and (key := _first(row, CONVERSATION)):
        turns = talk.as_messages(where, key, row[key])
        return talk.as_chat(where, turns[:-1] if turns[-1]["role"] == "assistant" else turns, row)
    if "prompt" not in row and {"chosen", "rejected"} <= set(row):
        return _pair(where, row).prompt
    return text_column(where, row, "prompt")


def _response(where: str, row: Row, key: str, prompt: str | Chat, value: Any = None) -> Any:
    """A response to a prompt: a text to a text, a message to a conversation."""
    value = _value(where, row, key) if value is None else value
    if isinstance(prompt, str):
        return text_column(where, {key: value}, key)
    if isinstance(value, str):
        return {"role": "assistant", "content": text_column(where, {key: value}, key)}
    turns = talk.as_messages(where, key, value)
    before = list(prompt.messages)
    # Some data sets write the whole conversation into each response.
    return talk.as_answer(where, key, turns[len(before) :] if turns[: len(before)] == before else turns)


def _example(where: str, row: Row) -> tuple[str | Chat, Any]:
    """(prompt, response) of a row with one response: its completion, last turn, or chosen one."""
    key = _first(row, ("completion", "chosen"))
    if key and ("prompt" in row or _first(row, CONVERSATION)):
        prompt = _prompt(where, row)
        return prompt, _response(where, row, key, prompt)
    if key:
        pair = _pair(where, row)
        return pair.prompt, pair.responses[0]
    if conversation := _first(row, CONVERSATION):
        turns = talk.as_messages(where, conversation, row[conversation])
        return talk.as_chat(where, turns[:-1], row), talk.as_answer(where, conversation, turns[-1:])
    return text_column(where, row, "prompt"), text_column(where, row, "completion")


def _pair(where: str, row: Row) -> Comparison:
    if not {"chosen", "rejected"} & set(row):
        message = "the loss needs pairs: columns prompt, chosen, rejected"
        raise UserError(f"{where}: {message}; the columns are: {_columns(row)}")
    given = [_value(where, row, key) for key in ("chosen", "rejected")]
    if "prompt" in row or _first(row, CONVERSATION):
        prompt = _prompt(where, row)
        responses = tuple(_response(where, row, key, prompt) for key in ("chosen", "rejected"))
    elif all(isinstance(value, list) for value in given):
        chosen, rejected = (talk.as_messages(where, k, v) for k, v in zip(("chosen", "rejected"), given, strict=True))
        size = talk.common_turns(chosen, rejected)
        if not size:
            raise UserError(f"{where}: 'chosen' and 'rejected' begin with different messages, so they have no prompt")
        prompt = talk.as_chat(where, chosen[:size], row)
        responses = (talk.as_answer(where, "chosen", chosen[size:]), talk.as_answer(where, "rejected", rejected[size:]))
    else:
        raise UserError(f"{where}: no column 'prompt'; transcripts such as Anthropic HH's are read by data.name hh")
    return Comparison(prompt, responses)


def _scores(where: str, row: Row) -> tuple[float, ...]:
    """The scores of a pair, the first the higher unless the row has a preference of its own."""
    keys = next((pair for pair in RATINGS if set(pair) & set(row)), None)
    if keys is None and "scores" not in row:
        return ()
    values = [_value(where, row, key) for key in keys] if keys else row["scores"]
    if not isinstance(values, list) or len(values) != 2:
        raise UserError(f"{where}: 'scores' must be a list of two numbers, the chosen one's first")
    better, worse = (number_column(where, (keys or ("scores",) * 2)[i], value) for i, value in enumerate(values))
    if better <= worse and "preference" not in row:
        said = "a tie, which prefers neither" if better == worse else "but it is the higher one that must be chosen"
        raise UserError(f"{where}: scores {better:g} (chosen) and {worse:g} (rejected): {said}; remove the row")
    return better, worse


def _unpaired(where: str, row: Row, responses: int, fields: dict[str, Any]) -> list[Item]:
    """A response alone: wanted, it stands first, else second. Among examples only wanted ones have a place."""
    wanted = binary_label(where, "label", row["label"])
    prompt, response = _example(where, row)
    if responses == 1:
        return [Comparison(prompt, (response,), **fields) if wanted else Note("unwanted responses left out")]
    return [Comparison(prompt, (response, None) if wanted else (None, response), **fields)]


def _rating(where: str, row: Row, key: str) -> Rated:
    """A ranking's responses with their scores, as the row has them."""
    prompt, given = _prompt(where, row), row[key]
    scores = _value(where, row, "scores")
    if not isinstance(scores, list) or len(scores) != len(given) or not given:
        raise UserError(f"{where}: 'scores' must be a list of numbers, one for each of {key!r}")
    responses = [_response(where, row, key, prompt, value) for value in given]
    return Rated(prompt, responses, [number_column(where, "scores", score) for score in scores])


def ranked(where: str, rated: Rated, responses: int) -> list[Item]:
    """Comparisons of so many responses from rated ones, best first; ties are counted and left out.

    Raises:
      UserError: a ranking of more than two has another number of responses, or a tie.
    """
    best = sorted(range(len(rated.scores)), key=lambda i: -rated.scores[i])
    if responses == 2:
        ties = Note("pairs of equal scores left out")
        pairs = itertools.combinations(best, 2)
        return [_taken(where, rated, (i, j)) if rated.scores[i] > rated.scores[j] else ties for i, j in pairs]
    if responses > 2 and len(best) != responses:
        raise UserError(f"{where}: {len(best)} responses, and the loss needs {responses}")
    chosen = best[:responses]
    if responses > 2 and len({rated.scores[i] for i in chosen}) < responses:
        raise UserError(f"{where}: two responses have the same score, a tie that a ranking cannot hold; remove the row")
    return [_taken(where, rated, chosen)]


def _taken(where: str, rated: Rated, places: Any) -> Comparison:
    responses, scores = (tuple(values[i] for i in places) for values in (rated.responses, rated.scores))
    return Comparison(rated.prompt, responses, where=where, scores=scores)
