"""Grouped matmuls: rows sorted by group, each group with a kernel of its own.

On a TPU by `jax.lax.ragged_dot`, which visits each row once. Elsewhere JAX would multiply every row by every kernel, in
an array with an entry for each pair; here a loop multiplies blocks of rows, each of one group. On a GPU an iteration
costs some launches of kernels, whatever it computes, so there it has many blocks, or large ones.

Axis letters: N rows, E groups, I inputs, O outputs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.records import Array

BLOCK = 128  # rows of a block
LARGE_BLOCK = 512  # of an outer product on a GPU
TOGETHER = 32  # blocks that a GPU multiplies in an iteration, each by a copy of its kernel
# Contracts the rows of two arrays group by group: [N, I], [N, O] -> [E, I, O].
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def multiply_groups(x: Array, kernel: Array, sizes: Array) -> Array:
    """Returns x @ kernel[e] for the rows of each group e, float32[N, O].

    Args:
      x: [N, I], sorted by group.
      kernel: [E, I, O].
      sizes: int32[E], rows of each group; rows beyond their sum are zero.
    """
    ways = {"tpu": _multiply_ragged, "cuda": multiply_batches, "rocm": multiply_batches}
    return jax.lax.platform_dependent(x, kernel, sizes, **ways, default=multiply_blocks)


def outer_groups(x: Array, g: Array, sizes: Array) -> Array:
    """Returns the sum of x[n] g[n] over the rows n of each group, float32[E, I, O]."""
    large = partial(outer_blocks, block=LARGE_BLOCK)
    ways = {"tpu": _outer_ragged, "cuda": large, "rocm": large}
    return jax.lax.platform_dependent(x, g, sizes, **ways, default=outer_blocks)


def group_of_rows(sizes: Array, rows: int) -> Array:
    """Returns int32[rows], the group of each row, from int32[E]; E for rows beyond all groups."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")


def _multiply_ragged(x: Array, kernel: Array, sizes: Array) -> Array:
    y = jax.lax.ragged_dot(x, kernel, sizes, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), y, 0.0)


def _outer_ragged(x: Array, g: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot_general(x, g, sizes, _BY_GROUP, preferred_element_type=jnp.float32)


class _Blocks(NamedTuple):
    """Blocks of rows in order, each of one group.

    Attributes:
      count: int32[], how many there are: at most N / BLOCK + min(E, N).
      group, start, end: int32[most], the group of a block, its first row, and the row after its last, which is not
        after the first where there is no block. `most` is a multiple of TOGETHER.
    """

    count: Array
    group: Array
    start: Array
    end: Array


def _blocks_of(sizes: Array, rows: int, size: int) -> _Blocks:
    each, ends = -(-sizes // size), jnp.cumsum(sizes)
    last = jnp.cumsum(each)
    most = -(-rows // size) + min(len(sizes), rows)
    i = jnp.arange(most + -most % TOGETHER)
    group = jnp.minimum(jnp.searchsorted(last, i, side="right"), len(sizes) - 1)
    start = (ends - sizes)[group] + (i - (last - each)[group]) * size
    return _Blocks(last[-1], group, start, jnp.minimum(start + size, ends[group]))


def _cut(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def multiply_blocks(x: Array, kernel: Array, sizes: Array) -> Array:
    """Returns x @ kernel[e] for the rows of each group, float32[N, O], block by block."""
    size = min(BLOCK, len(x))
    blocks, padded = _blocks_of(sizes, len(x), size), jnp.pad(x, ((0, size), (0, 0)))

    def body(i: Array, y: Array) -> Array:
        rows = _cut(padded, blocks.start[i], size)
        out = jnp.dot(rows, kernel[blocks.group[i]], preferred_element_type=jnp.float32)
        # Rows after the group are written too, and then by the blocks that follow.
        return jax.lax.dynamic_update_slice_in_dim(y, out, blocks.start[i], axis=0)

    y = jax.lax.fori_loop(0, blocks.count, body, jnp.zeros((len(padded), kernel.shape[2]), jnp.float32))
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), y[: len(x)], 0.0)


def multiply_batches(x: Array, kernel: Array, sizes: Array) -> Array:
    """Returns x @ kernel[e] for the rows of each group, float32[N, O], TOGETHER blocks at a time."""
    size = min(BLOCK, len(x))
    blocks = _blocks_of(sizes, len(x), size)

    def body(i: Array, y: Array) -> Array:
        group, start, end = (_cut(each, i * TOGETHER, TOGETHER) for each in blocks[1:])
        rows = start[:, None] + jnp.arange(size)
        rows = jnp.where(rows < end[:, None], rows, len(x))  # outside: read as 0 and not written
        some = x.at[rows].get(mode="fill", fill_value=0)
        out = jnp.einsum("cbi,cio->cbo", some, kernel[group], preferred_element_type=jnp.float32)
        return y.at[rows].set(out, mode="drop")

    y = jnp.zeros((len(x), kernel.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, -(-blocks.count // TOGETHER), body, y)


def outer_blocks(x: Array, g: Array, sizes: Array, block: int = BLOCK) -> Array:
    """Returns the sum of x[n] g[n] over the rows of each group, float32[E, I, O], block by block."""
    size = min(block, len(x))
    blocks = _blocks_of(sizes, len(x), size)
    x, g = (jnp.pad(y, ((0, size), (0, 0))) for y in (x, g))

    def body(i: Array, total: Array) -> Array:
        own = blocks.start[i] + jnp.arange(size) < blocks.end[i]
        left = jnp.where(own[:, None], _cut(x, blocks.start[i], size), 0)
        right: Any = _cut(g, blocks.start[i], size)
        return total.at[blocks.group[i]].add(jnp.dot(left.T, right, preferred_element_type=jnp.float32))

    return jax.lax.fori_loop(0, blocks.count, body, jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32))
