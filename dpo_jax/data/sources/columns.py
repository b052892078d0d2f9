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
token_weights                      the weights of each response's tokens, see `data.token_weights`
system, tools, chat_template_kwargs    of a conversation; they make a text prompt the user's turn of one, and so do
                                   earlier turns in messages
A null counts as an absent column, and in system, tools and earlier turns so does an empty value.
"""

from typing import Any

from dpo_jax.data.sources import conversations as talk
from dpo_jax.data.sources.base import TIE, Item, Note
from dpo_jax.data.sources.mapping import fitting
from dpo_jax.data.sources.prompts import CONVERSATION, as_conversation
from dpo_jax.data.sources.ratings import RATINGS, Rated, pair_scores, ranked
from dpo_jax.data.sources.values import (
    FLOAT32_MAX,
    Cell,
    Example,
    MissingColumnError,
    as_list,
    binary_label,
    number_column,
    parsed,
    text_column,
    value_of,
)
from dpo_jax.data.token_weights import KEY, weights_column
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

LISTS = ("completions", "responses")
TALKS = ("prompt", "chosen", "rejected", "completion")  # texts or messages
READ = {"prompt", "chosen", "rejected", "completion", "label", "scores", "preference", "weight", "system", "tools"}
READ |= {KEY, "chat_template_kwargs", "provenance", *CONVERSATION, *LISTS, *RATINGS[0], *RATINGS[1]}


def comparisons_from_columns(where: str, example: Example, responses: int, chat: bool | None = None) -> list[Item]:
    """Returns the comparisons of an example, and notes on what is left out.

    Args:
      where: `file:line`, with which error messages begin.
      example: values by column name.
      responses: responses per comparison. A ranking of more gives all pairs of unequal scores for 2, and its best
        response for 1.
      chat: whether a text prompt is a user's turn, see `prompts`.

    Raises:
      UserError: a column is wrong or missing.
    """
    nulls = [name for name, value in example.items() if value is None]
    present = {name: _cell(name, value) for name, value in example.items() if value is not None}
    example, notes = as_conversation(where, present, chat)
    try:
        return [*_comparisons(where, example, responses), *notes]
    except MissingColumnError as error:
        hint = fitting(present, responses) or "; set data.columns to theirs, as in data.columns.prompt: question"
        raise UserError(f"{error}{f'; null: {as_list(nulls)}' if nulls else ''}{hint}") from error


def _cell(name: str, value: Any) -> Any:
    """Returns a value; the list that a CSV cell stands for where there are lists, or messages."""
    if name in (*LISTS, *CONVERSATION, "scores"):
        return parsed(value)
    messages = parsed(value) if isinstance(value, Cell) and name in TALKS else None
    return messages if isinstance(messages, list) and messages and all(map(talk.role, messages)) else value


def _comparisons(where: str, example: Example, responses: int) -> list[Item]:
    if responses == 0:
        return [Comparison(_prompt(where, example), (), where=where)]
    fields = {"weight": _number(where, example, "weight", 1.0, 0, FLOAT32_MAX), "where": where}
    if (key := _first(example, LISTS)) and isinstance(example[key], list):
        if KEY in example:
            raise UserError(f"{where}: {KEY!r} are for pairs and single responses, not for rankings; remove them")
        found = ranked(where, _rating(where, example, key), responses)
        return [item._replace(**fields) if isinstance(item, Comparison) else item for item in found]
    if responses > 2:
        message = f"the loss needs {responses} ranked responses: columns prompt, completions, scores"
        raise MissingColumnError(f"{where}: {message}; the columns are: {_columns(example)}")
    single = {"completion", *CONVERSATION} & set(example) and not {"chosen", "rejected"} & set(example)
    if "label" in example and single:
        return _unpaired(where, example, responses, fields | {KEY: weights_column(where, example, 1)})
    if responses == 2:
        fields[KEY] = weights_column(where, example, 2)
        preference = _number(where, example, "preference", 1.0, 0, 1)
        pair, scores = _pair(where, example), pair_scores(where, example)
        if isinstance(scores, Note):
            return [scores] if scores is TIE else [pair._replace(**fields, preference=preference), scores]
        return [pair._replace(**fields, preference=preference, scores=scores)]
    prompt, response = _single_response(where, example)
    fields[KEY] = weights_column(where, example, 1 + ({"chosen", "rejected"} <= example.keys()))[:1]
    return [Comparison(prompt, (response,), **fields)]


def _number(where: str, example: Example, key: str, default: float, least: float, most: float) -> float:
    return number_column(where, key, example[key], least, most) if key in example else default


def _columns(example: Example) -> str:
    return as_list(example) or "none"


def _first(example: Example, keys: tuple[str, ...]) -> str:
    return next((key for key in keys if key in example), "")


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
    value = value_of(where, example, key) if value is None else value
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
        raise MissingColumnError(f"{where}: {message}; the columns are: {_columns(example)}")
    given = [value_of(where, example, key) for key in ("chosen", "rejected")]
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
        raise _without_prompt(where, example)
    return Comparison(prompt, responses)


def _without_prompt(where: str, example: Example) -> UserError:
    """Returns the error for text responses without a prompt."""
    if all(str(example[key]).lstrip().startswith("Human:") for key in ("chosen", "rejected")):
        advice = "for transcripts such as Anthropic HH's set data.name to hh"
        return UserError(f"{where}: no column 'prompt'; {advice}")
    return MissingColumnError(f"{where}: no column 'prompt'; the columns are: {_columns(example)}")


def _unpaired(where: str, example: Example, responses: int, fields: dict[str, Any]) -> list[Item]:
    """Returns an unpaired response, in first place if wanted, else in second. One response per prompt: wanted only."""
    wanted = binary_label(where, "label", example["label"])
    prompt, response = _single_response(where, example)
    if responses == 1:
        return [Comparison(prompt, (response,), **fields) if wanted else Note("unwanted responses left out")]
    if own := fields[KEY]:
        fields[KEY] = (*own, ()) if wanted else ((), *own)
    return [Comparison(prompt, (response, None) if wanted else (None, response), **fields)]


def _rating(where: str, example: Example, key: str) -> Rated:
    """Returns the responses of a ranking with their scores, in the order of the example."""
    prompt, given = _prompt(where, example), example[key]
    scores = value_of(where, example, "scores")
    if not isinstance(scores, list) or len(scores) != len(given) or not given:
        raise UserError(f"{where}: 'scores' must be a list of numbers, one for each of {key!r}")
    responses = [_response(where, example, key, prompt, value) for value in given]
    return Rated(prompt, responses, [number_column(where, "scores", score) for score in scores])
