"""Attention of part of a row's queries over the keys of the whole row, block by block. Pure functions of arrays.

Axis letters as in `attention`, with Q queries and S keys in a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import (
    MASKED,
    KeyValues,
    Queries,
    RowMask,
    Scoring,
    TokenIds,
    by_group,
    by_head,
    by_token,
    delta_of,
    dot,
    scores_of,
    sink_slopes,
    slopes_of,
    visible_keys,
)
from dpo_jax.models.remat import ATTENTION, named
from dpo_jax.records import Array

BLOCK = 512  # most queries and keys in a block

Sizes = tuple[int, int]  # queries and keys in a block


def block_attention(
    q: Queries,
    k: KeyValues,
    v: KeyValues,
    mask: RowMask,
    scoring: Scoring,
    sinks: Array | None = None,
    *,
    block: int = BLOCK,
) -> Queries:
    """Returns what `packed_attention` does, for queries and keys in any order and number.

    Each block of queries goes through the blocks of keys of which it may see one, with a running maximum and sum
    (FlashAttention, arXiv 2205.14135). Which those are is found from the ids when the program runs, so memory grows
    with T and compute with the number of visible blocks. The backward pass saves only the output and the log-sum-exp of
    the scores.

    Args:
      q: queries [R, Q, H, d] in the compute dtype.
      k: keys [R, T, K, d]; H is a multiple of K.
      v: values [R, T, K, d].
      mask: which keys a query attends to.
      scoring: scale and cap of the scores.
      sinks: as in `packed_attention`.
      block: most queries and keys in a block; the largest divisor of their number is taken.

    Returns:
      The output [R, Q, H, d] in the dtype of q.
    """
    return _attend(q, k, v, sinks, mask, scoring, (_divisor(q.shape[1], block), _divisor(k.shape[1], block)))


def _divisor(length: int, most: int) -> int:
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)


def blocks_seen(mask: RowMask, sizes: Sizes) -> tuple[Array, Array]:
    """Returns which blocks of keys to compute for each block of queries.

    A block is left out if the lowest and highest ids of both show that no query sees a key of it.

    Args:
      mask: of queries [R, Q] and keys [R, T].
      sizes: queries and keys in a block.

    Returns:
      int32[blocks of queries, blocks of keys], those to compute first; int32[blocks of queries], how many those are.
    """

    def ends(ids: TokenIds, size: int, axis: int) -> tuple[TokenIds, TokenIds]:
        def each(least: Callable[..., Array]) -> TokenIds:
            return jax.tree.map(lambda x: jnp.expand_dims(least(x.reshape(len(x), -1, size), -1), axis), ids)

        return each(jnp.min), each(jnp.max)

    (q_low, q_high), (k_low, k_high) = ends(mask.queries, sizes[0], 2), ends(mask.keys, sizes[1], 1)
    seen = k_low.index <= q_high.index
    seen &= (k_low.segment_ids <= q_high.segment_ids) & (q_low.segment_ids <= k_high.segment_ids)
    own_branch = (k_low.branch_ids <= q_high.branch_ids) & (q_low.branch_ids <= k_high.branch_ids)
    seen &= own_branch | (k_low.branch_ids == 0)
    if mask.window is not None:
        seen &= q_low.positions - k_high.positions < mask.window
    seen = seen.any(0)
    return jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32), seen.sum(1, dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q: Array, k: Array, v: Array, sinks: Array | None, mask: RowMask, scoring: Scoring, sizes: Sizes) -> Array:
    return _attend_fwd(q, k, v, sinks, mask, scoring, sizes)[0]


def _attend_fwd(q, k, v, sinks, mask, scoring, sizes):
    queries, keys, values = by_head(q, k.shape[2]), by_head(k), by_head(v)
    order, count = blocks_seen(mask, sizes)

    def one(i: Array) -> tuple[Array, Array]:
        part = _cut(queries, i, sizes[0], 3)

        def add(n: Array, so_far: tuple) -> tuple:
            top, total, out = so_far
            key, value = (_cut(x, order[i, n], sizes[1], 2) for x in (keys, values))
            visible = visible_keys(_block_mask(mask, i, order[i, n], sizes))[:, None, None]
            scores = jnp.where(visible, scores_of(part, key, scoring), MASKED)
            new = jnp.maximum(top, scores.max(-1, keepdims=True))
            # Until a query has seen a key, its p are 1 and mean nothing; at the first key that it sees `kept` is 0.
            p, kept = jnp.exp(scores - new), jnp.exp(top - new)
            mixed = dot("rknqs,rksd->rknqd", p.astype(value.dtype), value)
            return new, total * kept + p.sum(-1, keepdims=True), out * kept + mixed

        lead = (*part.shape[:-1], 1)
        start = jnp.full(lead, MASKED), jnp.zeros(lead), jnp.zeros(part.shape)
        if sinks is not None:
            start = jnp.broadcast_to(by_group(sinks, k.shape[2]), lead), jnp.ones(lead), start[2]
        top, total, out = jax.lax.fori_loop(0, count[i], add, start)
        return (out / total).astype(q.dtype), (top + jnp.log(total))[..., 0]

    parts, lse = jax.lax.map(one, jnp.arange(len(count)))
    out = named(by_token(_joined(parts)), ATTENTION)  # see `attention`
    lse = named(_joined(lse), ATTENTION)
    return out, (q, k, v, sinks, mask, out, lse)


def _attend_bwd(scoring, sizes, residuals, g):
    q, k, v, sinks, mask, out, lse = residuals
    queries, keys, values, do = by_head(q, k.shape[2]), by_head(k), by_head(v), by_head(g, k.shape[2])
    by_query = queries, do, lse[..., None], delta_of(g, out, k.shape[2])
    order, count = blocks_seen(mask, sizes)

    def one(sums: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        query, d_out, total, delta = (_cut(x, i, sizes[0], 3) for x in by_query)

        def add(n: Array, so_far: tuple) -> tuple:
            j = order[i, n]
            key, value = (_cut(x, j, sizes[1], 2) for x in (keys, values))
            visible = visible_keys(_block_mask(mask, i, j, sizes))
            dq, dk, dv = slopes_of(query, d_out, total, delta, key, value, visible, scoring)
            return so_far[0] + dq, _add_at(so_far[1], dk, j), _add_at(so_far[2], dv, j)

        dq, dk, dv = jax.lax.fori_loop(0, count[i], add, (jnp.zeros(query.shape), *sums))
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(keys.shape), jnp.zeros(values.shape)
    (dk, dv), dq = jax.lax.scan(one, zeros, jnp.arange(len(count)))
    d_sinks = sink_slopes(sinks, *by_query[2:])
    return by_token(_joined(dq)), by_token(dk).astype(k.dtype), by_token(dv).astype(v.dtype), d_sinks, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _cut(x: Array, i: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _add_at(x: Array, block: Array, j: Array) -> Array:
    size = block.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, j, size, 2) + block, j * size, 2)


def _block_mask(mask: RowMask, i: Array, j: Array, sizes: Sizes) -> RowMask:
    def cut(ids: TokenIds, index: Array, size: int) -> TokenIds:
        return jax.tree.map(lambda x: _cut(x, index, size, 1), ids)

    return mask._replace(queries=cut(mask.queries, i, sizes[0]), keys=cut(mask.keys, j, sizes[1]))


def _joined(x: Any) -> Array:
    """[blocks, R, K, N, Q, ...] -> [R, K, N, T, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
