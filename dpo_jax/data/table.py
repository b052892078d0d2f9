"""Tokenized comparisons as flat arrays, which a run memory-maps, and the report on what encoding did to them."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, UInt64

from dpo_jax.errors import UserError
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
}


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
        assistant in a response of several turns.
    """

    ids: Int32[np.ndarray, " total"]
    offsets: Int64[np.ndarray, "N P+2"]
    weights: Float32[np.ndarray, " N"]
    prompts: UInt64[np.ndarray, " N"]
    preferences: Float32[np.ndarray, " N"]
    scores: Float32[np.ndarray, "N P"]
    unscored: Int64[np.ndarray, " m"]

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
        return cls(
            ids=np.concatenate([part for one in tokens for part in (one.prompt, *one.responses)]).astype(np.int32),
            offsets=offsets,
            weights=np.array([one.weight for one in tokens], np.float32),
            prompts=np.array([one.prompt_key for one in tokens], np.uint64),
            preferences=np.array([one.preference for one in tokens], np.float32),
            scores=np.array([one.scores or (0.0,) * len(one.responses) for one in tokens], np.float32),
            unscored=_unscored([one.scored for one in tokens], offsets),
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
        """blake2b of `ids`, `offsets` and `unscored` in hexadecimal: a key for log-probs, which depend on no more.

        The dtype and shape of each array are hashed too, so that no two pairs of arrays have the same bytes.
        """
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.offsets, *([self.unscored] if len(self.unscored) else [])):
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
        if kinds != KINDS or len({len(a) for name, a in arrays.items() if name not in ("ids", "unscored")}) > 1:
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


class LengthQuantiles(NamedTuple):
    """Statistics of lengths in tokens."""

    mean: float
    p50: float
    p99: float
    max: int

    def __str__(self) -> str:
        return f"mean {self.mean:.1f}, p50 {self.p50:g}, p99 {self.p99:g}, max {self.max}"


class EncodeReport(NamedTuple):
    """Counts of what encoding did. The unit is comparisons unless an attribute says otherwise.

    Attributes:
      read, kept: comparisons before and after.
      bad_skipped: bad examples that were skipped, as `skip_bad_rows` allows.
      empty_dropped, identical_dropped, misplaced_dropped: dropped for an empty response, for identical responses, or
        for a response that belongs to another dialogue. The first fault in this order counts.
      empty_kept, identical_kept, misplaced_kept: kept despite that fault, with `degenerate: keep`.
      prompt_too_long_dropped: dropped because the prompt alone fills max_length, with `keep_start`.
      prompts_truncated: prompts that were truncated.
      responses_truncated: responses (not comparisons) that were truncated and so lost their EOS.
      identical_after_truncation: kept ones whose responses became identical; their loss teaches nothing.
      boundary_moved: ones with a token that spans the end of the prompt, with `boundary: joint`.
      unknown_tokens: tokens (not comparisons) that are the tokenizer's <unk>.
      eos_added: conversations whose chat template does not end a response with EOS, so that EOS was appended.
      tokens: all token ids of the table.
      scored: token ids in responses.
      prompt, response: lengths of kept prompts and of kept responses.
      sequence: lengths of kept prompts with their longest response, which max_length limits.
      notes: further counts by the source: text -> number.
      first_bad: the error of the first bad example.
    """

    read: int
    kept: int
    bad_skipped: int
    empty_dropped: int
    identical_dropped: int
    misplaced_dropped: int
    empty_kept: int
    identical_kept: int
    misplaced_kept: int
    prompt_too_long_dropped: int
    prompts_truncated: int
    responses_truncated: int
    identical_after_truncation: int
    boundary_moved: int
    unknown_tokens: int
    eos_added: int
    tokens: int
    scored: int
    prompt: LengthQuantiles
    response: LengthQuantiles
    sequence: LengthQuantiles
    notes: dict[str, int]
    first_bad: str

    def lines(self) -> list[str]:
        """Returns the report as lines of text, without counts that are 0."""
        notes = {
            f"bad examples skipped; the first: {self.first_bad}": self.bad_skipped,
            **self.notes,
            "dropped: an empty response": self.empty_dropped,
            "dropped: identical responses": self.identical_dropped,
            "dropped: the rejected transcript does not start with the prompt": self.misplaced_dropped,
            "dropped: the prompt alone fills max_length": self.prompt_too_long_dropped,
            "kept despite an empty response": self.empty_kept,
            "kept despite identical responses": self.identical_kept,
            "kept despite a rejected transcript that does not start with the prompt": self.misplaced_kept,
            "prompts truncated": self.prompts_truncated,
            "responses truncated (they lose their EOS)": self.responses_truncated,
            "kept with responses that are identical after truncation": self.identical_after_truncation,
            "with a token that spans the end of the prompt; it was moved to the response": self.boundary_moved,
            "tokens are <unk>: the tokenizer has no token for that text": self.unknown_tokens,
            "with a chat template that does not end a response with EOS; EOS was appended": self.eos_added,
        }
        spans = {"prompt": self.prompt, "response": self.response, "prompt with longest response": self.sequence}
        return [
            f"{self.read:,} comparisons read, {self.kept:,} kept: {self.tokens:,} tokens, {self.scored:,} scored",
            *(f"{count:,} {note}" for note, count in notes.items() if count),
            *(f"tokens per {name}: {span}" for name, span in spans.items()),
        ]


class EncodeTally:
    """Running counts for an `EncodeReport`. Its size does not grow with the number of comparisons."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.spans: dict[str, Counter[int]] = {name: Counter() for name in ("prompt", "response", "sequence")}
        self.first_bad = ""

    def bad(self, error: UserError, most: int) -> None:
        """Counts a bad example; raises its error once there are more than `most`."""
        self.counts["bad_skipped"] += 1
        self.first_bad = self.first_bad or str(error)
        if self.counts["bad_skipped"] > most:
            raise UserError(f"{error} (bad example {most + 1}; data.skip_bad_rows is {most})") if most else error

    def keep(self, prompt: Sequence[int], responses: Sequence[Sequence[int]], unscored: int = 0) -> None:
        """Counts a comparison that is kept, with the ids it has after truncation and those that are not scored."""
        sizes = [len(response) for response in responses if len(response)]
        self.counts.update(kept=1, tokens=len(prompt) + sum(sizes), scored=sum(sizes) - unscored)
        self.spans["prompt"][len(prompt)] += 1
        self.spans["response"].update(sizes)
        self.spans["sequence"][len(prompt) + max(sizes)] += 1

    def found(self) -> dict[str, int]:
        """Returns the counts that are not 0, by name."""
        return {name: count for name, count in {**self.counts, **self.notes}.items() if count}

    def report(self) -> EncodeReport:
        """Returns the counts so far as a report."""
        spans: dict[str, Any] = {name: _length_quantiles(lengths) for name, lengths in self.spans.items()}
        counts = {
            name: self.counts[name] for name in EncodeReport._fields if name not in (*spans, "notes", "first_bad")
        }
        return EncodeReport(**counts, **spans, notes=dict(self.notes), first_bad=self.first_bad)


def _length_quantiles(counts: Counter[int]) -> LengthQuantiles:
    """Returns mean, linearly interpolated percentiles and maximum of a histogram: length -> how often it occurs."""
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values])
    places = np.array([0.5, 0.99]) * (ends[-1] - 1)
    low, high = (values[np.searchsorted(ends, side(places), "right")] for side in (np.floor, np.ceil))
    p50, p99 = low + (high - low) * (places - np.floor(places))
    mean = sum(value * count for value, count in counts.items()) / ends[-1]
    return LengthQuantiles(float(mean), float(p50), float(p99), int(values[-1]))
