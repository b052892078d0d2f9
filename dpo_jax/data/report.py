"""The report on what encoding did to the data: comparisons read, dropped, truncated, and lengths."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.truncate import Ids
from dpo_jax.errors import UserError


class NothingLeftError(UserError):
    """No comparison is left to encode."""


class LengthQuantiles(NamedTuple):
    """Statistics of lengths in tokens."""

    mean: float
    p50: float
    p99: float
    max: int

    def __str__(self) -> str:
        return f"mean {self.mean:.1f}, p50 {self.p50:g}, p99 {self.p99:g}, max {self.max}"


class WeightedResponses(NamedTuple):
    """Kept responses with token weights other than 1, among all; the mean weight of their tokens."""

    weighted: int
    responses: int
    mean: float

    def __str__(self) -> str:
        return f"{self.weighted:,} of {self.responses:,} responses, mean {self.mean:.4g}"


class EncodeReport(NamedTuple):
    """Counts of what encoding did. The unit is comparisons unless an attribute says otherwise.

    Attributes:
      read, kept: comparisons before and after.
      bad_skipped: bad examples that were skipped, as `skip_bad_rows` allows.
      empty_dropped, identical_dropped, misplaced_dropped: dropped for an empty response, for identical responses, or
        for a response that belongs to another dialogue. The first fault in this order counts.
      empty_kept, identical_kept, misplaced_kept: kept despite that fault, with `degenerate: keep`.
      prompt_too_long_dropped: dropped because the prompt alone fills max_length, with `keep_start`.
      unweighted_dropped: dropped because truncation left a response no token with a weight above 0.
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
      token_weights: responses with token weights.
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
    unweighted_dropped: int
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
    token_weights: WeightedResponses
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
            "dropped: truncation left a response no token with a weight above 0": self.unweighted_dropped,
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
            *([f"token weights: {self.token_weights}"] if self.token_weights.weighted else []),
        ]


class EncodeTally:
    """Running counts for an `EncodeReport`. Its size does not grow with the number of comparisons.

    With `keep_errors` it also keeps the error of each bad example, in `errors`.
    """

    def __init__(self, keep_errors: bool = False):
        self.errors: list[UserError] = []
        self._keep_errors = keep_errors
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.spans: dict[str, Counter[int]] = {name: Counter() for name in ("prompt", "response", "sequence")}
        self.first_bad = ""
        self._weighted: Counter[str] = Counter()  # responses with token weights, their tokens, the sum of the weights

    def bad(self, error: UserError, most: int) -> None:
        """Counts a bad example; raises its error once there are more than `most`."""
        self.counts["bad_skipped"] += 1
        self.first_bad = self.first_bad or str(error)
        if self._keep_errors:
            self.errors.append(error)
        if self.counts["bad_skipped"] > most:
            raise UserError(f"{error} (bad example {most + 1}; data.skip_bad_rows is {most})") if most else error

    def count_truncated(self, before: tuple[Ids, list[Ids]], after: tuple[Ids, list[Ids]]) -> None:
        """Counts what truncation has cut off a prompt and its responses."""
        if after[0] is not before[0]:
            self.counts["prompts_truncated"] += len(after[0]) < len(before[0])
        if after[1] is before[1]:
            return
        shorter = [len(now) < len(then) for then, now in zip(before[1], after[1], strict=True)]
        if any(shorter):
            self.counts["responses_truncated"] += sum(shorter)
            present = [response.tobytes() for response in after[1] if response]
            self.counts["identical_after_truncation"] += len(set(present)) < len(present)

    def keep(
        self,
        prompt: Sequence[int],
        responses: Sequence[Sequence[int]],
        unscored: int = 0,
        token_weights: Sequence[np.ndarray] = (),
    ) -> None:
        """Counts a kept comparison: its ids after truncation, unscored tokens of responses, weights of their tokens."""
        sizes = [len(response) for response in responses if len(response)]
        self.counts["kept"] += 1
        self.counts["tokens"] += len(prompt) + sum(sizes)
        self.counts["scored"] += sum(sizes) - unscored
        self.spans["prompt"][len(prompt)] += 1
        for size in sizes:
            self.spans["response"][size] += 1
        self.spans["sequence"][len(prompt) + max(sizes)] += 1
        for one in token_weights:
            if (one != 1).any():
                self._weighted.update({"responses": 1, "tokens": len(one), "sum": float(one.sum())})  # type: ignore

    def found(self) -> dict[str, int]:
        """Returns the counts that are not 0, by name."""
        return {name: count for name, count in {**self.counts, **self.notes}.items() if count}

    def report(self) -> EncodeReport:
        """Returns the counts so far as a report."""
        spans: dict[str, Any] = {name: _length_quantiles(lengths) for name, lengths in self.spans.items()}
        found = self._weighted
        weights = found["responses"], self.spans["response"].total(), found["sum"] / max(found["tokens"], 1)
        others = {"token_weights": WeightedResponses(*weights), "notes": dict(self.notes), "first_bad": self.first_bad}
        counts = {name: self.counts[name] for name in EncodeReport._fields if name not in (*spans, *others)}
        return EncodeReport(**counts, **spans, **others)


def _length_quantiles(counts: Counter[int]) -> LengthQuantiles:
    """Returns mean, linearly interpolated percentiles and maximum of a histogram: length -> how often it occurs."""
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values])
    places = np.array([0.5, 0.99]) * (ends[-1] - 1)
    low, high = (values[np.searchsorted(ends, side(places), "right")] for side in (np.floor, np.ceil))
    p50, p99 = low + (high - low) * (places - np.floor(places))
    mean = sum(value * count for value, count in counts.items()) / ends[-1]
    return LengthQuantiles(float(mean), float(p50), float(p99), int(values[-1]))
