"""Blocks of attention scores: which ones have a visible pair, and the mathematics of one. Shared by all kernels.

Axis letters: those of `attention.py`, S keys; n blocks of queries, m blocks of keys. A block of scores has queries
along one axis and keys along the other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from dpo_jax.models.attention import MASKED, Scoring, TokenIds, capped, capped_slope
from dpo_jax.records import Array

UNSEEN = -MASKED  # log-sum-exp of a query that sees no key: its probabilities exp(score - UNSEEN) are 0
LARGEST = jnp.iinfo(jnp.int32).max


def padded_ids(ids: TokenIds, block: int, index: int) -> Array:
    """Returns int32[R, 4, T], T a multiple of the block; padding has the ids of the last token, but this index.

    Without a window positions are not read, and may be None.
    """
    ids = ids if ids.positions is not None else ids._replace(positions=ids.index)
    pad = ((0, 0), (0, -ids.index.shape[1] % block))
    first = jnp.pad(ids.index, pad, constant_values=index)
    return jnp.stack([first, *(jnp.pad(x, pad, mode="edge") for x in ids[1:])], axis=1).astype(jnp.int32)


class Blocks(NamedTuple):
    """Numbers of queries and of keys in a block of scores."""

    queries: int
    keys: int


class Lists(NamedTuple):
    """Blocks to visit: for each block of one side, those of the other side, in order.

    Attributes:
      blocks: int32[R, n, m]: indices of blocks of the other side, first those to visit.
      counts: int32[R, n], how many to visit.
    """

    blocks: Array
    counts: Array


class Sides(NamedTuple):
    """Inputs of a kernel; lengths are multiples of the blocks.

    Attributes:
      q: queries [R, T, H, d].
      k: keys [R, S, K, d].
      v: values [R, S, K, d].
      q_ids: int32[R, 4, T], the fields of `TokenIds`.
      k_ids: int32[R, 4, S].
      window: int32[1], or None.
    """

    q: Array
    k: Array
    v: Array
    q_ids: Array
    k_ids: Array
    window: Array | None


class Backend(NamedTuple):
    """The kernels of one platform.

    Attributes:
      blocks: (q, k) -> size of the blocks.
      forward: (sides, lists, scoring, blocks, interpret) -> output like q, and log-sum-exp float32[R, H, T].
      backward: (sides, lists, lists of the blocks of keys, [cotangent, log-sum-exp, delta], scoring, blocks, interpret)
        -> gradients of q, k and v. `delta` is float32[R, H, T], see `attention._attend_bwd`.
    """

    blocks: Callable[[Array, Array], Blocks]
    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


# Which blocks to visit.


class _Range(NamedTuple):
    """Least and greatest value in each block, [R, n]."""

    low: Array
    high: Array

    def meets(self, other: "_Range") -> Bool[Any, "R n m"]:
        """Returns which ranges of `self` have a value in common with which ranges of `other`."""
        return (self.low[:, :, None] <= other.high[:, None]) & (other.low[:, None] <= self.high[:, :, None])


def _ranges(block: int, x: Array, only: Array | None = None) -> _Range:
    """Returns the ranges of int32[R, T]; with `only` bool[R, T], of these tokens, and an empty range without any."""
    low, high = (x, x) if only is None else (jnp.where(only, x, LARGEST), jnp.where(only, x, -1))
    shape = x.shape[0], -1, block
    return _Range(low.reshape(shape).min(-1), high.reshape(shape).max(-1))


def visible_blocks(q_ids: Array, k_ids: Array, window: Array | None, blocks: Blocks) -> Bool[Any, "R n m"]:
    """Returns which blocks may have a visible pair: all that have one, and few that have none.

    Ranges of ids decide, in O(n m) memory. Along a row, segments and their branches come in order, so the tokens of a
    block are in one range of (segment, branch). A query sees keys of the same (segment, branch), and prompt tokens of
    the same segment.

    Args:
      q_ids: int32[R, 4, T], the fields of `TokenIds`; T is a multiple of the block, and so is S.
      k_ids: int32[R, 4, S].
      window: int32[], or None.
      blocks: size of a block.
    """
    (q_index, q_segment, q_branch, q_position), (k_index, k_segment, k_branch, k_position) = (
        x.swapaxes(0, 1) for x in (q_ids, k_ids)
    )
    # Padding, segment 0, comes last.
    last, branches = 1 + jnp.maximum(q_segment.max(), k_segment.max()), 1 + jnp.maximum(q_branch.max(), k_branch.max())
    q_segment, k_segment = (jnp.where(x == 0, last, x) for x in (q_segment, k_segment))
    of_q, of_k = partial(_ranges, blocks.queries), partial(_ranges, blocks.keys)
    same = of_q(q_segment * branches + q_branch).meets(of_k(k_segment * branches + k_branch))
    prompt = of_q(q_segment).meets(of_k(k_segment, k_branch == 0))
    causal = of_k(k_index).low[:, None] <= of_q(q_index).high[:, :, None]
    found = causal & (same | prompt)
    if window is None:
        return found
    return found & (of_q(q_position).low[:, :, None] - of_k(k_position).high[:, None] < window)


def lists_of(visible: Bool[Any, "R n m"]) -> Lists:
    """Returns the lists of the visible blocks."""
    order = jnp.argsort(~visible, axis=-1, stable=True)
    return Lists(order.astype(jnp.int32), visible.sum(-1, dtype=jnp.int32))


# The mathematics of one block.


class Softmax(NamedTuple):
    """Softmax over the keys visited so far: greatest score and sum [Q, 1], output before division [Q, d]; float32."""

    top: Array
    total: Array
    mixed: Array


def empty_softmax(queries: int, dim: int) -> Softmax:
    """Returns the softmax over no keys."""
    zero = jnp.zeros((queries, 1), jnp.float32)
    return Softmax(zero + MASKED, zero, jnp.zeros((queries, dim), jnp.float32))


def matmul(a: Array, b: Array, *, transposed: bool = False) -> Array:
    """Returns a b in float32; a b^T if `transposed`."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def sees(q_ids: Any, k_ids: Any, window: Array | None) -> Array:
    """Returns which queries see which keys, as `visible_keys`; the four ids of both sides broadcast to a block."""
    (q_index, q_segment, q_branch, q_position), (k_index, k_segment, k_branch, k_position) = q_ids, k_ids
    seen = (k_index <= q_index) & (k_segment == q_segment) & ((k_branch == 0) | (k_branch == q_branch))
    return seen if window is None else seen & (q_position - k_position < window)


def masked_scores(a: Array, b: Array, seen: Array, scoring: Scoring) -> Array:
    """Returns the scores of the rows of a with the rows of b, MASKED where not seen."""
    return jnp.where(seen, capped(matmul(a, b, transposed=True) * scoring.scale, scoring.cap), MASKED)


def add_keys(old: Softmax, scores: Array, v: Array) -> Softmax:
    """Returns the softmax with one more block of keys.

    Keys weigh 1 for a query that has seen none so far; its first score multiplies that by exp(MASKED - score) = 0.
    """
    top = jnp.maximum(old.top, scores.max(-1, keepdims=True))
    p, kept = jnp.exp(scores - top), jnp.exp(old.top - top)
    return Softmax(top, kept * old.total + p.sum(-1, keepdims=True), kept * old.mixed + matmul(p.astype(v.dtype), v))


def normalized(found: Softmax) -> tuple[Array, Array]:
    """Returns the output [Q, d] and the log-sum-exp [Q, 1]; 0 and UNSEEN for a query that sees no key."""
    seen = found.top > MASKED / 2
    total = jnp.where(seen, found.total, 1.0)
    return jnp.where(seen, found.mixed / total, 0.0), jnp.where(seen, found.top + jnp.log(total), UNSEEN)


def score_gradient(scores: Array, p: Array, dp: Array, delta: Array, scoring: Scoring) -> Array:
    """Returns the gradient of the products of queries and keys, from masked scores; see `attention._attend_bwd`."""
    return p * (dp - delta) * (scoring.scale * capped_slope(scores, scoring.cap))
