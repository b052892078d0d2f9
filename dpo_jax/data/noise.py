"""Noise added to pairs on purpose, to see what a loss makes of it; each draw depends on the pair and a seed alone."""

import hashlib
import math
from collections.abc import Iterable, Iterator

from dpo_jax.data import Item, Note, Stream, as_bytes
from dpo_jax.records import Comparison, UserError


def noisy(items: Iterable[Item], *, flip: float, draw_labels: bool, duplicate: float, seed: int) -> Iterable[Item]:
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
