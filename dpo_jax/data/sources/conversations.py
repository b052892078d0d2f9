"""Conversations in the forms of data sets (OpenAI's messages, ShareGPT's turns) to the form of chat templates."""

import json
from collections.abc import Sequence
from typing import Any

from dpo_jax.data.sources.values import SURROGATE, parsed, shorten, type_name
from dpo_jax.errors import UserError
from dpo_jax.records import Chat

ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
    **{"model": "assistant", "observation": "tool", "function_response": "tool"},
}
OTHER_NAMES = {"from": "role", "value": "content"}  # ShareGPT's
Message = dict[str, Any]


def as_message(where: str, key: str, value: Any) -> Message:
    """Returns one message in OpenAI's form.

    Nulls are removed at any depth, because Parquet writes them for absent fields. A message that calls tools and has no
    content keeps `content: None`, as chat templates expect. Arguments of a call that are JSON text become an object.

    Raises:
      UserError: the value is not a message with a known role and a text.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key!r} must hold messages with role and content, not {type_name(value)}")
    found: Message = without_nulls({OTHER_NAMES.get(str(name), str(name)): part for name, part in value.items()})
    role, content = found.get("role"), found.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: {key!r} has a message of role {shorten(role)}; known: {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _joined(where, key, content)
    calls = _of_json(found.get("tool_calls")) or None
    if calls is not None and not isinstance(calls, list):
        raise UserError(f"{where}: {key!r} has tool_calls that are {type_name(calls)}, not a list")
    if calls:
        found["tool_calls"] = [_call(_of_json(call)) for call in calls]
    if content is None and not calls:
        content = ""
    if content is not None and not isinstance(content, str):
        raise UserError(f"{where}: {key!r} has a message whose content is {type_name(content)}, not text")
    if SURROGATE.search(json.dumps(found, ensure_ascii=False)):
        raise UserError(
            f"{where}: {key!r} holds half of a surrogate pair, which is not text; fix or remove the example"
        )
    return {**found, "role": ROLES[role], "content": content}


def without_nulls(value: Any) -> Any:
    """Returns a value without the fields of its objects that are null, at any depth."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _call(call: Any) -> Any:
    """Returns a tool call whose arguments are an object where they are its JSON text."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
        return call
    arguments = _of_json(inner["arguments"])
    # Another text is written by the template as it is.
    inner = inner | {"arguments": arguments if isinstance(arguments, dict) else inner["arguments"]}
    return call | {"function": inner} if "function" in call else inner


def _of_json(value: Any) -> Any:
    """Returns the value of a JSON text; any other text or value is returned unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def role(value: Any) -> str:
    """Returns the role of a message under the name that templates use; '' if the value is not a message."""
    given = value.get("role", value.get("from")) if isinstance(value, dict) else None
    return ROLES.get(given, "") if isinstance(given, str) else ""


def as_messages(where: str, key: str, value: Any) -> list[Message]:
    """Returns a list of messages, given such a list or one message. A turn {input, output} is two messages.

    Raises:
      UserError: the value is something else, or the list is empty.
    """
    value = parsed(value)
    given = value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        raise UserError(
            f"{where}: {key!r} is a list of texts, not of messages; several responses to a prompt belong in "
            "'completions', with 'scores'"
        )
    given = [message for one in given for message in _both_sides(one)]
    found = [as_message(where, key, one) for one in given]
    if not found:
        raise UserError(f"{where}: {key!r} has no messages")
    return found


def _both_sides(turn: Any) -> list[Any]:
    if not isinstance(turn, dict) or set(turn) != {"input", "output"}:
        return [turn]
    return [{"role": "user", "content": turn["input"]}, {"role": "assistant", "content": turn["output"]}]


def as_chat(where: str, turns: Sequence[Message], example: dict[str, Any]) -> Chat:
    """Returns the conversation to answer, with the columns `system`, `tools` and `chat_template_kwargs` of the example.

    If the last turn is the assistant's, a response continues it.

    Raises:
      UserError: no turn is the user's, or a column has the wrong type.
    """
    if example.get("system"):
        if turns[:1] and turns[0]["role"] == "system":
            raise UserError(
                f"{where}: a system message both in the conversation and in the column 'system'; remove one"
            )
        turns = [as_message(where, "system", {"role": "system", "content": example["system"]}), *turns]
    if not any(turn["role"] == "user" for turn in turns):
        raise UserError(f"{where}: the prompt has no user turn")
    options = _parsed(where, example, "chat_template_kwargs", dict) or {}
    tools = [_of_json(tool) for tool in _parsed(where, example, "tools", list) or [] if tool is not None]
    if wrong := next((tool for tool in tools if not isinstance(tool, dict)), None):
        raise UserError(f"{where}: 'tools' must hold objects, not {type_name(wrong)}")
    return Chat(tuple(turns), tuple(tools), options)


def as_answer(where: str, key: str, turns: Sequence[Message]) -> Any:
    """Returns the assistant message that a response is, or the list of its turns if there are several.

    Raises:
      UserError: the turns do not begin and end with one of the assistant.
    """
    for place, name in ((-1, "end"), (0, "begin")):
        if not turns or turns[place]["role"] != "assistant":
            raise UserError(f"{where}: {key!r} does not {name} with an assistant turn after the prompt; correct it")
    return turns[0] if len(turns) == 1 else list(turns)


def common_turns(first: Sequence[Message], second: Sequence[Message]) -> int:
    """Returns how many messages two conversations begin with in common. The last of either is a response."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), most)


def _joined(where: str, key: str, parts: list[Any]) -> str:
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise UserError(f"{where}: {key!r} has content that is not text; remove the example: only text is supported")
    return "".join(part["text"] for part in parts)


def _parsed(where: str, example: dict[str, Any], key: str, kind: type) -> Any:
    """Returns a column with an object or list, given as such or as JSON text; None if it is absent or empty."""
    value = example.get(key) or None
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: {key!r} is not JSON ({error})") from error
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{where}: {key!r} must be {type_name(kind())}, not {type_name(value)}")
    return without_nulls(value)
