"""Kernels of `flash` for TPUs: a grid runs over blocks in order, each step on several heads side by side.

Axis letters: those of `flash_blocks.py`, and G key-value heads and M query heads of each in one step.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dpo_jax.models.attention import Scoring
from dpo_jax.models.flash_blocks import (
    Backend,
    Blocks,
    Lists,
    Sides,
    Softmax,
    add_keys,
    empty_softmax,
    masked_scores,
    matmul,
    normalized,
    score_gradient,
    sees,
)
from dpo_jax.records import Array

LANES = 128  # of a vector register
BLOCK = 256  # queries and keys: a step takes longer than its start, and little is computed that nothing sees
HEADS = 8  # query heads in a step with BLOCK queries of LANES bfloat16 numbers: about half of the fast memory
LIST_BYTES = 1 << 18  # of a megabyte of scalar memory
IDS = 4  # fields of TokenIds


def _blocks_of(q: Array, k: Array) -> Blocks:
    """Returns BLOCK; less for short rows, more where the lists would not fit in scalar memory."""
    longest = max(q.shape[1], k.shape[1])
    block = min(BLOCK, -(-longest // LANES) * LANES)
    while 4 * q.shape[0] * (q.shape[1] / block) * (k.shape[1] / block) > LIST_BYTES:
        block *= 2
    return Blocks(block, block)


class Step(NamedTuple):
    """Heads in one step: G key-value heads, and M query heads of each; G is 1 unless M is N."""

    kv_heads: int
    shared: int

    def heads(self) -> Iterator[tuple[int, int]]:
        """Yields all (key-value head, query head of it)."""
        return ((g, m) for g in range(self.kv_heads) for m in range(self.shared))


def step_of(kv_heads: int, shared: int, block: int, head_bytes: int) -> Step:
    """Returns as many heads as fast memory has room for, N = `shared` query heads to a key-value head."""
    room = max(1, HEADS * BLOCK * 2 * LANES // (max(block, BLOCK) * max(head_bytes, 2 * LANES)))
    queries = max(m for m in range(1, min(room, shared) + 1) if shared % m == 0)
    keys = room // queries if queries == shared else 1
    return Step(max(g for g in range(1, min(keys, kv_heads) + 1) if kv_heads % g == 0), queries)


class Grid(NamedTuple):
    """The grid of one kernel: (rows, key-value heads, query heads, blocks of queries, slots).

    With `by_key` it is (rows, key-value heads, blocks of keys, query heads, slots). A slot is a place in the block's
    list.
    """

    sides: Sides
    lists: Lists
    blocks: Blocks
    by_key: bool = False

    def step(self) -> Step:
        """Returns the heads in one step."""
        (*_, heads, dim), kv_heads = self.sides.q.shape, self.sides.k.shape[2]
        itemsize = self.sides.q.dtype.itemsize
        return step_of(kv_heads, heads // kv_heads, self.blocks.queries, max(dim, LANES) * itemsize)

    def place(self, row: Any, group: Any, x: Any, y: Any, slot: Any, lists: Any, counts: Any) -> tuple[Any, ...]:
        """Returns row, key-value heads, query heads, block of queries and block of keys of a step of the grid."""
        n, m = self.lists.blocks.shape[1:]
        block, part = (x, y) if self.by_key else (y, x)
        at = row * n + block
        # The place stays the same after the last block of a list, so that nothing is copied.
        other = lists[at * m + jnp.clip(slot, 0, jnp.maximum(counts[at] - 1, 0))]
        return (row, group, part, other, block) if self.by_key else (row, group, part, block, other)

    def specs(self) -> dict[str, pl.BlockSpec]:
        """Returns how arrays of each kind are cut into blocks."""
        dim, (queries, keys), step = self.sides.q.shape[3], self.blocks, self.step()

        def spec(shape: tuple[int, ...], where: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *args: where(*self.place(*args[:7])))

        return {
            "q": spec((1, step.kv_heads, step.shared, queries, dim), lambda r, g, m, i, j: (r, g, m, i, 0)),
            "k": spec((1, step.kv_heads, 1, keys, dim), lambda r, g, m, i, j: (r, g, 0, j, 0)),
            "row": spec((1, step.kv_heads, step.shared, 1, queries), lambda r, g, m, i, j: (r, g, m, 0, i)),
            "q_columns": spec((1, queries, IDS), lambda r, g, m, i, j: (r, i, 0)),
            "k_columns": spec((1, keys, IDS), lambda r, g, m, i, j: (r, j, 0)),
            "q_rows": spec((1, IDS, queries), lambda r, g, m, i, j: (r, 0, i)),
            "k_rows": spec((1, IDS, keys), lambda r, g, m, i, j: (r, 0, j)),
        }

    def run(
        self,
        kernel: Callable[..., None],
        more: list[Array],
        out: list[tuple[str, jax.ShapeDtypeStruct]],
        scratch: list[tuple[int, ...]],
        scoring: Scoring,
        interpret: bool,
    ) -> list[Array]:
        """Calls the kernel.

        Args:
          kernel: (scoring, lists, counts, window, step, ids of queries and keys, q, k, v, `more`, outputs, scratch).
          more: further inputs: nothing, or the cotangent of q's kind and two of kind "row".
          out: kind and shape of each output.
          scratch: shapes of the float32 arrays in fast memory.
          scoring: scale and cap of the scores.
          interpret: whether to run on a CPU.
        """
        sides, specs, step, kv_heads = self.sides, self.specs(), self.step(), self.sides.k.shape[2]
        rows, n, _ = self.lists.blocks.shape
        parts, slots = sides.q.shape[2] // kv_heads // step.shared, jnp.maximum(self.lists.counts.max(), 1)
        grid = (rows, kv_heads // step.kv_heads, *((n, parts) if self.by_key else (parts, n)), slots)
        order = ("parallel",) * 3 + ("arbitrary" if self.by_key else "parallel", "arbitrary")
        scalars = [self.lists.blocks.reshape(-1), self.lists.counts.reshape(-1)]
        scalars += [] if sides.window is None else [sides.window]
        q_ids, k_ids = ("q_rows", "k_columns") if self.by_key else ("q_columns", "k_rows")
        ids = [x if "rows" in kind else x.swapaxes(1, 2) for kind, x in ((q_ids, sides.q_ids), (k_ids, sides.k_ids))]
        kinds = [q_ids, k_ids, "q", "k", "k", *("q", "row", "row")[: len(more)]]

        def body(lists: Any, counts: Any, *refs: Any) -> None:
            window, refs = (None, refs) if sides.window is None else (refs[0][0], refs[1:])
            kernel(scoring, lists, counts, window, step, *refs)

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[specs[kind] for kind in kinds],
                out_specs=[specs[kind] for kind, _ in out],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[shape for _, shape in out],
            compiler_params=pltpu.CompilerParams(dimension_semantics=order),
            interpret=interpret,
            name=f"flash{kernel.__name__.removesuffix('_kernel')}",
        )(*scalars, *ids, *(_by_head(x, kv_heads) for x in (sides.q, sides.k, sides.v)), *more)


def _by_head(x: Array, kv_heads: int) -> Array:
    """[R, T, H, d] -> [R, K, N, T, d]; N is 1 for keys and values."""
    rows, length, heads, dim = x.shape
    return x.reshape(rows, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _by_token(x: Array) -> Array:
    """[R, K, N, T, d] -> [R, T, H, d]."""
    rows, kv_heads, shared, length, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, kv_heads * shared, dim)


def _columns(ref: Any) -> list[Array]:
    return [ref[0][:, i : i + 1] for i in range(IDS)]


def _rows(ref: Any) -> list[Array]:
    return [ref[0][i : i + 1] for i in range(IDS)]


def _as_row(column: Array) -> Array:
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _as_column(row: Array) -> Array:
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _forward_kernel(scoring, lists, counts, window, step, q_ids, k_ids, q, k, v, out, lse, top, total, mixed):
    slot, count = pl.program_id(4), counts[pl.program_id(0) * pl.num_programs(3) + pl.program_id(3)]

    @pl.when(slot == 0)
    def _start():
        for at in step.heads():
            top[at], total[at], mixed[at] = empty_softmax(*mixed.shape[2:])

    @pl.when(slot < count)
    def _visit():
        seen = sees(_columns(q_ids), _rows(k_ids), window)
        for g, m in step.heads():
            scores = masked_scores(q[0, g, m], k[0, g, 0], seen, scoring)
            top[g, m], total[g, m], mixed[g, m] = add_keys(
                Softmax(top[g, m], total[g, m], mixed[g, m]), scores, v[0, g, 0]
            )

    @pl.when(slot == pl.num_programs(4) - 1)
    def _end():
        for at in step.heads():
            values, log_total = normalized(Softmax(top[at], total[at], mixed[at]))
            out[0, *at], lse[0, *at] = values.astype(out.dtype), _as_row(log_total)


def _query_gradient_kernel(
    scoring, lists, counts, window, step, q_ids, k_ids, q, k, v, do, lse, delta, dq, lses, deltas, total
):
    slot, count = pl.program_id(4), counts[pl.program_id(0) * pl.num_programs(3) + pl.program_id(3)]

    @pl.when(slot == 0)
    def _start():
        total[...] = jnp.zeros(total.shape, total.dtype)
        for at in step.heads():
            lses[at], deltas[at] = _as_column(lse[0, *at]), _as_column(delta[0, *at])

    @pl.when(slot < count)
    def _visit():
        seen = sees(_columns(q_ids), _rows(k_ids), window)
        for g, m in step.heads():
            scores = masked_scores(q[0, g, m], k[0, g, 0], seen, scoring)
            p, dp = jnp.exp(scores - lses[g, m]), matmul(do[0, g, m], v[0, g, 0], transposed=True)
            ds = score_gradient(scores, p, dp, deltas[g, m], scoring)
            total[g, m] += matmul(ds.astype(k.dtype), k[0, g, 0])

    @pl.when(slot == pl.num_programs(4) - 1)
    def _end():
        dq[0] = total[...].astype(dq.dtype)


def _key_gradient_kernel(
    scoring, lists, counts, window, step, q_ids, k_ids, q, k, v, do, lse, delta, dk, dv, k_total, v_total
):
    """Blocks of scores have keys along the first axis, so that no matmul needs one transposed."""
    part, slot = pl.program_id(3), pl.program_id(4)
    count = counts[pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)]

    @pl.when((part == 0) & (slot == 0))
    def _start():
        for total in (k_total, v_total):
            total[...] = jnp.zeros(total.shape, total.dtype)

    @pl.when(slot < count)
    def _visit():
        seen = sees(_rows(q_ids), _columns(k_ids), window)
        for g, m in step.heads():
            scores = masked_scores(k[0, g, 0], q[0, g, m], seen, scoring)
            p, dp = jnp.exp(scores - lse[0, g, m]), matmul(v[0, g, 0], do[0, g, m], transposed=True)
            ds = score_gradient(scores, p, dp, delta[0, g, m], scoring)
            v_total[g] += matmul(p.astype(do.dtype), do[0, g, m])
            k_total[g] += matmul(ds.astype(q.dtype), q[0, g, m])

    @pl.when((part == pl.num_programs(3) - 1) & (slot == pl.num_programs(4) - 1))
    def _end():
        dk[0, :, 0], dv[0, :, 0] = k_total[...].astype(dk.dtype), v_total[...].astype(dv.dtype)


def _forward(sides: Sides, lists: Lists, scoring: Scoring, blocks: Blocks, interpret: bool) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; see `Backend`."""
    grid = Grid(sides, lists, blocks)
    (rows, length, heads, dim), kv_heads, step = sides.q.shape, sides.k.shape[2], grid.step()
    out = jax.ShapeDtypeStruct((rows, kv_heads, heads // kv_heads, length, dim), sides.q.dtype)
    lse = jax.ShapeDtypeStruct((*out.shape[:3], 1, length), jnp.float32)
    scratch = [(*step, blocks.queries, n) for n in (1, 1, dim)]
    mixed, lse = grid.run(_forward_kernel, [], [("q", out), ("row", lse)], scratch, scoring, interpret)
    return _by_token(mixed), lse.reshape(rows, heads, length)


def _backward(
    sides: Sides,
    lists: Lists,
    key_lists: Lists,
    more: list[Array],
    scoring: Scoring,
    blocks: Blocks,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of q, k and v; see `Backend`."""
    by_query, by_key = Grid(sides, lists, blocks), Grid(sides, key_lists, blocks, by_key=True)
    (rows, length, heads, dim), (_, keys, kv_heads, _), step = sides.q.shape, sides.k.shape, by_query.step()
    shared = heads // kv_heads
    more = [_by_head(more[0], kv_heads), *(x.reshape(rows, kv_heads, shared, 1, length) for x in more[1:])]
    dq = jax.ShapeDtypeStruct((rows, kv_heads, shared, length, dim), sides.q.dtype)
    scratch = [(*step, blocks.queries, n) for n in (1, 1, dim)]
    (dq,) = by_query.run(_query_gradient_kernel, more, [("q", dq)], scratch, scoring, interpret)
    dkv = jax.ShapeDtypeStruct((rows, kv_heads, 1, keys, dim), sides.k.dtype)
    scratch = [(step.kv_heads, blocks.keys, dim)] * 2
    dk, dv = by_key.run(_key_gradient_kernel, more, [("k", dkv)] * 2, scratch, scoring, interpret)
    return _by_token(dq), _by_token(dk), _by_token(dv)


TPU = Backend(_blocks_of, _forward, _backward)
