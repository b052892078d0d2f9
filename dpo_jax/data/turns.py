"""Rendered turns of a conversation: the assistant's character spans, and fields that the template omits."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.data.sources.base import or_error
from dpo_jax.errors import UserError
from dpo_jax.records import Chat

Spans = tuple[tuple[int, int], ...]  # (first, end) of characters
Message = dict[str, Any]
Write = Callable[[Chat, list[Message]], str]
ELSE = "\U000f8000"  # a character for private use, which no message has (see `spelling`)
LONG = 12  # characters; a shorter text may occur in a conversation by chance


def as_turns(response: Any) -> list[dict[str, Any]]:
    """Returns a response to a conversation as messages: one, or several turns."""
    return list(response) if isinstance(response, list | tuple) else [response]


def assistant_spans(where: str, apply: Callable[..., str], turns: list[Message], prompt: str, eos: str) -> Spans:
    """Returns the characters of a response of several turns that the assistant wrote, EOS included.

    Args:
      where: names the example, for errors.
      apply: (turns, generate) -> what the template writes, see `chat`.
      turns: the response.
      prompt: what the template writes before it.
      eos: the text of EOS.

    Raises:
      UserError: a turn cannot be found in what the template writes.
    """
    rendered, found = apply(turns), list[tuple[int, int]]()
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = apply(turns[:place], generate=True) if place else prompt
        after = apply(turns[: place + 1])
        start, end = len(before), len(after)
        if not (rendered.startswith(before) and rendered.startswith(after)):
            start, end = _rewritten_turn(where, apply, turns, place, found[-1][1] if found else len(prompt))
        text, ending, _ = rendered[start:end].partition(eos)
        found.append((start, start + len(text + ending)))
    return tuple((first - len(prompt), last - len(prompt)) for first, last in found)


def _rewritten_turn(
    where: str, apply: Callable[..., str], turns: list[Message], place: int, least: int
) -> tuple[int, int]:
    """Returns the characters of an assistant's turn in a template that writes turns otherwise once others follow.

    Qwen 3, for example, drops the reasoning of earlier turns. What the turn says is where the whole text changes if the
    turn says something else; the turn begins after the mark with which the template begins every answer before it.

    Args:
      where, apply, turns: as `assistant_spans` has them.
      place: the turn's place.
      least: the character at which the turn before ends, or the prompt.
    """
    rendered, alone, (changed, changed_alone) = apply(turns), apply(turns[: place + 1]), _changed(apply, turns, place)
    first, last = _difference(rendered, changed)
    _, said = _difference(alone, changed_alone)
    end = last + common_size(rendered[last:], alone[said:])
    if place == 0 and changed:
        return least, end
    header = apply(turns[:place], generate=True).removeprefix(apply(turns[:place]))
    line = re.match(r"\s*\S[^\n]*\n?", header)  # a block of reasoning may follow in the header, and not in the text
    starts = [(rendered.rfind(mark, least, first), mark) for mark in (header, line[0])] if line else []
    begin, mark = max(starts, default=(-1, ""))
    if not changed or begin < least:
        raise UserError(
            f"{where}: turn {place + 1} of a response cannot be found in what the chat template writes; give single "
            "turns, or set another data.chat_template"
        )
    return begin + len(mark), end


def _changed(apply: Callable[..., str], turns: list[Message], place: int) -> tuple[str, str]:
    """Returns what a template writes if a turn says `ELSE`, with the turns after it and without; ("", "") if it fails.

    A template may write calls alone, without content, or need them before a tool's result.
    """
    for other in ({"role": "assistant", "content": ELSE}, {**turns[place], "content": ELSE}):
        before = [*turns[:place], other]
        found = [or_error(apply, part) for part in ([*before, *turns[place + 1 :]], before)]
        if all(isinstance(text, str) and ELSE in text for text in found):
            return found[0], found[1]  # type: ignore[return-value]
    return "", ""


def _difference(text: str, other: str) -> tuple[int, int]:
    """Returns (first, end) of the characters of a text that another text of the same beginning and end lacks."""
    first = common_size(text, other)
    same = common_size(text[first:][::-1], other[first:][::-1])
    return first, len(text) - same


def common_size(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns the length of the common prefix."""
    most = min(len(first), len(second))
    return next((i for i in range(most) if first[i] != second[i]), most)


def scored_tokens(spans: Spans, offsets: Sequence[tuple[int, int]], start: int) -> list[bool]:
    """Returns whether each token overlaps a span.

    Args:
      spans: characters, counted from `start`.
      offsets: (first, end) characters of each token.
      start: the character from which spans count.
    """
    return [any(a < start + last and b > start + first for first, last in spans) for a, b in offsets]


def unwritten(write: Write, chat: Chat, responses: Sequence[Any], source: str) -> tuple[str, ...]:
    """Returns notes on what a chat template does not write: without it, the text is the same.

    Args:
      write: (conversation, turns of a response) -> what the template writes.
      chat: the conversation.
      responses: the responses to it.
      source: the template.
    """
    answers = [as_turns(response) for response in responses if response] or [[]]
    starts = [0] + [len(chat.messages)] * (len(answers) - 1)  # messages of the conversation are looked at once
    found = (_unwritten(write, chat, turns, start, source) for turns, start in zip(answers, starts, strict=True))
    fields = {name for names in found for name in names}
    tools = chat.tools and write(chat, answers[0]) == or_error(write, chat._replace(tools=()), answers[0])
    notes = {
        f"conversations with fields that the chat template does not write: {', '.join(sorted(fields))}": fields,
        "conversations with tools, which the chat template does not write": tools,
    }
    return tuple(note for note, found in notes.items() if found)


def _unwritten(write: Write, chat: Chat, turns: list[Message], start: int, source: str) -> Iterator[str]:
    """Yields the names of fields, of messages from place `start` on, without which the template writes the same."""
    known, rendered = _words(source), ""
    by_name = not known & {"items", "tojson"}  # which write fields that the template does not name
    for place, message in enumerate([*chat.messages, *turns][start:], start):
        for name, value in message.items():
            if not value or name in ("role", "content"):
                continue
            rendered = rendered or write(chat, turns)
            seen = name in known and occurs_in(value, rendered)
            unnamed = by_name and name not in known
            if unnamed or (not seen and or_error(write, *_without(chat, turns, place, name)) == rendered):
                yield name


def unused_arguments(chat: Chat, source: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns notes on arguments, for every conversation (`options`) or for this one, that a template never names."""
    names = sorted({*options, *chat.options} - _words(source))
    return (f"conversations with arguments that the chat template does not use: {', '.join(names)}",) if names else ()


def occurs_in(value: Any, rendered: str) -> bool:
    """Returns whether a text of more than `LONG` characters occurs in a rendered conversation."""
    return isinstance(value, str) and len(value) > LONG and value.strip() in rendered


def _without(chat: Chat, turns: list[Message], place: int, name: str) -> tuple[Chat, list[Message]]:
    """Returns a conversation and turns without a field of one message."""
    whole = [*chat.messages, *turns]
    whole[place] = {key: value for key, value in whole[place].items() if key != name}
    size = len(chat.messages)
    return chat._replace(messages=tuple(whole[:size])), whole[size:]


def as_written(messages: Sequence[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Returns messages as a template takes them: with null fields if it tests for none, else without them."""
    if _words(source) & {"none", "None"}:
        return list(messages)
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


@functools.lru_cache(maxsize=8)
def _words(source: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", source))
