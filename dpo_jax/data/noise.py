"""Transforms of data: label noise for a stream of items, and extra tokens or responses for a table.

    add_noise        items -> items    labels flipped or sampled, comparisons repeated: studies of noisy preferences
    append_token     Table -> Tokens   one token after every response: reward models
    add_mismatched   Table -> Tokens   one more response, from another prompt: losses that estimate a KL (KTO)

Every random decision of `add_noise` is a hash of the comparison and the seed, so that it does not depend on the order
of the data or on what else is in it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dpo_jax.data.sources.base import Item, Note, Stream, as_bytes
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison, Tokens


def add_noise(items: Iterable[Item], *, flip: float, draw_labels: bool, duplicate: float, seed: int) -> Iterable[Item]:
    """Returns items with noise in the labels of pairs; notes count what was changed.

    Args:
      items: re-iterable, comparisons with two responses.
      flip: share of pairs whose responses are swapped.
      draw_labels: whether to sample the order of each pair: the first response stays first with the probability
        sigmoid(score 1 - score 2).
      duplicate: share of comparisons that are repeated.
      seed: of all decisions.

    Raises:
      UserError: a share is outside [0, 1]; while iterating, a comparison without two responses, or without scores to
        sample by.
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
            if draw_labels and _uniform(item, seed, "label") >= _first_is_better(item):
                yield Note("pairs ordered against their scores (data.draw_labels)")
                item = _swapped(item)
            if _uniform(item, seed, "flip") < flip:
                yield Note("pairs flipped (data.flip_labels)")
                item = _swapped(item)
            yield item
            if _uniform(item, seed, "duplicate") < duplicate:
                yield Note("comparisons repeated (data.duplicate)")
                yield item

    return Stream(changed)


def append_token(table: Table, end: int, pad: int) -> Iterator[Tokens]:
    """Yields comparisons with one more token after each response, so that a reward model sees the last real one.

    A row drops the last token of a response (`pack`), but a reward is read there. As in transformers, it is read at
    the last token that is not padding. So a response that ends with `pad` (EOS, for tokenizers that pad with EOS) gets
    no token: dropping its last one leaves the token to read.

    Args:
      table: comparisons.
      end: the token to append.
      pad: the padding token of the reward model's tokenizer.
    """

    def longer(response: np.ndarray) -> np.ndarray:
        return np.append(response, np.int32(end)) if len(response) and response[-1] != pad else response

    for index in range(len(table)):
        tokens = table[index]
        if tokens.token_weights:
            raise UserError("data: token_weights have no meaning for a reward model; remove the column")
        yield tokens._replace(responses=tuple(map(longer, tokens.responses)), scored=())  # rewards read every turn


def add_mismatched(table: Table, max_length: int, counts: Counter[str]) -> Iterator[Tokens]:
    """Yields comparisons with one more response, taken from the next comparison that has another prompt.

    It is the first response of that comparison that is not absent, truncated so that prompt and response keep to
    `max_length` tokens; `counts["cut"]` counts the truncated ones. A comparison whose response has no token with a
    weight above 0 after that is dropped; `counts["unweighted"]` counts those.

    Raises:
      UserError: all prompts are the same, or all comparisons are dropped.
    """
    for index, donor in enumerate(next_with_another_prompt(table.prompts)):
        tokens = table[index]
        other = table[donor]
        taken = next(p for p, response in enumerate(other.responses) if len(response))
        room = max(1, max_length - len(tokens.prompt))
        weights = other.weights_of(taken)[:room]
        if not weights.any():
            counts["unweighted"] += 1
            continue
        counts["cut"] += len(other.responses[taken]) > room
        masks = (*map(tokens.mask, range(len(tokens.responses))), other.mask(taken)[:room])
        yield tokens._replace(
            responses=(*tokens.responses, other.responses[taken][:room]),
            scores=(*tokens.scores, 0.0),
            scored=() if all(mask.all() for mask in masks) else masks,
            token_weights=(*map(tokens.weights_of, range(len(tokens.responses))), weights)
            if tokens.token_weights or other.token_weights
            else (),
        )
    if counts["unweighted"] == len(table):
        raise UserError("data: max_length leaves no response to another prompt a token with a weight above 0; raise it")


def next_with_another_prompt(prompts: np.ndarray | Sequence[int]) -> Iterator[int]:
    """Yields, for each element of `prompts`, the index of the next element that differs; the end wraps to the start.

    Raises:
      UserError: all elements are equal.
    """
    count, place = len(prompts), 0
    for index in range(count):
        place = max(place, index + 1)
        while prompts[place % count] == prompts[index]:
            place += 1
            if place == index + count:
                raise UserError("data: all prompts are the same, so no response belongs to another prompt; add data")
        yield place % count


def _uniform(item: Comparison, seed: int, what: str) -> float:
    """Returns a hash in [0, 1) that does not depend on the order of the responses."""
    parts = [as_bytes(item.prompt), *sorted(as_bytes(response) for response in item.responses)]
    digest = hashlib.blake2b(repr((seed, what, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _first_is_better(item: Comparison) -> float:
    """Returns the Bradley-Terry probability that the first response is the better one."""
    if len(item.scores) != 2:
        raise UserError(f"{item.where}: data.draw_labels needs two scores; give the data score_chosen, score_rejected")
    return 1 / (1 + math.exp(min(item.scores[1] - item.scores[0], 700)))


def _swapped(item: Comparison) -> Comparison:
    if len(item.responses) != 2:
        raise UserError(f"{item.where}: label noise needs two responses, not {len(item.responses)}")
    back = {"responses": item.responses, "scores": item.scores, "token_weights": item.token_weights}
    return item._replace(**{name: value[::-1] for name, value in back.items()})
