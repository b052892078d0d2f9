"""Noise added to pairs on purpose, to see what a loss makes of it; each draw depends on the pair and a seed alone."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dpo_jax.data.sources.base import Item, Note, Stream, as_bytes
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Array, Comparison, Tokens


def append_token(table: Table, end: int, pad: int) -> Iterator[Tokens]:
    """Yields comparisons in which a token follows each response, but for one whose last token is padding.

    A reward is then read at the last token that is no padding, as transformers reads it: EOS or, where texts are
    padded with EOS, the token before it.

    Args:
      table: comparisons.
      end: the token that follows.
      pad: the token that texts are padded with.
    """

    def longer(response: Array) -> Array:
        return np.append(response, np.int32(end)) if len(response) and response[-1] != pad else response

    for index in range(len(table)):
        row = table[index]
        yield row._replace(responses=tuple(map(longer, row.responses)))


def add_mismatched(table: Table, max_length: int, counts: Counter[str]) -> Iterator[Tokens]:
    """Yields comparisons with one response more to each prompt: the first that is there of the next comparison,
    counted round the table, that has another prompt. It is `cut`, and counted so, where prompt and response would not
    keep to `max_length` tokens.

    Raises:
      UserError: all prompts are the same.
    """
    for index, donor in enumerate(next_with_another_prompt(table.prompts)):
        tokens = table[index]
        answer = next(response for response in table[donor].responses if len(response))
        room = max(1, max_length - len(tokens.prompt))
        counts["cut"] += len(answer) > room
        yield tokens._replace(responses=(*tokens.responses, answer[:room]), scores=(*tokens.scores, 0.0))


def next_with_another_prompt(prompts: Array | Sequence[int]) -> Iterator[int]:
    """Yields, for each element of `prompts`, the place of the next one that differs, counted round."""
    count, place = len(prompts), 0
    for index in range(count):
        place = max(place, index + 1)
        while prompts[place % count] == prompts[index]:
            place += 1
            if place == index + count:
                raise UserError("data: all prompts are the same, so that no response belongs to another one")
        yield place % count


def add_noise(items: Iterable[Item], *, flip: float, draw_labels: bool, duplicate: float, seed: int) -> Iterable[Item]:
    """Items with noise in the labels of pairs, which notes count.

    Args:
      items: with comparisons of two responses.
      flip: the share of pairs whose responses change places.
      draw_labels: order pairs by a draw: the first is the better one with the sigmoid of the difference in scores.
      duplicate: the share of comparisons that come twice.
      seed: of all draws.

    Raises:
      UserError: a share is not between 0 and 1; while they are gone through, a comparison that has no two responses,
        or no scores to draw by.
    """
    for key, share in (("flip_labels", flip), ("duplicate", duplicate)):
        if not 0 <= share <= 1:
            raise UserError(f"data.{key} must be between 0 and 1, not {share}")
    if not (flip or draw_labels or duplicate):
        return items

    def changed() -> Iterator[Item]:
        for item in items:
            if not isinstance(item, Comparison):
                yield item
                continue
            if draw_labels and _draw(item, seed, "label") >= _odds(item):
                yield Note("pairs ordered against their scores, by a draw")
                item = _swapped(item)
            if _draw(item, seed, "flip") < flip:
                yield Note("pairs flipped, as data.flip_labels asks for")
                item = _swapped(item)
            yield item
            if _draw(item, seed, "duplicate") < duplicate:
                yield Note("comparisons repeated, as data.duplicate asks for")
                yield item

    return Stream(changed)


def _draw(item: Comparison, seed: int, what: str) -> float:
    """A number in [0, 1), whatever the order of the two responses."""
    parts = [as_bytes(item.prompt), *sorted(as_bytes(response) for response in item.responses)]
    digest = hashlib.blake2b(repr((seed, what, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _odds(item: Comparison) -> float:
    """The probability that the first response is the better one, by Bradley and Terry."""
    if len(item.scores) != 2:
        raise UserError(f"{item.where}: data.draw_labels needs two scores; give the data score_chosen, score_rejected")
    return 1 / (1 + math.exp(min(item.scores[1] - item.scores[0], 700)))


def _swapped(item: Comparison) -> Comparison:
    if len(item.responses) != 2:
        raise UserError(f"{item.where}: noise in labels needs two responses, not {len(item.responses)}")
    return item._replace(responses=item.responses[::-1], scores=item.scores[::-1])
