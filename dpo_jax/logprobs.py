"""params + Batch -> Logps: log-probs of the scored tokens only, with no batch of logits ever in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models import Model, capped, capped_slope
from dpo_jax.records import Array, Batch, Logps

CHUNK = 512  # tokens whose logits exist at one time


def _logits(hidden: Array, head: Array, j: Array, size: int, cap: float | None) -> tuple[Array, Array]:
    """Returns chunk j of the hidden states [R, size, D] and its float32 logits [R, size, V]."""
    h = jax.lax.dynamic_slice_in_dim(hidden, j * size, size, axis=1)
    return h, capped(jnp.einsum("rsd,vd->rsv", h, head, preferred_element_type=jnp.float32), cap)


def _is_target(target: Array, j: Array, size: int, vocab: int) -> Array:
    """Returns bool[R, size, V]; a comparison, unlike a gather, stays local where the vocabulary is split."""
    t = jax.lax.dynamic_slice_in_dim(target, j * size, size, axis=1)
    return t[..., None] == jnp.arange(vocab)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_logps(hidden: Array, head: Array, target: Array, chunks: Array, size: int, cap: float | None = None) -> Array:
    """Returns log p(target | hidden) of each scored token, computed `size` columns at a time.

    The backward pass computes the logits again, so that memory does not grow with S * V.

    Args:
      hidden: [R, S, D] in the compute dtype, S a multiple of `size`.
      head: float32[V, D].
      target: int32[R, S].
      chunks: int32[], how many chunks hold scored tokens; the rest is left at 0.
      size: columns in a chunk.
      cap: of the logits, see `capped`.

    Returns:
      float32[R, S].
    """
    return _token_logps_fwd(hidden, head, target, chunks, size, cap)[0]


def _token_logps_fwd(hidden, head, target, chunks, size, cap):
    weight = head.astype(hidden.dtype)

    def body(j, carry):
        picked, total = carry
        _, logits = _logits(hidden, weight, j, size, cap)
        hit = _is_target(target, j, size, head.shape[0])
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=j * size, axis=1)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return put(picked, jnp.where(hit, logits, 0.0).sum(-1)), put(total, lse)

    zeros = jnp.zeros(target.shape, jnp.float32)
    picked, lse = jax.lax.fori_loop(0, chunks, body, (zeros, zeros))
    return picked - lse, (hidden, head, target, chunks, lse)


def _token_logps_bwd(size, cap, residuals, g):
    hidden, head, target, chunks, lse = residuals
    weight = head.astype(hidden.dtype)

    def body(j, carry):
        d_hidden, d_head = carry
        h, logits = _logits(hidden, weight, j, size, cap)
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=j * size, slice_size=size, axis=1)
        hit = _is_target(target, j, size, head.shape[0])
        d = cut(g)[..., None] * (hit - jnp.exp(logits - cut(lse)[..., None])) * capped_slope(logits, cap)
        d = d.astype(hidden.dtype)
        d_h = jnp.einsum("rsv,vd->rsd", d, weight, preferred_element_type=jnp.float32).astype(hidden.dtype)
        d_head += jnp.einsum("rsv,rsd->vd", d, h, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(d_hidden, d_h, j * size, axis=1), d_head

    zeros = (jnp.zeros_like(hidden), jnp.zeros_like(head))
    d_hidden, d_head = jax.lax.fori_loop(0, chunks, body, zeros)
    return d_hidden, d_head, None, None


token_logps.defvjp(_token_logps_fwd, _token_logps_bwd)


def _chunked(source: Array, target: Array, slot: Array, size: int) -> tuple[Array, Array, Array]:
    """Returns the scored-token columns padded to a multiple of a chunk."""
    extra = -slot.shape[1] % size
    pad = partial(jnp.pad, pad_width=((0, 0), (0, extra)))
    return pad(source), pad(target), pad(slot, constant_values=-1)


def batch_logps(model: Model, params: Any, batch: Batch, *, chunk: int = CHUNK) -> Logps:
    """Returns the log-probs of every response of one microbatch.

    Args:
      model: the architecture's pure functions.
      params: its parameters.
      batch: one microbatch, fields as in `Batch` without the leading axis.
      chunk: tokens whose logits exist at one time.

    Returns:
      Logps of B = R * G comparisons, in the order of the rows.
    """
    rows, groups, responses = batch.ref_logps.shape
    size = max(1, min(chunk // rows, batch.slot.shape[1]))
    source, target, slot = _chunked(batch.source, batch.target, batch.slot, size)
    chunks = -(-jnp.max(jnp.sum(slot >= 0, axis=1)) // size)
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.group, batch.branch)
    scored = jnp.take_along_axis(hidden, source[..., None], axis=1)
    cap = model.architecture.logit_cap
    logps: Array = token_logps(scored, model.head(params), target, chunks.astype(jnp.int32), size, cap)
    # Padding goes to one more segment, which is cut off.
    segment = jnp.where(slot >= 0, slot, groups * responses)
    add = jax.vmap(partial(jax.ops.segment_sum, num_segments=groups * responses + 1))
    shape = (rows * groups, responses)
    policy = add(logps, segment)[:, :-1].reshape(shape)
    lengths = add(jnp.ones_like(logps), segment)[:, :-1].reshape(shape)
    present = lengths > 0
    reference = jnp.where(present, batch.ref_logps.reshape(shape), 0.0)  # NaN stays only where one is missing
    return Logps(policy, reference, lengths, present, batch.weights.reshape(-1))


def per_microbatch(function: Callable[[Batch], Any], batch: Batch, count: Array) -> Any:
    """Returns `function` of each of the first `count` microbatches, stacked on a leading axis M, zeros beyond.

    `count` is a run-time value, so that a step with fewer microbatches costs less and compiles nothing new.
    """

    def body(m: Array, out: Any) -> Any:
        value = function(jax.tree.map(lambda x: x[m], batch))
        return jax.tree.map(lambda o, v: o.at[m].set(v), out, value)

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batch))
    many = batch.tokens.shape[0]
    zeros = jax.tree.map(lambda s: jnp.zeros((many, *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, zeros)
