"""The tokenised data as flat arrays, which a run maps from disk instead of reading them, and the report on them."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.records import Array, Tokens

# The arrays of a table: their types and numbers of axes.
KINDS = {
    "ids": (np.dtype(np.int32), 1),
    "offsets": (np.dtype(np.int64), 2),
    "weights": (np.dtype(np.float32), 1),
    "prompts": (np.dtype(np.uint64), 1),
    "preferences": (np.dtype(np.float32), 1),
    "scores": (np.dtype(np.float32), 2),
}


@dataclass(frozen=True, eq=False)
class Table:
    """N comparisons of P responses each, end to end.

    Attributes:
      ids: int32[total], for each comparison its prompt and then its responses, best first.
      offsets: int64[N, P + 2]; the prompt of i is `ids[offsets[i, 0]:offsets[i, 1]]`, its response p is
        `ids[offsets[i, p + 1]:offsets[i, p + 2]]`, empty where it is absent.
      weights: float32[N], multiply the losses.
      prompts: uint64[N], equal where the prompts are, as they were before any cut.
      preferences: float32[N], the probability that the first response is the better one.
      scores: float32[N, P], ratings of the responses; 0 where there is none.
    """

    ids: Array
    offsets: Array
    weights: Array
    prompts: Array
    preferences: Array
    scores: Array

    @classmethod
    def of(cls, tokens: Iterable[Tokens]) -> "Table":
        """Lays comparisons that are token ids already, all of one P, end to end.

        Raises:
          ValueError: there are none, or a prompt has no token, or none of its responses has.
        """
        tokens = list(tokens)
        sizes = [[len(one.prompt), *map(len, one.responses)] for one in tokens]
        if not sizes or not all(prompt and any(responses) for prompt, *responses in sizes):
            raise ValueError("a table needs comparisons, each with at least one token in its prompt and a response")
        return cls(
            ids=np.concatenate([part for one in tokens for part in (one.prompt, *one.responses)]).astype(np.int32),
            offsets=offsets_of(sizes),
            weights=np.array([one.weight for one in tokens], np.float32),
            prompts=np.array([one.prompt_key for one in tokens], np.uint64),
            preferences=np.array([one.preference for one in tokens], np.float32),
            scores=np.array([one.scores or (0.0,) * len(one.responses) for one in tokens], np.float32),
        )

    def take(self, rows: Array) -> "Table":
        """The comparisons of some rows, int[n], n >= 1, in that order, as a table in memory."""
        return Table.of(self[int(row)] for row in rows)

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
        )

    @property
    def responses(self) -> int:
        """P, the number of responses to a prompt."""
        return self.offsets.shape[1] - 2

    @property
    def prompt_lengths(self) -> Array:
        """int64[N], tokens of each prompt."""
        return self.offsets[:, 1] - self.offsets[:, 0]

    @property
    def response_lengths(self) -> Array:
        """int64[N, P], tokens of each response, EOS included; 0 where it is absent."""
        return np.diff(self.offsets[:, 1:], axis=1)

    @property
    def scored_lengths(self) -> Array:
        """int64[N], scored tokens of each comparison: those of all its responses."""
        return self.offsets[:, -1] - self.offsets[:, 1]

    def lengths(self) -> Array:
        """int64[N], tokens that each comparison takes in a row: the last of every response is only predicted."""
        return self.offsets[:, -1] - self.offsets[:, 0] - (self.response_lengths > 0).sum(axis=1)

    @functools.cached_property
    def digest(self) -> str:
        """Hexadecimal blake2b of ids and offsets: what log-probs depend on. Weights are not part of it."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.offsets):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """Maps a saved table into memory, read-only.

        Raises:
          OSError, ValueError, EOFError: a file is missing, or is not an array of the right kind.
        """
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in KINDS}
        kinds = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
        if kinds != KINDS or len({len(array) for name, array in arrays.items() if name != "ids"}) > 1:
            raise ValueError(f"{folder} holds no table: arrays {kinds}")
        return cls(**arrays)


class LengthQuantiles(NamedTuple):
    """Statistics of lengths in tokens."""

    mean: float
    p50: float
    p99: float
    max: int

    def __str__(self) -> str:
        return f"mean {self.mean:.1f}, p50 {self.p50:g}, p99 {self.p99:g}, max {self.max}"


class EncodeReport(NamedTuple):
    """What became of the comparisons: all counts are of comparisons unless they say otherwise.

    Attributes:
      read, kept: before and after.
      bad_skipped: rows that cannot be used, under `skip_bad_rows`.
      empty_dropped, identical_dropped, misplaced_dropped: with an empty response; else with two identical ones; else
        with one that belongs to some other dialogue.
      empty_kept, identical_kept, misplaced_kept: the same, under `degenerate: keep`.
      prompt_too_long_dropped: whose prompt alone fills max_length, under `keep_start`.
      prompts_truncated: prompts that were cut.
      responses_truncated: responses (not comparisons) that were cut, and so have lost their EOS.
      identical_after_truncation: kept ones whose responses have become the same; their loss teaches nothing.
      boundary_moved: with a token that spans the end of the prompt, under `boundary: joint`.
      unknown_tokens: tokens (not comparisons) that stand for text which the tokenizer cannot write.
      eos_added: conversations whose template does not end a response with EOS, so that it was added.
      tokens, scored: ids stored, the prompt once; those of them in responses.
      prompt, response, whole: lengths of kept prompts, of kept responses, of prompt and longest response together.
      notes: what else was counted, by the source.
      first_bad: why the first bad row cannot be used.
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
    whole: LengthQuantiles
    notes: dict[str, int]
    first_bad: str

    def lines(self) -> list[str]:
        """The report as lines of plain text; counts of nothing are left out, except the first line's."""
        notes = {
            f"bad rows left out; the first: {self.first_bad}": self.bad_skipped,
            **self.notes,
            "dropped, with an empty response": self.empty_dropped,
            "dropped, with identical responses": self.identical_dropped,
            "dropped, whose rejected transcript does not start with the prompt": self.misplaced_dropped,
            "dropped, whose prompt alone fills max_length": self.prompt_too_long_dropped,
            "kept, with an empty response": self.empty_kept,
            "kept, with identical responses": self.identical_kept,
            "kept, whose rejected transcript does not start with the prompt": self.misplaced_kept,
            "prompts cut": self.prompts_truncated,
            "responses cut, their EOS lost": self.responses_truncated,
            "kept, with responses that are identical after the cut": self.identical_after_truncation,
            "with a token that spans the end of the prompt, and goes with the response": self.boundary_moved,
            "tokens that are the tokenizer's <unk>: text which it cannot write": self.unknown_tokens,
            "whose chat template does not end a response with EOS, which was added": self.eos_added,
        }
        spans = {"prompt": self.prompt, "response": self.response, "prompt and longest response": self.whole}
        return [
            f"{self.read:,} comparisons read, {self.kept:,} kept: {self.tokens:,} tokens, {self.scored:,} scored",
            *(f"{count:,} {note}" for note, count in notes.items() if count),
            *(f"tokens in a {name}: {span}" for name, span in spans.items()),
        ]


class EncodeTally:
    """Counts of what becomes of comparisons, kept while they pass; its size does not grow with their number."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.spans: dict[str, Counter[int]] = {name: Counter() for name in ("prompt", "response", "whole")}
        self.first_bad = ""

    def bad(self, error: UserError, most: int) -> None:
        """Counts a row that cannot be used; raises its error where there are more of them than may be."""
        self.counts["bad_skipped"] += 1
        self.first_bad = self.first_bad or str(error)
        if self.counts["bad_skipped"] > most:
            raise UserError(f"{error} (bad row {most + 1}; data.skip_bad_rows is {most})") if most else error

    def keep(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        """Counts a comparison that is kept, as cut."""
        sizes = [len(response) for response in responses if len(response)]
        self.counts.update(kept=1, tokens=len(prompt) + sum(sizes), scored=sum(sizes))
        self.spans["prompt"][len(prompt)] += 1
        self.spans["response"].update(sizes)
        self.spans["whole"][len(prompt) + max(sizes)] += 1

    def found(self) -> dict[str, int]:
        """The counts that are not 0."""
        return {name: count for name, count in {**self.counts, **self.notes}.items() if count}

    def report(self) -> EncodeReport:
        """What was counted."""
        spans: dict[str, Any] = {name: _lengths(lengths) for name, lengths in self.spans.items()}
        counts = {
            name: self.counts[name] for name in EncodeReport._fields if name not in (*spans, "notes", "first_bad")
        }
        return EncodeReport(**counts, **spans, notes=dict(self.notes), first_bad=self.first_bad)


def _lengths(counts: Counter[int]) -> LengthQuantiles:
    """Mean, percentiles (between two values, in proportion) and maximum of values by how often each occurs."""
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values])
    places = np.array([0.5, 0.99]) * (ends[-1] - 1)
    low, high = (values[np.searchsorted(ends, side(places), "right")] for side in (np.floor, np.ceil))
    p50, p99 = low + (high - low) * (places - np.floor(places))
    mean = sum(value * count for value, count in counts.items()) / ends[-1]
    return LengthQuantiles(float(mean), float(p50), float(p99), int(values[-1]))


def offsets_of(sizes: Sequence[Sequence[int]]) -> Array:
    """`Table.offsets`, int64[N, P + 2], of the lengths of [prompt, response 1, ...] of N comparisons end to end."""
    ends = np.cumsum(np.array(sizes, np.int64)).reshape(len(sizes), -1)
    starts = np.concatenate([[0], ends[:-1, -1]])
    return np.concatenate([starts[:, None], ends], axis=1)
