"""Rendered turns of a conversation: the assistant's character spans, and fields that the template omits."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.records import Chat

Spans = tuple[tuple[int, int], ...]  # (first, end) of characters
Ids = list[int]


def as_turns(response: Any) -> list[dict[str, Any]]:
    """Returns a response to a conversation as messages: one, or several turns."""
    return list(response) if isinstance(response, list | tuple) else [response]


def assistant_spans(where: str, apply: Callable[..., str], turns: list[dict[str, Any]], prompt: str, eos: str) -> Spans:
    """Returns the characters of a response of several turns that the assistant wrote, EOS included.

    Args:
      where: names the example, for errors.
      apply: (turns, generate) -> what the template writes, see `chat`.
      turns: the response.
      prompt: what the template writes before it.
      eos: the text of EOS.

    Raises:
      UserError: the template rewrites a turn once another one follows.
    """
    rendered, found = apply(turns), []
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = apply(turns[:place], generate=True) if place else prompt
        after = apply(turns[: place + 1])
        if not (rendered.startswith(before) and rendered.startswith(after)):
            raise UserError(
                f"{where}: the chat template writes turn {place + 1} of a response differently once another turn "
                "follows; give single turns, or set another data.chat_template"
            )
        text, ending, _ = rendered[len(before) : len(after)].partition(eos)
        start = len(before) - len(prompt)
        found.append((start, start + len(text + ending)))
    return tuple(found)


def scored_tokens(spans: Spans, offsets: Sequence[tuple[int, int]], start: int) -> list[bool]:
    """Returns whether each token overlaps a span.

    Args:
      spans: characters, counted from `start`.
      offsets: (first, end) characters of each token.
      start: the character from which spans count.
    """
    return [any(a < start + last and b > start + first for first, last in spans) for a, b in offsets]


def unwritten(chat: Chat, responses: Sequence[Any], source: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns notes on what a chat template does not write: its source never names it.

    Args:
      chat: the conversation.
      responses: the responses to it.
      source: the template.
      options: arguments for every conversation.
    """
    known = _words(source)
    messages = [*chat.messages, *(turn for response in responses if response for turn in as_turns(response))]
    fields = {name for message in messages for name, value in message.items() if value} - {"role", "content"} - known
    unused = {*options, *chat.options} - known
    notes = {
        f"conversations with fields that the chat template does not write: {', '.join(sorted(fields))}": fields,
        "conversations with tools, which the chat template does not write": chat.tools and "tools" not in known,
        f"conversations with arguments that the chat template does not use: {', '.join(sorted(unused))}": unused,
    }
    return tuple(note for note, found in notes.items() if found)


@functools.lru_cache(maxsize=8)
def _words(source: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", source))
