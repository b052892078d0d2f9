"""Tokenized comparisons as flat arrays, which a run memory-maps."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, UInt64

from dpo_jax.records import Tokens

# The arrays of a table: dtype and number of axes of each.
KINDS = {
    "ids": (np.dtype(np.int32), 1),
    "offsets": (np.dtype(np.int64), 2),
    "weights": (np.dtype(np.float32), 1),
    "prompts": (np.dtype(np.uint64), 1),
    "preferences": (np.dtype(np.float32), 1),
    "scores": (np.dtype(np.float32), 2),
    "unscored": (np.dtype(np.int64), 1),
    "weighted": (np.dtype(np.int64), 1),
    "token_weights": (np.dtype(np.float32), 1),
}
PLACES = ("unscored", "weighted")  # arrays of places in `ids`


@dataclass(frozen=True, eq=False)
class Table:
    """N comparisons of P responses each, concatenated in flat arrays.

    Attributes:
      ids: int32[total], the token ids of each comparison: its prompt, then its responses, best first.
      offsets: int64[N, P + 2], the boundaries in `ids`. Comparison i has its prompt at
        `ids[offsets[i, 0]:offsets[i, 1]]` and response p at `ids[offsets[i, p + 1]:offsets[i, p + 2]]`; the slice of an
        absent response is empty.
      weights: float32[N], multiply the losses.
      prompts: uint64[N], prompt keys: equal for equal prompts before truncation.
      preferences: float32[N], the probability that the first response is the better one.
      scores: float32[N, P], ratings of the responses; 0 without ratings.
      unscored: int64[m], places in `ids` of response tokens that are not scored, ascending: turns of others than the
        assistant in a response of several turns, or tokens of weight 0.
      weighted: int64[w], places in `ids` of response tokens whose weight is not 1, ascending.
      token_weights: float32[w], their weights.
    """

    ids: Int32[np.ndarray, " total"]
    offsets: Int64[np.ndarray, "N P+2"]
    weights: Float32[np.ndarray, " N"]
    prompts: UInt64[np.ndarray, " N"]
    preferences: Float32[np.ndarray, " N"]
    scores: Float32[np.ndarray, "N P"]
    unscored: Int64[np.ndarray, " m"]
    weighted: Int64[np.ndarray, " w"]
    token_weights: Float32[np.ndarray, " w"]

    @classmethod
    def of(cls, tokens: Iterable[Tokens]) -> "Table":
        """Returns tokenized comparisons, all with the same P, as a table in memory.

        Raises:
          ValueError: there are no comparisons, a prompt is empty, or all responses of a comparison are.
        """
        tokens = list(tokens)
        sizes = [[len(one.prompt), *map(len, one.responses)] for one in tokens]
        if not sizes or not all(prompt and any(responses) for prompt, *responses in sizes):
            raise ValueError("a table needs comparisons, each with at least one token in its prompt and a response")
        offsets = offsets_of(sizes)
        weighted, token_weights = _weighted([one.token_weights for one in tokens], offsets)
        return cls(
            ids=np.concatenate([part for one in tokens for part in (one.prompt, *one.responses)]).astype(np.int32),
            offsets=offsets,
            weights=np.array([one.weight for one in tokens], np.float32),
            prompts=np.array([one.prompt_key for one in tokens], np.uint64),
            preferences=np.array([one.preference for one in tokens], np.float32),
            scores=np.array([one.scores or (0.0,) * len(one.responses) for one in tokens], np.float32),
            unscored=_unscored([one.scored for one in tokens], offsets),
            weighted=weighted,
            token_weights=token_weights,
        )

    def take(self, indices: Int[np.ndarray, " n"]) -> "Table":
        """Returns the comparisons at `indices` (n >= 1), in that order, as a table in memory."""
        return Table.of(self[int(index)] for index in indices)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Tokens:
        prompt, *responses = (self.ids[a:b] for a, b in zip(self.offsets[index], self.offsets[index][1:], strict=False))
        return Tokens(
            prompt,
            tuple(responses),
            float(self.weights[index]),
            int(self.prompts[index]),
            float(self.preferences[index]),
            tuple(self.scores[index].tolist()),
            self._scored(index),
            self._weights(index),
        )

    def _scored(self, index: int) -> tuple[Bool[np.ndarray, " _"], ...]:
        """Returns `Tokens.scored` of a comparison."""
        edges = self.offsets[index, 1:]
        first, last = np.searchsorted(self.unscored, edges[[0, -1]])
        if first == last:
            return ()
        scored = np.ones(edges[-1] - edges[0], bool)
        scored[self.unscored[first:last] - edges[0]] = False
        return tuple(np.split(scored, edges[1:-1] - edges[0]))

    def _weights(self, index: int) -> tuple[Float32[np.ndarray, " _"], ...]:
        """Returns `Tokens.token_weights` of a comparison."""
        edges = self.offsets[index, 1:]
        first, last = np.searchsorted(self.weighted, edges[[0, -1]])
        if first == last:
            return ()
        weights = np.ones(edges[-1] - edges[0], np.float32)
        weights[self.weighted[first:last] - edges[0]] = self.token_weights[first:last]
        return tuple(np.split(weights, edges[1:-1] - edges[0]))

    @property
    def responses(self) -> int:
        """P, the number of responses per prompt."""
        return self.offsets.shape[1] - 2

    @property
    def prompt_lengths(self) -> Int64[np.ndarray, " N"]:
        """int64[N], tokens of each prompt."""
        return self.offsets[:, 1] - self.offsets[:, 0]

    @property
    def response_lengths(self) -> Int64[np.ndarray, "N P"]:
        """int64[N, P], tokens of each response, EOS included; 0 for an absent response."""
        return np.diff(self.offsets[:, 1:], axis=1)

    @property
    def scored_lengths(self) -> Int64[np.ndarray, " N"]:
        """int64[N], scored tokens of each comparison."""
        first, last = np.searchsorted(self.unscored, self.offsets[:, [0, -1]].T)
        return self.offsets[:, -1] - self.offsets[:, 1] - (last - first)

    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Returns int64[N], the tokens that each comparison takes in a row: all but the last one of every response."""
        return self.offsets[:, -1] - self.offsets[:, 0] - (self.response_lengths > 0).sum(axis=1)

    @functools.cached_property
    def digest(self) -> str:
        """blake2b of ids, offsets, unscored and weighted tokens in hexadecimal: a key for log-probs.

        They depend on no more.

        The dtype and shape of each array are hashed too, so that no two pairs of arrays have the same bytes.
        """
        digest = hashlib.blake2b(digest_size=16)
        more = (self.unscored, self.weighted, self.token_weights)
        for array in (self.ids, self.offsets, *(a for a in more if len(a))):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """Memory-maps the table that `cache.write_table` wrote, read-only.

        Raises:
          OSError, ValueError, EOFError: a file is missing, or is not an array of the right dtype and rank.
        """
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in KINDS}
        kinds = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
        flat = ("ids", "token_weights", *PLACES)
        if kinds != KINDS or len({len(a) for name, a in arrays.items() if name not in flat}) > 1:
            raise ValueError(f"{folder} holds no table: arrays {kinds}")
        return cls(**arrays)


def offsets_of(sizes: Sequence[Sequence[int]]) -> Int64[np.ndarray, "N P+2"]:
    """Returns `Table.offsets` for N comparisons, each given as the lengths of [prompt, response 1, ..., response P]."""
    ends = np.cumsum(np.array(sizes, np.int64)).reshape(len(sizes), -1)
    starts = np.concatenate([[0], ends[:-1, -1]])
    return np.concatenate([starts[:, None], ends], axis=1)


def _unscored(scored: Sequence[Sequence[np.ndarray]], offsets: np.ndarray) -> Int64[np.ndarray, " m"]:
    """Returns `Table.unscored` for the `Tokens.scored` of comparisons."""
    found = [
        offsets[i, p + 1] + np.flatnonzero(~mask) for i, masks in enumerate(scored) for p, mask in enumerate(masks)
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _weighted(
    weights: Sequence[Sequence[np.ndarray]], offsets: np.ndarray
) -> tuple[Int64[np.ndarray, " w"], Float32[np.ndarray, " w"]]:
    """Returns `Table.weighted` and `Table.token_weights` for the `Tokens.token_weights` of comparisons."""
    found = [(offsets[i, p + 1], row) for i, rows in enumerate(weights) for p, row in enumerate(rows)]
    places = [start + np.flatnonzero(row != 1) for start, row in found]
    values = [row[row != 1] for _, row in found]
    return np.concatenate([np.zeros(0, np.int64), *places]), np.concatenate([np.zeros(0, np.float32), *values])
