"""Rows to batches: several comparisons laid end to end in rows of one fixed length, each prompt once.

A comparison lies in a row as [prompt | response 1 | ... | response P]. The last token of a response is not in the
row, for its hidden state would predict nothing; so a comparison takes n_prompt + sum(n_p - 1) tokens. Positions
continue from the prompt in every branch, and the first token of every response is predicted by the prompt's last.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Array, Batch, Tokens

MICROBATCH_TOKENS = 4096
LENGTH_UNIT = 128
SHORT_LENGTH = 512
SCORED_UNIT = 64
SCORED_SLACK = 1.15
SIMULATED_STEPS = 64
# Measured for causal attention in query chunks: rows of 1024 cost 9% more for each token than rows of 512.
ATTENTION_COST = 1 / 5100
# The output head's work for a scored token, over the layers' work for a token (GPT-2: 0.45, large models less).
HEAD_COST = 0.3
# What a microbatch costs beside its tokens (gradients are added up, parameters read again), in tokens.
MICROBATCH_COST = 128


class Layout(NamedTuple):
    """The fixed sizes of a batch, so that a step is compiled once.

    Attributes:
      microbatches: M, the most that a batch can need.
      rows: R, rows in a microbatch.
      length: T, tokens in a row.
      segments: G, the most comparisons in a row.
      scored: S, the most scored tokens in a row.
      own: (first, end) of the rows of a microbatch that this process builds; None for all.
    """

    microbatches: int
    rows: int
    length: int
    segments: int
    scored: int
    own: tuple[int, int] | None = None


def choose_layout(
    table: Table,
    *,
    max_length: int,
    batch_size: int,
    rows: int | None = None,
    length: int | None = None,
    multiple_of: int = 1,
) -> Layout:
    """The shape with the least expected cost for batches drawn from a table.

    Row lengths up to 2 * max_length, where every pair fits (up to 512 if that is more; longer only if the table needs
    it), are tried on simulated steps, each with the numbers of rows that make a microbatch of at most 4096 tokens on
    each device, or of one row.

    Args:
      table: the data.
      max_length: tokens of a prompt with any one response.
      batch_size: comparisons in a step.
      rows, length: R and T, where the user sets them.
      multiple_of: devices that share the rows; R is a multiple of it.

    Raises:
      UserError: a row length is too short for the data, or `rows` cannot be shared evenly.
    """
    longest = int(table.lengths().max())
    if length is not None and length < longest:
        raise UserError(f"data.row_length {length} is shorter than the longest comparison, {longest} tokens; raise it")
    if rows is not None and (rows < 1 or rows % multiple_of):
        raise UserError(f"{rows} rows in a microbatch cannot be shared by {multiple_of} devices; give a multiple")
    best, least = None, math.inf
    for size in [length] if length is not None else _row_lengths(longest, max_length):
        draft = Layout(batch_size, 1, size, _groups(table, size, batch_size), _scored(table, size))
        needed = np.array([len(plan_rows(*step, draft)) for step in _simulated(table, batch_size)])
        for count in [rows] if rows is not None else _row_counts(size, batch_size, multiple_of):
            microbatches = np.ceil(needed / count)
            row_cost = size * (1 + size * ATTENTION_COST) + draft.scored * HEAD_COST
            tokens = count * row_cost + MICROBATCH_COST * multiple_of
            if (cost := float(microbatches.mean()) * tokens) < least:
                best, least = draft._replace(microbatches=math.ceil(batch_size / count), rows=count), cost
    assert best is not None, "there is always a row length and a number of rows to try"
    return best


def plan_rows(lengths: Array, scored: Array, shape: Layout) -> list[list[int]]:
    """Which comparisons share a row: first-fit decreasing by length under the budgets T, S and G.

    Args:
      lengths: int[B], tokens each comparison takes in a row.
      scored: int[B], tokens of its responses.
      shape: the budgets.

    Returns:
      One list of indices into the batch for each row, a function of the lengths alone: every host finds the same.

    Raises:
      UserError: a comparison exceeds a budget on its own.
    """
    lengths, scored = np.asarray(lengths), np.asarray(scored)
    if len(lengths) and (lengths.max() > shape.length or scored.max() > shape.scored):
        raise UserError(
            f"a comparison of {lengths.max()} tokens ({scored.max()} scored) does not fit rows of {shape.length} "
            f"({shape.scored} scored); raise data.row_length"
        )
    rows: list[list[int]] = []
    tokens, scores, places = (np.full(len(lengths), size) for size in (shape.length, shape.scored, shape.segments))
    for index in np.argsort(-lengths, kind="stable"):
        fits = (tokens >= lengths[index]) & (scores >= scored[index]) & (places > 0)
        row = int(fits.argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(int(index))
        tokens[row] -= lengths[index]
        scores[row] -= scored[index]
        places[row] -= 1
    return rows


def build_batch(
    table: Table, indices: Sequence[int] | Array, shape: Layout, ref_logps: Array | None = None
) -> tuple[Batch, int, Array]:
    """Lays the comparisons of a step out in microbatches of rows.

    Args:
      table: the data.
      indices: int[B], rows of the table.
      shape: the fixed sizes.
      ref_logps: float32[N, P, 2] by row of the table, or none.

    Returns:
      The batch, every field with leading axes [M, R], or only the process's own rows of R; the number of microbatches
      in use, at the front; and int64[B, 3], the microbatch, row of R and place of each comparison, the same in every
      process. `ref_logps` is NaN where nothing is known.

    Raises:
      UserError: a comparison does not fit the shape.
      ValueError: there are more comparisons than the shape holds.
    """
    indices = np.asarray(indices, np.int64)
    batch = _empty(shape, table.responses)
    rows = plan_rows(table.lengths()[indices], table.scored_lengths[indices], shape)
    if len(rows) > shape.microbatches * shape.rows:
        raise ValueError(f"{len(indices)} comparisons take {len(rows)} rows, more than {shape} has")
    places = np.zeros((len(indices), 3), np.int64)
    start, end = shape.own or (0, shape.rows)
    for number, members in enumerate(rows):
        microbatch, row = divmod(number, shape.rows)
        for place, member in enumerate(members):
            places[member] = (microbatch, row, place)
        if start <= row < end:
            fields = Batch(*(field[microbatch, row - start] for field in batch))
            _fill(fields, [table[int(indices[member])] for member in members])
            if ref_logps is not None:
                fields.ref_logps[: len(members)] = ref_logps[indices[members]]
    return batch, -(-len(rows) // shape.rows), places


def unpack_batch(values: Array, places: Array) -> Array:
    """Values by place, [M, R, G, ...], as values by comparison, [B, ...], in the order that `build` was given."""
    return np.asarray(values)[tuple(places.T)]


def _fill(row: Batch, members: list[Tokens]) -> None:
    """Writes comparisons into the fields of one row, from the front."""
    token = score = 0
    for place, member in enumerate(members):
        start, size = token, len(member.prompt)
        _span(row, token, member.prompt, 0, place + 1, 0)
        token += size
        for number, response in enumerate(member.responses):
            if not len(response):  # absent: it takes no place
                continue
            end = score + len(response)
            row.source[score] = start + size - 1
            row.source[score + 1 : end] = np.arange(token, token + len(response) - 1)
            row.target[score:end] = response
            row.slot[score:end] = place * len(member.responses) + number
            _span(row, token, response[:-1], size, place + 1, number + 1)
            token, score = token + len(response) - 1, end
        row.weights[place], row.preference[place], row.scores[place] = member.weight, member.preference, member.scores


def _span(row: Batch, start: int, ids: Array, position: int, segment: int, branch: int) -> None:
    span = slice(start, start + len(ids))
    row.tokens[span] = ids
    row.positions[span] = np.arange(position, position + len(ids))
    row.segment_ids[span] = segment
    row.branch_ids[span] = branch


def _empty(shape: Layout, responses: int) -> Batch:
    start, end = shape.own or (0, shape.rows)
    lead = (shape.microbatches, end - start)
    tokens, positions, segment_ids, branch_ids = (np.zeros((*lead, shape.length), np.int32) for _ in range(4))
    source, target = (np.zeros((*lead, shape.scored), np.int32) for _ in range(2))
    slot = np.full((*lead, shape.scored), -1, np.int32)
    weights, preference = (np.zeros((*lead, shape.segments), np.float32) for _ in range(2))
    scores = np.zeros((*lead, shape.segments, responses), np.float32)
    ref_logps = np.full((*scores.shape, 2), np.nan, np.float32)
    return Batch(
        tokens, positions, segment_ids, branch_ids, source, target, slot, weights, preference, scores, ref_logps
    )


def _row_lengths(longest: int, max_length: int) -> list[int]:
    """Powers of two and their halves between, in units of 128, from the longest comparison up."""
    top = _round_up(max(2 * max_length, longest, SHORT_LENGTH), LENGTH_UNIT)
    steps = sorted({k << n for n in range(top.bit_length()) for k in (2, 3)} | {1})
    sizes = [LENGTH_UNIT * step for step in steps if longest <= LENGTH_UNIT * step <= top]
    return sizes or [_round_up(longest, LENGTH_UNIT)]


def _row_counts(length: int, batch_size: int, multiple_of: int) -> range:
    """Multiples of the devices, up to a microbatch's tokens on each of them and to a row for each comparison."""
    most = max(1, min(MICROBATCH_TOKENS // length, math.ceil(batch_size / multiple_of)))
    return range(multiple_of, most * multiple_of + 1, multiple_of)


def _scored(table: Table, length: int) -> int:
    """S: what a full row scores on average and some more, for the head's cost is proportional to it."""
    usual = SCORED_SLACK * length * float(table.scored_lengths.sum()) / float(table.lengths().sum())
    return _round_up(max(int(table.scored_lengths.max()), math.ceil(usual)), SCORED_UNIT)


def _groups(table: Table, length: int, batch_size: int) -> int:
    """G: twice the comparisons of a full row of average ones; places are cheap, and short ones flock together."""
    return max(1, min(batch_size, math.ceil(2 * length / float(table.lengths().mean())), length))


def _simulated(table: Table, batch_size: int) -> list[tuple[Array, Array]]:
    """(lengths, scored) of some batches drawn from the table, always the same ones."""
    lengths, scored = table.lengths(), table.scored_lengths
    random = np.random.default_rng(0)
    draws = [random.integers(len(table), size=batch_size) for _ in range(SIMULATED_STEPS)]
    return [(lengths[draw], scored[draw]) for draw in draws]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
