"""Weights of a response's tokens, from the column `token_weights`: numbers by token, or spans of characters.

They multiply log-probs before these are summed (TIS-DPO, arXiv 2410.04350); a token of weight 0 is left out (Mask-DPO,
arXiv 2503.02846). For each response: one number per token, the chat template's tokens included (and one more for EOS,
1 by default), or [first, end, weight] for spans of characters of the given text; tokens outside the spans have 1.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from dpo_jax.data.sources.values import FLOAT32_MAX, Example, number_column, parsed
from dpo_jax.data.spelling import reveal
from dpo_jax.errors import UserError

KEY = "token_weights"
Weights = tuple[Any, ...]  # of one response: numbers, or (first, end, weight) of spans; () where all tokens have 1


def weights_column(where: str, example: Example, responses: int) -> tuple[Weights, ...]:
    """Returns the column of an example: a list for each of several responses, or of a single one its own list.

    Raises:
      UserError: no lists of numbers or spans, or of another number of responses.
    """
    given = parsed(example.get(KEY))
    if given is None:
        return ()
    lists = [given] if responses == 1 else given
    if not isinstance(lists, list) or len(lists) != responses:
        wanted = "a list" if responses == 1 else f"{responses} lists, one for each response"
        raise UserError(f"{where}: {KEY!r} must be {wanted}, of numbers or of [first, end, weight]")
    return tuple(_of_response(where, one) for one in lists)


def _of_response(where: str, given: Any) -> Weights:
    if given is None:
        return ()
    if not isinstance(given, list) or len({isinstance(one, list) for one in given}) > 1:
        raise UserError(f"{where}: {KEY!r} must be lists of numbers, or of [first, end, weight]; correct them")
    if not given or not isinstance(given[0], list):
        return tuple(number_column(where, KEY, one, 0, FLOAT32_MAX) for one in given)
    if any(len(span) != 3 for span in given):
        raise UserError(f"{where}: a span of {KEY!r} must be [first, end, weight]; correct it")
    return tuple(tuple(number_column(where, KEY, one, 0, FLOAT32_MAX) for one in span) for span in given)


def aligned(where: str, weights: Weights, tokens: int, offsets: Sequence[tuple[int, int]], length: int) -> list[float]:
    """Returns the weight of each token of a response, and of EOS if it is given one.

    A token has the weight of the span that it overlaps most, the first of equals.

    Args:
      where: begins the messages.
      weights: of the response.
      tokens: their number, without EOS.
      offsets: (first, end) characters of each token in the response, read for spans.
      length: characters of the response.

    Raises:
      UserError: another number of weights than of tokens, weights of 0 alone, or a span outside the response.
    """
    if not weights or not isinstance(weights[0], tuple):
        if weights and len(weights) not in (tokens, tokens + 1):
            raise UserError(f"{where}: {KEY!r} has {len(weights)} numbers for a response of {tokens} tokens; give one "
                            "per token, the chat template's tokens included (and one for EOS, or none), or "
                            "spans")  # fmt: skip
        if len(weights) > tokens and not any(weights):
            raise UserError(f"{where}: {KEY!r} leaves no token of a response; give one a weight above 0")
        return list(weights)
    for first, end, _ in weights:
        if not first < end <= length:
            raise UserError(f"{where}: {KEY!r} has a span {first:g} to {end:g} of a response of {length} characters; "
                            "correct it")  # fmt: skip
    return [_of_token(weights, *place) for place in offsets]


def _of_token(spans: Weights, start: int, stop: int) -> float:
    """Returns the weight of the span that characters overlap most, or 1."""
    overlap = [min(stop, end) - max(start, first) for first, end, _ in spans]
    most = max(overlap)
    return spans[overlap.index(most)][2] if most > 0 else 1.0


def as_given(
    where: str, offsets: Sequence[tuple[int, int]], text: str, given: str, tokenizer: Any
) -> tuple[list[tuple[int, int]], int]:
    """Returns the characters of tokens counted in a message's content as it is given, and the number of its characters.

    A template may write more than the content, and leave out blanks around it.

    Args:
      where: begins the message.
      offsets: (first, end) characters of each token in `text`.
      text: the message as it is tokenized; special tokens that it spells are one character each (see `spelling`).
      given: its content.
      tokenizer: whose special tokens may be spelled.

    Raises:
      UserError: the template writes a message's content in no place, or in several.
    """
    written = reveal(text, tokenizer)
    start = next(
        (written.index(part) - given.index(part) for part in (given, given.strip()) if _once(part, written)), None
    )
    if start is None:
        raise UserError(f"{where}: spans of {KEY!r} count characters of the message's content, which the chat template "
                        "does not write in exactly one place; give a number for each token")  # fmt: skip
    places = [0, *accumulate(len(reveal(character, tokenizer)) for character in text)]
    return [(places[max(a, 0)] - start, places[max(b, 0)] - start) for a, b in offsets], len(given)


def _once(part: str, text: str) -> bool:
    return bool(part) and 0 <= text.find(part) == text.rfind(part)


def truncated_weights(weights: Sequence[list[float]], sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Returns the weight of each token of truncated responses, float32[n_p]; () where all are 1.

    Args:
      weights: of each response before truncation, as `aligned` gives them; [] for all 1.
      sizes: tokens of each response, EOS included if it was not cut.
    """
    if not any(weights):
        return ()
    full = tuple(np.array([*one, *[1.0] * size][:size], np.float32) for one, size in zip(weights, sizes, strict=True))
    return full if any((one != 1).any() for one in full) else ()
