"""Text prompts beside columns of conversations (system, tools, earlier turns): they become the user's turn."""

from typing import Any

from dpo_jax.data.prerendered import is_prerendered
from dpo_jax.data.sources import conversations as talk
from dpo_jax.data.sources.base import Item, Note
from dpo_jax.data.sources.values import Example, parsed
from dpo_jax.errors import UserError

CONVERSATION = ("messages", "conversations", "conversation")
BESIDE = ("system", "tools", *CONVERSATION)
RENDERED = "prompts to which a chat template was applied already: their text holds {}; they are ignored"
AS_TEXTS = "prompts that stay texts (data.text_prompts) beside {}, which are ignored"
NO_MESSAGES = "text prompts beside {} without a list of messages; they are ignored"
EMPTY = ("", "[]", "{}", "null", [], {}, None)


def is_turn(example: Example) -> bool:
    """Returns whether a text prompt is a user's turn: a system message, tools or earlier turns belong to it.

    If it is in one example of the data, it is in all: the others have no system message, and the same template.
    """
    prompt, sides = example.get("prompt"), [example.get(key) for key in ("chosen", "rejected")]
    if not isinstance(prompt, str):
        return False
    if all(isinstance(side, list) for side in sides):
        return True
    return any(_belongs(key, example[key]) for key in BESIDE if key in example) and not is_prerendered(prompt)


def is_conversation(example: Example) -> bool:
    """Returns whether an example holds its prompt as messages."""
    if "prompt" in example:
        return isinstance(parsed(example["prompt"]), list | dict)
    return any(isinstance(parsed(example.get(key)), list) for key in (*CONVERSATION, "chosen"))


def _belongs(key: str, value: Any) -> bool:
    """Returns whether a column is part of a conversation: not an empty one, nor a number or text named messages."""
    return value not in EMPTY and (key not in CONVERSATION or isinstance(parsed(value), list))


def as_conversation(where: str, example: Example, chat: bool | None) -> tuple[Example, list[Item]]:
    """Returns an example whose prompt stands in one column, a text or the turns of a conversation, and notes.

    A text prompt beside responses that are messages is a user's turn before them if they begin with an answer.
    Otherwise they hold the whole conversation, and a note counts texts that are not part of it. A text prompt beside
    earlier turns in `messages` is the last turn. A prompt to which a chat template was applied stays as it is.

    Args:
      where: `file:line`, with which error messages begin.
      example: values by column name, none of them null.
      chat: whether a text prompt is a user's turn; None: if such columns stand beside it.
    """
    sides = [example.get(key) for key in ("chosen", "rejected")]
    if all(isinstance(side, list) and side and talk.role(side[0]) not in ("", "assistant") for side in sides):
        return _whole_conversations(example, sides)
    if not isinstance(example.get("prompt"), str):
        return example, []
    beside = {key for key in BESIDE if key in example}
    rendered = is_prerendered(example["prompt"])
    if (rendered or chat is False) and not all(isinstance(side, list) for side in sides):
        why = RENDERED if rendered else AS_TEXTS
        return _without(example, beside), _noted(why, [key for key in beside if _belongs(key, example[key])])
    strange = {key for key in beside if not _belongs(key, example[key])}
    notes = _noted(NO_MESSAGES, [key for key in strange if example[key] not in EMPTY])
    example = _without(example, strange)
    if not (chat or is_turn(example)):
        return example, notes
    key = next((key for key in CONVERSATION if key in example), "")
    return example | {"prompt": _with_last_turn(where, key, example) if key else [_user(example["prompt"])]}, notes


def _without(example: Example, names: set[str]) -> Example:
    return {key: value for key, value in example.items() if key not in names}


def _noted(why: str, names: list[str]) -> list[Item]:
    return [Note(why.format(", ".join(sorted(names))))] if names else []


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _whole_conversations(example: Example, sides: list[Any]) -> tuple[Example, list[Item]]:
    """Returns an example whose responses hold the whole conversation without the columns that repeat parts of it."""
    turns = [turn for side in sides for turn in side if isinstance(turn, dict)]
    texts = {str(turn.get("content", turn.get("value"))).strip() for turn in turns}
    lost = isinstance(example.get("prompt"), str) and example["prompt"].strip() not in texts
    note = Note("examples whose messages lack the text in column 'prompt'; it is ignored")
    dropped = {"prompt", *CONVERSATION} if isinstance(example.get("prompt", ""), str) else set()
    return _without(example, dropped), [note] if lost else []


def _with_last_turn(where: str, key: str, example: Example) -> list[Any]:
    """Returns the turns of a column, up to the turn of the user that is the text prompt, which is added if absent."""
    turns, prompt = talk.as_messages(where, key, example[key]), example["prompt"].strip()
    places = [i for i, turn in enumerate(turns) if turn["role"] == "user" and str(turn["content"]).strip() == prompt]
    if places:
        return turns[: places[-1] + 1]
    if turns[-1]["role"] == "user":
        raise UserError(
            f"{where}: the last turn in column {key!r} and the text in column 'prompt' are both the user's and differ; "
            "remove one"
        )
    return [*turns, _user(example["prompt"])]
