"""Attention over packed rows, and over a cache of keys and values: pure functions of arrays.

Axis letters: R rows, T tokens, H query heads, K key-value heads, N = H / K query heads that share one key-value
head, Q queries in a chunk, S keys that a chunk can see, d head dimension, B sequences, C capacity of a cache.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.records import Array

CHUNK = 128  # queries at a time: below it a matmul is too small, above it the causal skip saves less
MAX_CHUNKS = 32  # the chunks are unrolled in the program, so very long rows get larger ones
LOWEST = -1e30  # the score of a key that is not seen; finite, so that no difference of scores is NaN
_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


class RowMask(NamedTuple):
    """Mask of a packed row: causal, within one segment, only the prompt and its own branch.

    Attributes:
      segment_ids: int32[R, T]; 0 is padding, which sees padding.
      branch_ids: int32[R, T]; 0 is the prompt.
      positions: int32[R, T], or None where there is no window.
      window: int32[], keys at this distance in `positions` or farther are not seen.
    """

    segment_ids: Array
    branch_ids: Array
    positions: Array = None
    window: Array = None


class Scoring(NamedTuple):
    """How a query scores a key: cap * tanh(scale * q.k / cap), or scale * q.k where `cap` is None."""

    scale: float
    cap: float | None = None


def capped(x: Array, cap: float | None) -> Array:
    """Returns cap * tanh(x / cap), which is nearly x where x is small; x itself where `cap` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def capped_slope(y: Array, cap: float | None) -> Array | float:
    """Returns the derivative of `capped` from its value."""
    return 1.0 if cap is None else 1.0 - jnp.square(y / cap)


def packed_attention(q: Array, k: Array, v: Array, rows: RowMask, scoring: Scoring, *, chunk: int = CHUNK) -> Array:
    """Causal attention in which a response sees its own prompt and itself, never a sibling or a neighbour.

    Queries go in static chunks and a chunk computes no score to its right; the backward pass keeps only the
    output and the log-sum-exp, and computes the scores again. Scores and softmax are float32.

    Args:
      q: [R, T, H, d] in the compute dtype.
      k: [R, T, K, d], H a multiple of K: grouped-query attention without repeating keys.
      v: [R, T, K, d].
      rows: which keys a query sees.
      scoring: how it scores them.
      chunk: queries at a time.

    Returns:
      [R, T, H, d] in the dtype of q.
    """
    return _attend(q, k, v, rows, scoring, max(chunk, -(-q.shape[1] // MAX_CHUNKS)))


class CacheMask(NamedTuple):
    """Which tokens of a cache the new token of each sequence sees.

    Attributes:
      valid: bool[P, T], which tokens of the prompts are some; prompts end at the right.
      place: int32[], how many own tokens there were before the new one.
      window: int32[], keys at this distance or farther are not seen; None where there is no window.
    """

    valid: Array
    place: Array
    window: Array = None

    def prompt(self) -> Array:
        """Which tokens of the prompts are seen, bool[P, T]."""
        length = self.valid.shape[1]
        near = True if self.window is None else length + self.place - jnp.arange(length) < self.window
        return self.valid & near

    def own(self, room: int) -> Array:
        """Which of the places for own tokens are seen, bool[N]; the new token sees itself."""
        distance = self.place - jnp.arange(room)
        return (distance >= 0) & (True if self.window is None else distance < self.window)


def cached_attention(
    q: Array, k: Array, v: Array, cache: tuple[Array, ...], seen: CacheMask, scoring: Scoring
) -> tuple[Array, tuple[Array, ...]]:
    """Attention of one new token a sequence over a cache, in which the sequences of a prompt share its part.

    Args:
      q: [B, 1, H, d] in the compute dtype; the B / P sequences of a prompt follow each other.
      k: [B, 1, K, d], the new token's.
      v: [B, 1, K, d].
      cache: keys and values of the prompts [P, K, T, d], then those of the sequences' own tokens [B, K, N, d].
      seen: which of them are seen.
      scoring: how they are scored.

    Returns:
      [B, 1, H, d] in the dtype of q, and the cache with the new token.
    """
    prompt_keys, prompt_values, *old = cache
    (prompts, kv_heads, _, dim), (rows, _, room, _) = prompt_keys.shape, old[0].shape
    # Written before it is read: nothing else then needs the old cache, so that it is written in place.
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=seen.place, axis=2)
    own_keys, own_values = (put(a, b.reshape(rows, kv_heads, 1, dim)) for a, b in zip(old, (k, v), strict=True))
    q = q.reshape(rows, kv_heads, -1, dim)
    own = capped(scoring.scale * _dot("bkgd,bktd->bkgt", q, own_keys), scoring.cap)
    own = jnp.where(seen.own(room), own, LOWEST)
    # All queries of a prompt meet its keys in one product, so that these are read once.
    shared = capped(scoring.scale * _dot("pkqd,pktd->pkqt", _by_prompt(q, prompts), prompt_keys), scoring.cap)
    shared = jnp.where(seen.prompt()[:, None, None], shared, LOWEST)
    top = jnp.maximum(_by_sequence(shared.max(-1, keepdims=True), own.shape), own.max(-1, keepdims=True))
    shared, own = jnp.exp(shared - _by_prompt(top, prompts)), jnp.exp(own - top)
    total = _by_sequence(shared.sum(-1, keepdims=True), own.shape) + own.sum(-1, keepdims=True)
    mixed = _dot("bkgt,bktd->bkgd", own.astype(v.dtype), own_values)
    mixed += _by_sequence(_dot("pkqt,pktd->pkqd", shared.astype(v.dtype), prompt_values), own.shape)
    out = (mixed / total).reshape(rows, 1, -1, dim).astype(v.dtype)
    return out, (prompt_keys, prompt_values, own_keys, own_values)


def _by_prompt(x: Array, prompts: int) -> Array:
    """[B, K, N, X] -> [P, K, B / P * N, X]: what the sequences of a prompt have for each of its heads."""
    x = x.reshape(prompts, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _by_sequence(x: Array, like: tuple[int, ...]) -> Array:
    """[P, K, B / P * N, X] -> [B, K, N, X], of which `like` has the first three sizes."""
    rows, kv_heads, shared, _ = like
    x = x.reshape(len(x), kv_heads, rows // len(x), shared, -1).swapaxes(1, 2)
    return x.reshape(rows, kv_heads, shared, -1)


def _by_head(x: Array, kv_heads: int | None = None) -> Array:
    """[R, T, K, d] -> [R, K, T, d]; with `kv_heads`, [R, T, H, d] -> [R, K, N, T, d]."""
    if kv_heads is None:
        return x.transpose(0, 2, 1, 3)
    rows, length, heads, dim = x.shape
    return x.reshape(rows, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _by_token(x: Array) -> Array:
    """[R, K, N, T, d] -> [R, T, H, d], or [R, K, T, d] -> [R, T, K, d]."""
    if x.ndim == 4:
        return x.transpose(0, 2, 1, 3)
    rows, kv_heads, shared, length, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, kv_heads * shared, dim)


def visible_keys(rows: RowMask, start: int, stop: int) -> Array:
    """Returns bool[R, Q, S]: which of the first `stop` keys each query of [start, stop) sees; always itself."""
    query, key = (jax.tree.map(cut, rows._replace(window=None)) for cut in (
        lambda x: x[:, start:stop, None], lambda x: x[:, None, :stop]
    ))  # fmt: skip
    causal = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
    seen = (
        causal & (query.segment_ids == key.segment_ids) & ((key.branch_ids == 0) | (key.branch_ids == query.branch_ids))
    )
    return seen if rows.window is None else seen & (query.positions - key.positions < rows.window)


def _softmax(q: Array, k: Array, v: Array, seen: Array, scoring: Scoring) -> tuple[Array, Array]:
    """Returns the output [R, K, N, Q, d] and the log-sum-exp [R, K, N, Q] of some queries, in float32."""
    scores = jnp.where(seen[:, None, None], _scores(q, k, scoring), LOWEST)
    top = scores.max(-1, keepdims=True)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    out = _dot("rknqs,rksd->rknqd", p.astype(v.dtype), v) / total
    return out, (top + jnp.log(total))[..., 0]


def _scores(q: Array, k: Array, scoring: Scoring) -> Array:
    """Returns float32[R, K, N, Q, S], of the keys that are not seen as well."""
    return capped(_dot("rknqd,rksd->rknqs", q, k) * scoring.scale, scoring.cap)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, rows: RowMask, scoring: Scoring, chunk: int) -> Array:
    return _attend_fwd(q, k, v, rows, scoring, chunk)[0]


def _spans(length: int, chunk: int) -> list[tuple[int, int]]:
    return [(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _attend_fwd(q, k, v, rows, scoring, chunk):
    queries, keys, values = _by_head(q, k.shape[2]), _by_head(k), _by_head(v)
    parts = [
        _softmax(queries[..., a:b, :], keys[:, :, :b], values[:, :, :b], visible_keys(rows, a, b), scoring)
        for a, b in _spans(q.shape[1], chunk)
    ]
    out = _by_token(jnp.concatenate([o.astype(q.dtype) for o, _ in parts], axis=3))
    # Named, so that a policy of what the backward pass keeps can keep these two and skip this function.
    out = checkpoint_name(out, "attention")
    lse = checkpoint_name(jnp.concatenate([lse for _, lse in parts], axis=3), "attention")
    return out, (q, k, v, rows, out, lse)


def _attend_bwd(scoring, chunk, residuals, g):
    q, k, v, rows, out, lse = residuals
    kv_heads = k.shape[2]
    queries, keys, values, do = _by_head(q, kv_heads), _by_head(k), _by_head(v), _by_head(g, kv_heads)
    delta = _by_head((g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True), kv_heads)
    dq, dk, dv = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for a, b in _spans(q.shape[1], chunk):
        part, d_part = queries[..., a:b, :], do[..., a:b, :]
        scores = _scores(part, keys[:, :, :b], scoring)
        seen = visible_keys(rows, a, b)[:, None, None]
        p = jnp.exp(jnp.where(seen, scores, LOWEST) - lse[..., a:b, None])
        dp = _dot("rknqd,rksd->rknqs", d_part, values[:, :, :b])
        slope = scoring.scale * capped_slope(scores, scoring.cap)
        ds = (p * (dp - delta[..., a:b, :]) * slope).astype(q.dtype)
        dq.append(_dot("rknqs,rksd->rknqd", ds, keys[:, :, :b]))
        dk = dk.at[:, :, :b].add(_dot("rknqs,rknqd->rksd", ds, part))
        dv = dv.at[:, :, :b].add(_dot("rknqs,rknqd->rksd", p.astype(q.dtype), d_part))
    dq = _by_token(jnp.concatenate(dq, axis=3)).astype(q.dtype)
    return dq, _by_token(dk).astype(k.dtype), _by_token(dv).astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
