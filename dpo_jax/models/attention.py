"""Attention over packed rows, and over a cache of keys and values. Pure functions of arrays.

Axis letters: R rows, T tokens, H query heads, K key-value heads, N = H / K query heads per key-value head, Q queries
in a chunk, S keys that a chunk can see, d head dimension, B sequences, P prompts, C capacity of a cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dpo_jax.models.cache import LayerCache
from dpo_jax.models.remat import ATTENTION, named
from dpo_jax.records import Array

CHUNKS = "chunks"  # name of `packed_attention`, which runs on every device
CHUNK = 128  # queries per chunk: smaller matmuls are inefficient, larger chunks save less above the diagonal
MAX_CHUNKS = 32  # chunks are unrolled in the program, so very long rows get larger ones
MASKED = -1e30  # score of a masked key; finite, because -inf - -inf is NaN
dot = partial(jnp.einsum, preferred_element_type=jnp.float32)

Queries = Float[Any, "R T H d"]
KeyValues = Float[Any, "R T K d"]


class TokenIds(NamedTuple):
    """What the mask knows of tokens in packed rows.

    Attributes:
      index: int32[R, T], the token's place in its row: the causal order.
      segment_ids: int32[R, T]; 0 is padding, which attends to padding.
      branch_ids: int32[R, T]; 0 is the prompt.
      positions: int32[R, T], which measure the window: in every branch they continue from the prompt's end. None
        without a window.
    """

    index: Array
    segment_ids: Array
    branch_ids: Array
    positions: Array = None


class RowMask(NamedTuple):
    """Mask of packed rows: causal, within one segment, and only the prompt plus the token's own branch.

    Attributes:
      queries: the tokens that attend.
      keys: the tokens that they attend to: the same ones, in order, unless devices share the tokens of a row.
      window: int32[], keys at this distance or farther are masked; None without a window.
    """

    queries: TokenIds
    keys: TokenIds
    window: Array = None

    @classmethod
    def of(cls, segment_ids: Array, branch_ids: Array, positions: Array = None, window: Array = None) -> "RowMask":
        """Returns the mask of whole rows."""
        index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
        ids = TokenIds(index, segment_ids, branch_ids, positions)
        return cls(ids, ids, window)


class Scoring(NamedTuple):
    """Score of a query and a key: cap * tanh(scale * q.k / cap), or scale * q.k if `cap` is None."""

    scale: float
    cap: float | None = None


Attend = Callable[..., Array]  # signature of `packed_attention`; `sinks` is given only if a model has them


def capped(x: Array, cap: float | None) -> Array:
    """Returns cap * tanh(x / cap), which is close to x for small x; x itself if `cap` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def capped_slope(y: Array, cap: float | None) -> Array | float:
    """Returns the derivative of `capped` at the point where its value is y; 0, not -inf, where y is `MASKED`."""
    return 1.0 if cap is None else jnp.maximum(1.0 - jnp.square(y / cap), 0.0)


def packed_attention(
    q: Queries,
    k: KeyValues,
    v: KeyValues,
    mask: RowMask,
    scoring: Scoring,
    sinks: Array | None = None,
    *,
    chunk: int = CHUNK,
) -> Queries:
    """Returns causal attention over whole rows, in which a response attends to its own prompt and to itself only.

    Queries are processed in static chunks, and no chunk computes scores for keys after its last query. The backward
    pass saves only the output and the log-sum-exp of the scores, and recomputes the scores (FlashAttention, arXiv
    2205.14135). Scores and softmax are float32.

    Args:
      q: queries [R, T, H, d] in the compute dtype.
      k: keys [R, T, K, d]; H is a multiple of K (grouped-query attention without repeated keys).
      v: values [R, T, K, d].
      mask: which keys a query attends to.
      scoring: scale and cap of the scores.
      sinks: float32[H], the score of a further key that every query of a head sees, with a value of 0; None without.
      chunk: queries per chunk.

    Returns:
      The output [R, T, H, d] in the dtype of q.
    """
    return _attend(q, k, v, sinks, mask, scoring, max(chunk, -(-q.shape[1] // MAX_CHUNKS)))


class CacheMask(NamedTuple):
    """Mask of the cache for the newest token of each sequence.

    Attributes:
      valid: bool[P, T], True for real prompt tokens, False for left padding.
      generated: int32[], tokens generated before the newest one.
      window: int32[], keys at this distance or farther are masked; None without a window.
    """

    valid: Array
    generated: Array
    window: Array = None

    def prompt(self) -> Bool[Any, "P T"]:
        """Returns the mask of the prompts' keys."""
        length = self.valid.shape[1]
        near = True if self.window is None else length + self.generated - jnp.arange(length) < self.window
        return self.valid & near

    def own(self, capacity: int) -> Bool[Any, " C"]:
        """Returns the mask of the generated tokens' keys; the newest token attends to itself."""
        distance = self.generated - jnp.arange(capacity)
        return (distance >= 0) & (True if self.window is None else distance < self.window)


def cached_attention(
    q: Queries,
    k: KeyValues | None,
    v: KeyValues | None,
    cache: LayerCache,
    mask: CacheMask,
    scoring: Scoring,
    sinks: Array | None = None,
) -> tuple[Queries, LayerCache]:
    """Returns attention of the newest token of each sequence over a cache, and the cache with that token.

    Sequences sampled from the same prompt share the prompt's keys and values. One softmax spans the prompt and the
    generated tokens: the maximum, the sum and the output combine over both parts.

    Args:
      q: queries [B, 1, H, d] in the compute dtype; the B / P sequences of a prompt are adjacent.
      k: keys [B, 1, K, d] of the newest tokens; None if the cache has them, as that of another layer.
      v: values [B, 1, K, d] of the newest tokens; None if the cache has them.
      cache: keys and values of the layer.
      mask: which of them the newest token attends to.
      scoring: scale and cap of the scores.
      sinks: as in `packed_attention`.

    Returns:
      The output [B, 1, H, d] in the dtype of q, and the cache with the newest token.
    """
    prompt_keys, prompt_values, *old = cache
    (prompts, kv_heads, _, dim), (rows, _, capacity, _) = prompt_keys.shape, old[0].shape
    # Written before it is read: nothing else needs the old cache then, so XLA updates it in place.
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=mask.generated, axis=2)
    new = [x if y is None else write(x, y.reshape(rows, kv_heads, 1, dim)) for x, y in zip(old, (k, v), strict=True)]
    own_keys, own_values = new
    q = q.reshape(rows, kv_heads, -1, dim)
    own = capped(scoring.scale * dot("bkgd,bktd->bkgt", q, own_keys), scoring.cap)
    own = jnp.where(mask.own(capacity), own, MASKED)
    # One matmul for all queries of a prompt, which reads the prompt's keys once.
    shared = capped(scoring.scale * dot("pkqd,pktd->pkqt", _by_prompt(q, prompts), prompt_keys), scoring.cap)
    shared = jnp.where(mask.prompt()[:, None, None], shared, MASKED)
    top = jnp.maximum(_by_sequence(shared.max(-1, keepdims=True), own.shape), own.max(-1, keepdims=True))
    top, of_sinks = _with_sinks(top, sinks)
    shared, own = jnp.exp(shared - _by_prompt(top, prompts)), jnp.exp(own - top)
    total = _by_sequence(shared.sum(-1, keepdims=True), own.shape) + own.sum(-1, keepdims=True) + of_sinks
    mixed = dot("bkgt,bktd->bkgd", own.astype(q.dtype), own_values)
    mixed += _by_sequence(dot("pkqt,pktd->pkqd", shared.astype(q.dtype), prompt_values), own.shape)
    out = (mixed / total).reshape(rows, 1, -1, dim).astype(q.dtype)
    return out, (prompt_keys, prompt_values, own_keys, own_values)


def by_group(sinks: Array, kv_heads: int) -> Array:
    """[H] -> [K, N, 1, 1], which broadcasts to scores [R, K, N, Q, S]."""
    return sinks.reshape(kv_heads, -1, 1, 1)


def _with_sinks(top: Array, sinks: Array | None) -> tuple[Array, Array | float]:
    """Returns the largest scores [..., K, N, Q, 1] or [B, K, N, 1] with those of sinks [H], and the sinks' exp."""
    if sinks is None:
        return top, 0.0
    wide = sinks.reshape(top.shape[1], -1, *[1] * (top.ndim - 3))
    top = jnp.maximum(top, wide)
    return top, jnp.exp(wide - top)


def _by_prompt(x: Array, prompts: int) -> Array:
    """[B, K, N, X] -> [P, K, B / P * N, X]: groups the queries of all sequences of a prompt."""
    x = x.reshape(prompts, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _by_sequence(x: Array, like: tuple[int, ...]) -> Array:
    """[P, K, B / P * N, X] -> [B, K, N, X]: the inverse of `_by_prompt`; `like` starts with B, K, N."""
    rows, kv_heads, shared, _ = like
    x = x.reshape(len(x), kv_heads, rows // len(x), shared, -1).swapaxes(1, 2)
    return x.reshape(rows, kv_heads, shared, -1)


def by_head(x: Array, kv_heads: int | None = None) -> Array:
    """[R, T, K, d] -> [R, K, T, d]; with `kv_heads`, [R, T, H, d] -> [R, K, N, T, d]."""
    if kv_heads is None:
        return x.transpose(0, 2, 1, 3)
    rows, length, heads, dim = x.shape
    return x.reshape(rows, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def by_token(x: Array) -> Array:
    """[R, K, N, T, d] -> [R, T, H, d], or [R, K, T, d] -> [R, T, K, d]: the inverse of `by_head`."""
    if x.ndim == 4:
        return x.transpose(0, 2, 1, 3)
    rows, kv_heads, shared, length, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, kv_heads * shared, dim)


def visible_keys(mask: RowMask) -> Bool[Any, "R Q S"]:
    """Returns which keys each query attends to; among them always itself."""
    query = jax.tree.map(lambda x: x[:, :, None], mask.queries)
    key = jax.tree.map(lambda x: x[:, None, :], mask.keys)
    same_segment = query.segment_ids == key.segment_ids
    visible = (key.index <= query.index) & same_segment
    visible = visible & ((key.branch_ids == 0) | (key.branch_ids == query.branch_ids))
    return visible if mask.window is None else visible & (query.positions - key.positions < mask.window)


def _chunk_mask(mask: RowMask, start: int, stop: int) -> RowMask:
    """Returns the mask of the queries [start, stop) of whole rows and of the first `stop` keys."""
    queries = jax.tree.map(lambda x: x[:, start:stop], mask.queries)._replace(index=jnp.arange(start, stop)[None])
    keys = jax.tree.map(lambda x: x[:, :stop], mask.keys)._replace(index=jnp.arange(stop)[None])
    return mask._replace(queries=queries, keys=keys)


def _softmax(
    q: Array, k: Array, v: Array, sinks: Array | None, visible: Array, scoring: Scoring
) -> tuple[Array, Array]:
    """Returns a chunk's output [R, K, N, Q, d] and log-sum-exp [R, K, N, Q], in float32."""
    scores = jnp.where(visible[:, None, None], scores_of(q, k, scoring), MASKED)
    top, of_sinks = _with_sinks(scores.max(-1, keepdims=True), sinks)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True) + of_sinks
    out = dot("rknqs,rksd->rknqd", p.astype(v.dtype), v) / total
    return out, (top + jnp.log(total))[..., 0]


def scores_of(q: Array, k: Array, scoring: Scoring) -> Array:
    """Returns float32[R, K, N, Q, S], not yet masked."""
    return capped(dot("rknqd,rksd->rknqs", q, k) * scoring.scale, scoring.cap)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q: Array, k: Array, v: Array, sinks: Array | None, mask: RowMask, scoring: Scoring, chunk: int) -> Array:
    return _attend_fwd(q, k, v, sinks, mask, scoring, chunk)[0]


def _chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    return [(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _attend_fwd(q, k, v, sinks, mask, scoring, chunk):
    queries, keys, values = by_head(q, k.shape[2]), by_head(k), by_head(v)
    # The causal skip: queries a..b meet keys 0..b, so about half of the T x T scores are never computed. Chunk bounds
    # are Python integers because these shapes differ, which a loop inside the program could not express.
    parts = []
    for a, b in _chunks(q.shape[1], chunk):
        visible = visible_keys(_chunk_mask(mask, a, b))
        parts.append(_softmax(queries[..., a:b, :], keys[:, :, :b], values[:, :, :b], sinks, visible, scoring))
    out = by_token(jnp.concatenate([o.astype(q.dtype) for o, _ in parts], axis=3))
    # Named so that a remat policy can keep these two arrays; the backward pass then never reruns this function.
    out = named(out, ATTENTION)
    lse = named(jnp.concatenate([lse for _, lse in parts], axis=3), ATTENTION)
    return out, (q, k, v, sinks, mask, out, lse)


def delta_of(g: Array, out: Array, kv_heads: int) -> Array:
    """Returns g . out of each query, float32[R, K, N, T, 1], for `slopes_of`, from [R, T, H, d]."""
    return by_head((g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True), kv_heads)


def sink_slopes(sinks: Array | None, lse: Array, delta: Array) -> Array | None:
    """Returns the gradient of sinks [H], from log-sum-exps and `delta_of`, float32[R, K, N, T, 1] each.

    A sink has the probability exp(sink - lse) and a value of 0; see `slopes_of`.
    """
    if sinks is None:
        return None
    return -(jnp.exp(by_group(sinks, lse.shape[1]) - lse) * delta).sum((0, 3, 4)).reshape(-1).astype(sinks.dtype)


def slopes_of(
    q: Array, g: Array, lse: Array, delta: Array, k: Array, v: Array, visible: Array, scoring: Scoring
) -> tuple[Array, Array, Array]:
    """Returns the gradients of queries [R, K, N, Q, d], and their share in those of keys and values [R, K, S, d].

    The probabilities are p = exp(score - lse). The gradient of a score is p * (g . v - delta), where delta = g . out is
    one number per query: it equals the sum of p * (g . v) over all keys, and needs only the saved output.

    Args:
      q: queries; g is the cotangent of their output, lse and delta are float32[R, K, N, Q, 1].
      g, lse, delta: see q.
      k: keys.
      v: values.
      visible: bool[R, Q, S].
      scoring: scale and cap of the scores.
    """
    scores = scores_of(q, k, scoring)
    p = jnp.exp(jnp.where(visible[:, None, None], scores, MASKED) - lse)
    dp = dot("rknqd,rksd->rknqs", g, v)
    ds = (p * (dp - delta) * (scoring.scale * capped_slope(scores, scoring.cap))).astype(q.dtype)
    dq = dot("rknqs,rksd->rknqd", ds, k)
    return dq, dot("rknqs,rknqd->rksd", ds, q), dot("rknqs,rknqd->rksd", p.astype(q.dtype), g)


def _attend_bwd(scoring, chunk, residuals, g):
    """Recomputes the probabilities, so that no [T, T] array outlives its chunk."""
    q, k, v, sinks, mask, out, lse = residuals
    kv_heads = k.shape[2]
    queries, keys, values, do = by_head(q, kv_heads), by_head(k), by_head(v), by_head(g, kv_heads)
    delta = delta_of(g, out, kv_heads)
    dq, dk, dv = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for a, b in _chunks(q.shape[1], chunk):
        part = queries[..., a:b, :], do[..., a:b, :], lse[..., a:b, None], delta[..., a:b, :]
        visible = visible_keys(_chunk_mask(mask, a, b))
        d_part, d_keys, d_values = slopes_of(*part, keys[:, :, :b], values[:, :, :b], visible, scoring)
        dq.append(d_part)
        dk = dk.at[:, :, :b].add(d_keys)
        dv = dv.at[:, :, :b].add(d_values)
    dq = by_token(jnp.concatenate(dq, axis=3)).astype(q.dtype)
    d_sinks = sink_slopes(sinks, lse[..., None], delta)
    return dq, by_token(dk).astype(k.dtype), by_token(dv).astype(v.dtype), d_sinks, None


_attend.defvjp(_attend_fwd, _attend_bwd)
