"""Comparisons to batches: several comparisons share a row of fixed length, and each prompt is written once.

A comparison is in a row as [prompt | response 1 | ... | response P]. The last token of a response is not in the row,
because its hidden state would predict nothing that is scored: a comparison takes n_prompt + sum(n_p - 1) tokens.
Positions continue from the prompt in every response, and the prompt's last token predicts the first token of each.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64, Shaped

from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Batch, Tokens

MICROBATCH_TOKENS = 4096  # most tokens in a microbatch on one device, unless a single row has more
LENGTH_UNIT = 128  # row lengths are multiples of it
SHORT_LENGTH = 512  # rows up to this long are tried even if 2 * max_length is shorter
SCORED_UNIT = 64  # the scored tokens of a row are a multiple of it
SCORED_SLACK = 1.15  # scored tokens that a row has room for, over those of a full row on average
SIMULATED_STEPS = 64
# The cost model of `choose_layout`, in units of the layers' cost of one token.
ATTENTION_COST = 1 / 5100  # per token and token of row length; measured: rows of 1024 cost 9% more a token than 512
HEAD_COST = 0.3  # per scored token, the output head (GPT-2: 0.45; less for larger models)
MICROBATCH_COST = 128  # per microbatch and device: adding up gradients, reading the parameters again


class Layout(NamedTuple):
    """The fixed sizes of a batch, so that a step compiles once.

    Attributes:
      microbatches: M, the most microbatches that a batch can need.
      rows: R, rows in a microbatch.
      length: T, tokens in a row.
      segments: G, the most comparisons in a row.
      scored: S, the most scored tokens in a row.
      own: (first, end), the rows of a microbatch that this process builds; None for all.
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
    parts: int = 1,
    most_tokens: int = MICROBATCH_TOKENS,
) -> Layout:
    """Returns the layout with the least expected cost per step for batches sampled from a table.

    Each row length up to 2 * max_length (every pair fits that; longer only if the table needs it) is tried on simulated
    steps with each number of rows that fills a microbatch of up to `most_tokens` per device.

    Args:
      table: the data.
      max_length: most tokens of a prompt with any one response.
      batch_size: comparisons per step.
      rows, length: R and T, if the user sets them.
      multiple_of: devices that share the rows of a microbatch; R is a multiple of it.
      parts: devices that share the tokens of a row; T is then a multiple of `LENGTH_UNIT` * parts.
      most_tokens: in a microbatch on one device, unless a single row has more.

    Raises:
      UserError: `length` is too short for the data, or the devices cannot share `rows` or `length` evenly.
    """
    check_parts(length, parts)
    longest = int(table.lengths().max())
    if length is not None and length < longest:
        raise UserError(f"data.row_length {length} is shorter than the longest comparison, {longest} tokens; raise it")
    check_rows(rows, multiple_of)
    best, least = None, math.inf
    for size in [length] if length is not None else _row_lengths(longest, max_length, LENGTH_UNIT * parts):
        draft = Layout(batch_size, 1, size, _segments(table, size, batch_size), _scored(table, size))
        needed = np.array([len(plan_rows(*step, draft)) for step in _simulated_steps(table, batch_size)])
        each = max(1, most_tokens // (size // parts))  # rows on a device
        for count in [rows] if rows is not None else _row_counts(each, batch_size, multiple_of):
            microbatches = np.ceil(needed / count)
            row_cost = size * (1 + size * ATTENTION_COST) + draft.scored * HEAD_COST
            cost = float(microbatches.mean()) * (count * row_cost / parts + MICROBATCH_COST * multiple_of)
            if cost < least:
                # In the worst case every comparison takes a row of its own.
                best, least = draft._replace(microbatches=math.ceil(batch_size / count), rows=count), cost
    assert best is not None, "there is always a row length and a number of rows to try"
    return best


def check_rows(rows: int | None, devices: int) -> None:
    """Refuses a number of rows set by the user that `devices` cannot share."""
    if rows is not None and (rows < 1 or rows % devices):
        raise UserError(f"data.rows {rows}: {devices} devices share the rows of a microbatch; give a multiple")


def check_parts(length: int | None, parts: int) -> None:
    """Refuses a row length set by the user that `parts` devices cannot share."""
    if length is not None and parts > 1 and length % (LENGTH_UNIT * parts):
        unit = LENGTH_UNIT * parts
        raise UserError(f"data.row_length {length}: with mesh.sequence {parts} give a multiple of {unit}")


def plan_rows(lengths: Int[np.ndarray, " B"], scored: Int[np.ndarray, " B"], layout: Layout) -> list[list[int]]:
    """Returns which comparisons share a row: first-fit decreasing bin packing by length.

    The longest comparison is placed first, each into the first row with room for its tokens (T), its scored tokens (S)
    and one more comparison (G). The plan depends on the arguments alone, so that every process computes the same one
    and builds only its own rows.

    Args:
      lengths: tokens that each comparison takes in a row.
      scored: scored tokens of each comparison.
      layout: the limits of a row.

    Returns:
      For each row, the indices into the batch of its comparisons, in their order in the row.

    Raises:
      UserError: a comparison alone exceeds a limit.
    """
    lengths, scored = np.asarray(lengths), np.asarray(scored)
    if len(lengths) and (lengths.max() > layout.length or scored.max() > layout.scored):
        raise UserError(
            f"a comparison of {lengths.max()} tokens ({scored.max()} scored) does not fit rows of {layout.length} "
            f"({layout.scored} scored); raise data.row_length"
        )
    rows: list[list[int]] = []
    # What is left of each limit in up to B rows. Unopened rows have all of it, so the first fit is never past the next
    # row to open.
    tokens, scores, places = (np.full(len(lengths), size) for size in (layout.length, layout.scored, layout.segments))
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
    table: Table,
    indices: Sequence[int] | Int[np.ndarray, " B"],
    layout: Layout,
    ref_logps: Float32[np.ndarray, "N P 2"] | None = None,
) -> tuple[Batch, int, Int64[np.ndarray, "B 3"]]:
    """Builds the batch of one step.

    Args:
      table: the data.
      indices: the comparisons of the step, as indices of the table; the same one may come several times.
      layout: the fixed sizes.
      ref_logps: reference log-probs of every comparison in the table; None leaves `Batch.ref_logps` NaN.

    Returns:
      The batch; every field has leading axes [M, R], or [M, end - first] with `layout.own`.
      The number of microbatches in use; the others, at the end, are empty.
      int64[B, 3], the place of each comparison: its microbatch, its row of R and its position among the row's G, the
      same in every process.

    Raises:
      UserError: a comparison does not fit a row.
      ValueError: the comparisons need more rows than the layout has.
    """
    indices = np.asarray(indices, np.int64)
    batch = _empty_batch(layout, table.responses, weighted=len(table.weighted) > 0)
    rows = plan_rows(table.lengths()[indices], table.scored_lengths[indices], layout)
    if len(rows) > layout.microbatches * layout.rows:
        raise ValueError(f"{len(indices)} comparisons take {len(rows)} rows, more than {layout} has")
    places = np.zeros((len(indices), 3), np.int64)
    start, end = layout.own or (0, layout.rows)
    for number, members in enumerate(rows):
        microbatch, row = divmod(number, layout.rows)
        for place, member in enumerate(members):
            places[member] = (microbatch, row, place)
        if start <= row < end:
            fields = Batch(*(x if isinstance(x, tuple) else x[microbatch, row - start] for x in batch))
            _fill_row(fields, [table[int(indices[member])] for member in members])
            if ref_logps is not None:
                fields.ref_logps[: len(members)] = ref_logps[indices[members]]
    return batch, -(-len(rows) // layout.rows), places


def unpack_batch(values: Shaped[Any, "M R G ..."], places: Int64[np.ndarray, "B 3"]) -> Shaped[np.ndarray, "B ..."]:
    """Returns values by place in the batch as values by comparison, in the order of `build_batch`'s `indices`."""
    return np.asarray(values)[tuple(places.T)]


def _fill_row(row: Batch, members: list[Tokens]) -> None:
    """Writes comparisons into the fields of one row (views of the batch), one after another from the start."""
    token = score = 0
    for place, member in enumerate(members):
        start, size = token, len(member.prompt)
        _write_span(row, token, member.prompt, 0, place + 1, 0)
        token += size
        for number, response in enumerate(member.responses):
            if not len(response):  # an absent response takes no tokens
                continue
            # The prompt's last token predicts the first token, every other token is predicted by the one before it.
            source = np.arange(token - 1, token + len(response) - 1)
            source[0] = start + size - 1
            kept = member.scored[number] if member.scored else slice(None)
            end = score + len(response[kept])
            row.source[score:end] = source[kept]
            row.target[score:end] = response[kept]
            row.slot[score:end] = place * len(member.responses) + number
            if not isinstance(row.token_weights, tuple):
                row.token_weights[score:end] = member.weights_of(number)[kept]
            _write_span(row, token, response[:-1], size, place + 1, number + 1)
            token, score = token + len(response) - 1, end
        row.weights[place], row.preference[place], row.scores[place] = member.weight, member.preference, member.scores


def _write_span(row: Batch, start: int, ids: np.ndarray, position: int, segment: int, branch: int) -> None:
    span = slice(start, start + len(ids))
    row.tokens[span] = ids
    row.positions[span] = np.arange(position, position + len(ids))
    row.segment_ids[span] = segment
    row.branch_ids[span] = branch


def _empty_batch(layout: Layout, responses: int, weighted: bool) -> Batch:
    start, end = layout.own or (0, layout.rows)
    lead = (layout.microbatches, end - start)
    tokens, positions, segment_ids, branch_ids = (np.zeros((*lead, layout.length), np.int32) for _ in range(4))
    source, target = (np.zeros((*lead, layout.scored), np.int32) for _ in range(2))
    slot = np.full((*lead, layout.scored), -1, np.int32)
    weights, preference = (np.zeros((*lead, layout.segments), np.float32) for _ in range(2))
    scores = np.zeros((*lead, layout.segments, responses), np.float32)
    ref_logps = np.full((*scores.shape, 2), np.nan, np.float32)
    token_weights = np.zeros(slot.shape, np.float32) if weighted else ()
    return Batch(
        tokens, positions, segment_ids, branch_ids, source, target, slot, weights, preference, scores, ref_logps,
        token_weights,
    )  # fmt: skip


def _row_lengths(longest: int, max_length: int, unit: int) -> list[int]:
    """Returns the row lengths to try: `unit` times 1, 2, 3, 4, 6, 8, 12, ..., none shorter than `longest`."""
    top = _round_up(max(2 * max_length, longest, SHORT_LENGTH), unit)
    steps = sorted({k << n for n in range(top.bit_length()) for k in (2, 3)} | {1})
    sizes = [unit * step for step in steps if longest <= unit * step <= top]
    return sizes or [_round_up(longest, unit)]


def _row_counts(each: int, batch_size: int, multiple_of: int) -> range:
    """Returns the numbers of rows to try: at most `each` per device, and no more than comparisons."""
    most = min(each, math.ceil(batch_size / multiple_of))
    return range(multiple_of, most * multiple_of + 1, multiple_of)


def _scored(table: Table, length: int) -> int:
    """Returns S: the scored tokens of a full row on average, and some slack; the output head computes all S."""
    usual = SCORED_SLACK * length * float(table.scored_lengths.sum()) / float(table.lengths().sum())
    return _round_up(max(int(table.scored_lengths.max()), math.ceil(usual)), SCORED_UNIT)


def _segments(table: Table, length: int, batch_size: int) -> int:
    """Returns G: twice the comparisons of a full row on average; short ones share rows, and unused places cost little.

    Sorting by length puts short comparisons together, so that some rows hold many more than the average.
    """
    return max(1, min(batch_size, math.ceil(2 * length / float(table.lengths().mean())), length))


def _simulated_steps(table: Table, batch_size: int) -> list[tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]]:
    """Returns (lengths, scored lengths) of batches sampled from the table with replacement and a fixed seed.

    The number of rows that a step needs depends on how its lengths fit together, which averages do not tell. The seed
    is fixed so that the same table always gets the same layout, on every process and after a restart.
    """
    lengths, scored = table.lengths(), table.scored_lengths
    random = np.random.default_rng(0)
    samples = [random.integers(len(table), size=batch_size) for _ in range(SIMULATED_STEPS)]
    return [(lengths[sample], scored[sample]) for sample in samples]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
