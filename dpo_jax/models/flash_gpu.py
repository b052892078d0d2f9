"""Kernels of `flash` for GPUs (Triton): a program has one block of one head, and loops over the block's list.

Axis letters: those of `flash_blocks.py`; p is d, up to the next power of two, which Triton's blocks must be.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

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

LEAST = 16  # of the sides of a matmul
BLOCK = 64  # queries and keys, of heads of at most HEAD_BYTES; half of it for larger heads
HEAD_BYTES = 256


def _blocks_of(q: Array, k: Array) -> Blocks:
    """Returns BLOCK, or less where registers would not hold the sums."""
    block = BLOCK if _padded(q.shape[3]) * q.dtype.itemsize <= HEAD_BYTES else BLOCK // 2
    return Blocks(block, block)


def _padded(dim: int) -> int:
    return max(LEAST, pl.next_power_of_2(dim))


class Heads:
    """Reads and writes blocks of tokens of one head: [B, p], of which only d numbers are in the array."""

    def __init__(self, dim: int):
        self.inside = (jnp.arange(_padded(dim)) < dim)[None]

    def read(self, ref: Any, *where: Any) -> Array:
        """Returns [B, p], 0 where the array has nothing."""
        return triton.load(ref.at[*where, :], mask=self.inside, other=0.0)

    def write(self, ref: Any, x: Array) -> None:
        """Writes [B, p] where the array has something."""
        triton.store(ref, x.astype(ref.dtype), mask=self.inside)


def _columns(ref: Any) -> list[Array]:
    return [ref[i, :][:, None] for i in range(4)]


def _rows(ref: Any, tokens: Any) -> list[Array]:
    return [ref[i, tokens][None] for i in range(4)]


def _forward_kernel(scoring, blocks, dim, lists, count, window, q_ids, k_ids, q, k, v, out, lse):
    heads = Heads(dim)
    queries, ids = heads.read(q, slice(None)), _columns(q_ids)

    def visit(slot: Array, found: Softmax) -> Softmax:
        tokens = pl.ds(lists[slot] * blocks.keys, blocks.keys)
        seen = sees(ids, _rows(k_ids, tokens), window)
        scores = masked_scores(queries, heads.read(k, tokens), seen, scoring)
        return add_keys(found, scores, heads.read(v, tokens))

    values, log_total = normalized(jax.lax.fori_loop(0, count, visit, empty_softmax(*queries.shape)))
    heads.write(out, values)
    lse[...] = log_total[:, 0]


def _query_gradient_kernel(scoring, blocks, dim, lists, count, window, q_ids, k_ids, q, k, v, do, lse, delta, dq):
    heads = Heads(dim)
    queries, cotangents, ids = heads.read(q, slice(None)), heads.read(do, slice(None)), _columns(q_ids)
    log_total, deltas = lse[...][:, None], delta[...][:, None]

    def visit(slot: Array, total: Array) -> Array:
        tokens = pl.ds(lists[slot] * blocks.keys, blocks.keys)
        keys = heads.read(k, tokens)
        scores = masked_scores(queries, keys, sees(ids, _rows(k_ids, tokens), window), scoring)
        dp = matmul(cotangents, heads.read(v, tokens), transposed=True)
        ds = score_gradient(scores, jnp.exp(scores - log_total), dp, deltas, scoring)
        return total + matmul(ds.astype(keys.dtype), keys)

    heads.write(dq, jax.lax.fori_loop(0, count, visit, jnp.zeros(queries.shape, jnp.float32)))


def _key_gradient_kernel(scoring, blocks, dim, lists, count, window, q_ids, k_ids, q, k, v, do, lse, delta, dk, dv):
    """Blocks of scores have keys along the first axis, so that no matmul needs one transposed."""
    heads = Heads(dim)
    keys, values, ids = heads.read(k, slice(None)), heads.read(v, slice(None)), _columns(k_ids)

    def visit(at: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        head, slot = jax.lax.div(at, count), jax.lax.rem(at, count)
        tokens = pl.ds(lists[slot] * blocks.queries, blocks.queries)
        queries, cotangents = heads.read(q, tokens, head), heads.read(do, tokens, head)
        scores = masked_scores(keys, queries, sees(_rows(q_ids, tokens), ids, window), scoring)
        p, dp = jnp.exp(scores - lse[head, tokens][None]), matmul(values, cotangents, transposed=True)
        ds = score_gradient(scores, p, dp, delta[head, tokens][None], scoring)
        k_total, v_total = totals
        return k_total + matmul(ds.astype(keys.dtype), queries), v_total + matmul(p.astype(keys.dtype), cotangents)

    zero = jnp.zeros(keys.shape, jnp.float32)
    totals = jax.lax.fori_loop(0, count * q.shape[1], visit, (zero, zero))
    for ref, total in zip((dk, dv), totals, strict=True):
        heads.write(ref, total)


def _specs(sides: Sides, blocks: Blocks, by_key: bool) -> dict[str, pl.BlockSpec]:
    """Returns which part of an array of each kind a program has: its block of its own side, all of the other side."""
    (_, length, heads, dim), (_, keys, kv_heads, _) = sides.q.shape, sides.k.shape
    shared, wide = heads // kv_heads, _padded(dim)
    if by_key:
        return {
            "q": pl.BlockSpec((None, length, shared, wide), lambda r, h, i: (r, 0, h, 0)),
            "k": pl.BlockSpec((None, blocks.keys, None, wide), lambda r, h, i: (r, i, h, 0)),
            "row": pl.BlockSpec((None, shared, length), lambda r, h, i: (r, h, 0)),
            "q_ids": pl.BlockSpec((None, 4, length), lambda r, h, i: (r, 0, 0)),
            "k_ids": pl.BlockSpec((None, 4, blocks.keys), lambda r, h, i: (r, 0, i)),
        }
    return {
        "q": pl.BlockSpec((None, blocks.queries, None, wide), lambda r, h, i: (r, i, h, 0)),
        "k": pl.BlockSpec((None, keys, None, wide), lambda r, h, i: (r, 0, jax.lax.div(h, shared), 0)),
        "row": pl.BlockSpec((None, None, blocks.queries), lambda r, h, i: (r, h, i)),
        "q_ids": pl.BlockSpec((None, 4, blocks.queries), lambda r, h, i: (r, 0, i)),
        "k_ids": pl.BlockSpec((None, 4, keys), lambda r, h, i: (r, 0, 0)),
    }


def _run(
    kernel: Callable[..., None],
    sides: Sides,
    lists: Lists,
    more: list[Array],
    out: list[tuple[str, jax.ShapeDtypeStruct]],
    settings: tuple[Scoring, Blocks, bool],
    by_key: bool = False,
) -> list[Array]:
    """Calls a kernel: one program for each row, query head (with `by_key`, key-value head) and block of its side.

    Args:
      kernel: (scoring, blocks, d, list, count, window, ids of queries and keys, q, k, v, `more`, outputs).
      sides: the inputs.
      lists: of the blocks of its side.
      more: further inputs: nothing, or the cotangent and two of kind "row".
      out: kind and shape of each output.
      settings: scoring, blocks, and whether to run on a CPU.
      by_key: whether a program's block is one of keys.
    """
    scoring, blocks, interpret = settings
    specs, (*_, heads, dim), kv_heads = _specs(sides, blocks, by_key), sides.q.shape, sides.k.shape[2]
    rows, n, m = lists.blocks.shape
    listed = pl.BlockSpec((None, None, m), lambda r, h, i: (r, i, 0))
    counted = pl.BlockSpec((None, n), lambda r, h, i: (r, 0))
    windows = [] if sides.window is None else [pl.BlockSpec((1,), lambda r, h, i: (0,))]
    kinds = ["q_ids", "k_ids", "q", "k", "k", *("q", "row", "row")[: len(more)]]

    def body(lists: Any, counts: Any, *refs: Any) -> None:
        window, refs = (refs[0][0], refs[1:]) if windows else (None, refs)
        kernel(scoring, blocks, dim, lists, counts[pl.program_id(2)], window, *refs)

    return pl.pallas_call(
        body,
        grid=(rows, kv_heads if by_key else heads, n),
        in_specs=[listed, counted, *windows, *(specs[kind] for kind in kinds)],
        out_specs=[specs[kind] for kind, _ in out],
        out_shape=[shape for _, shape in out],
        compiler_params=triton.CompilerParams(num_warps=4 if dim <= BLOCK else 8, num_stages=2),
        interpret=interpret,
        name=f"flash{kernel.__name__.removesuffix('_kernel')}",
    )(*lists, *([] if sides.window is None else [sides.window]), *sides[3:5], *sides[:3], *more)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(sides: Sides, lists: Lists, scoring: Scoring, blocks: Blocks, interpret: bool) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; see `Backend`."""
    rows, length, heads, _ = sides.q.shape
    out = [("q", _like(sides.q)), ("row", jax.ShapeDtypeStruct((rows, heads, length), jnp.float32))]
    mixed, lse = _run(_forward_kernel, sides, lists, [], out, (scoring, blocks, interpret))
    return mixed, lse


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
    settings = scoring, blocks, interpret
    (dq,) = _run(_query_gradient_kernel, sides, lists, more, [("q", _like(sides.q))], settings)
    out = [("k", _like(x)) for x in (sides.k, sides.v)]
    dk, dv = _run(_key_gradient_kernel, sides, key_lists, more, out, settings, by_key=True)
    return dq, dk, dv


GPU = Backend(_blocks_of, _forward, _backward)
