"""Weights of a response's tokens, from the column `token_weights`: numbers by token, or spans of characters.

They multiply log-probs before these are summed (TIS-DPO, arXiv 2410.04350); a token of weight 0 is left out (Mask-DPO,
arXiv 2503.02846). For each response: a number for each of its tokens (and one more for EOS, which has 1 by default), or
[first, end, weight] for spans of its text as it is tokenized, between which tokens have 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax.data.sources.values import FLOAT32_MAX, Example, number_column, parsed
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
      UserError: another number of weights than of tokens, or a span outside the response.
    """
    if not weights or not isinstance(weights[0], tuple):
        if weights and len(weights) not in (tokens, tokens + 1):
            raise UserError(f"{where}: {KEY!r} has {len(weights)} numbers for a response of {tokens} tokens; give one "
                            "for each (and one for EOS, or none), or spans")  # fmt: skip
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


def finished(
    where: str, weights: Sequence[list[float]], masks: tuple[np.ndarray, ...], sizes: Sequence[int]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Returns which tokens of truncated responses are scored, and their weights; () where all are, or all have 1.

    Args:
      where: begins the messages.
      weights: of each response, as `aligned` gives them; [] for all 1.
      masks: which tokens of each response are scored anyway; () for all.
      sizes: tokens of each response, EOS included if it was not cut.

    Raises:
      UserError: no token of a response is left.
    """
    if not any(weights):
        return masks, ()
    full = tuple(np.array([*one, *[1.0] * size][:size], np.float32) for one, size in zip(weights, sizes, strict=True))
    kept = [one > 0 for one in full]
    kept = [mine & mask for mine, mask in zip(kept, masks, strict=True)] if masks else kept
    if any(size and not mask.any() for size, mask in zip(sizes, kept, strict=True)):
        raise UserError(f"{where}: {KEY!r} leaves no token of a response; give one a weight above 0")
    weighted = any((one != 1).any() for one in full)
    return () if all(mask.all() for mask in kept) else tuple(kept), full if weighted else ()
