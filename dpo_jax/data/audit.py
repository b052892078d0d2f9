"""Statistics of preference data before training: counts, contradictory labels, and comparisons as a model sees them."""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.encode import EncodeOptions, encode
from dpo_jax.data.sources.base import Item, as_bytes, or_error, prompt_key
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

COMPARED = 500  # comparisons that are tokenized with both boundaries


class PairCounts(NamedTuple):
    """Counts of the training or held-out data.

    Attributes:
      comparisons: all comparisons.
      prompts: distinct prompts.
      repeated: comparisons that repeat an earlier one.
      identical: comparisons with two identical responses.
      conflicting: comparisons whose prompt and responses occur in another comparison in another order.
      unpaired: comparisons with an absent response.
      wanted: unpaired ones whose response is the wanted one.
      keys: uint64[N], the prompt keys.
    """

    comparisons: int
    prompts: int
    repeated: int
    identical: int
    conflicting: int
    unpaired: int
    wanted: int
    keys: np.ndarray

    def lines(self) -> list[str]:
        """Returns the counts as lines of text, without counts that are 0."""
        notes = {
            "comparisons that repeat an earlier one": self.repeated,
            "with identical responses": self.identical,
            "with conflicting labels: the responses of another comparison in another order": self.conflicting,
            f"unpaired, {self.wanted:,} of them wanted": self.unpaired,
        }
        first = f"{self.comparisons:,} comparisons of {self.prompts:,} prompts"
        return [first, *(f"{count:,} {note}" for note, count in notes.items() if count)]


class Piece(NamedTuple):
    """A piece of text of one or more tokens.

    Attributes:
      text: the text.
      scored: whether they are scored.
      mark: after the last of some pieces of one weight, that weight, such as `×2`; "" where all weights are 1.
    """

    text: str
    scored: bool
    mark: str = ""


def count_pairs(items: Iterable[Item]) -> PairCounts:
    """Counts comparisons. Memory: 24 bytes for each, three 64-bit hashes."""
    prompts, ordered, unordered = array("Q"), array("Q"), array("Q")
    identical = unpaired = wanted = 0
    for item in items:
        if not isinstance(item, Comparison):
            continue
        responses = [as_bytes(response) for response in item.responses if response is not None]
        identical += len(set(responses)) < len(responses)
        absent = len(responses) < len(item.responses)
        unpaired += absent
        wanted += absent and item.responses[0] is not None
        prompts.append(prompt_key(item.prompt))
        texts = [str(prompts[-1]), *(f"{as_bytes(response)}" for response in item.responses)]
        ordered.append(prompt_key("\0".join(texts)))
        unordered.append(prompt_key("\0".join(sorted(texts))))
    keys = np.array(prompts, np.uint64)
    return PairCounts(
        len(keys), len(np.unique(keys)), len(keys) - len(np.unique(ordered)), identical,
        _conflicts(np.array(ordered, np.uint64), np.array(unordered, np.uint64)), unpaired, wanted, keys,
    )  # fmt: skip


def _conflicts(ordered: np.ndarray, unordered: np.ndarray) -> int:
    """Returns how many comparisons share their unordered key with one that has another ordered key."""
    if not len(ordered):
        return 0
    _, group = np.unique(unordered, return_inverse=True)
    distinct = np.unique(np.stack([group.astype(np.uint64), ordered], axis=1), axis=0)
    several = np.bincount(distinct[:, 0].astype(np.int64)) > 1
    return int(several[group].sum())


def shared_prompts(first: PairCounts, second: PairCounts) -> int:
    """Returns how many comparisons of `second` have a prompt that `first` has too."""
    return int(np.isin(second.keys, first.keys).sum())


def boundary_differences(items: Iterable[Item], tokenizer: Any, options: EncodeOptions) -> tuple[int, int]:
    """Returns (different, compared): comparisons whose tokens differ between `boundary: separate` and `joint`.

    Only the first 500 comparisons that can be encoded are compared.
    """
    different = compared = 0
    for item in items:
        if compared == COMPARED:
            break
        if isinstance(item, Comparison):
            found = [or_error(_untruncated, item, tokenizer, options, boundary) for boundary in ("separate", "joint")]
            if not any(isinstance(one, UserError) for one in found):
                compared += 1
                different += found[0] != found[1]
    return different, compared


def _untruncated(item: Comparison, tokenizer: Any, options: EncodeOptions, boundary: str) -> list[list[int]]:
    free = {"truncation": "refuse", "max_length": 10**9, "degenerate": "keep", "boundary": boundary}
    table, _ = encode([item], tokenizer, **{**options._asdict(), **free})
    return [part.tolist() for part in (table[0].prompt, *table[0].responses)]


def pieces(table: Table, index: int, tokenizer: Any) -> list[list[Piece]]:
    """Returns the prompt and each response of a comparison in pieces as small as tokens and characters allow."""
    tokens = table[index]
    prompt = (tokens.prompt, np.zeros(len(tokens.prompt), bool), np.ones(len(tokens.prompt)))
    responses = [(ids, tokens.mask(p), tokens.weights_of(p)) for p, ids in enumerate(tokens.responses)]
    return [_pieces(*part, tokenizer) for part in (prompt, *responses)]


def _pieces(ids: np.ndarray, scored: np.ndarray, weights: np.ndarray, tokenizer: Any) -> list[Piece]:
    """Returns the pieces of a prompt or response; a piece of several tokens is as its last one."""
    texts = list(_texts(ids.tolist(), tokenizer))
    weight = [float(weights[end - 1]) for _, end in texts]
    last = [i + 1 == len(weight) or weight[i + 1] != one for i, one in enumerate(weight)]
    weighted = any(one != 1 for one in weight)
    marks = [f"×{one:g}" if weighted and ends else "" for one, ends in zip(weight, last, strict=True)]
    return [Piece(text, bool(scored[end - 1]), mark) for (text, end), mark in zip(texts, marks, strict=True)]


def _texts(ids: list[int], tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Yields texts that join to the decoded ids, and the number of ids up to the end of each.

    Prefixes are decoded, and not single tokens: some tokenizers drop the space before the first token.
    """
    before, start = "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        # A token may hold only some bytes of a character, which then decodes to U+FFFD until its other bytes follow.
        if not text.endswith("\ufffd") or end == len(ids) or end - start == 8:
            yield text[len(before) :], end
            before, start = text, end
