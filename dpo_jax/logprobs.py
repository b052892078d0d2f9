"""params + Batch -> Logps: log-probs of the scored tokens only, a chunk of logits at a time; or rewards."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.errors import UserError
from dpo_jax.losses.objective import Loss, checked_objective
from dpo_jax.microbatches import concat_microbatches, map_microbatches
from dpo_jax.models.attention import capped, capped_slope
from dpo_jax.models.interface import Model
from dpo_jax.models.routing import token_counts
from dpo_jax.models.split_head import split_log_collisions, split_token_logps
from dpo_jax.records import FLOAT32_ROUNDING, Array, Batch, Logps
from dpo_jax.sharding.row_split import RowSplit

LogpsFn = Callable[[Any, Batch], Logps]  # (params, one microbatch) -> Logps
CHUNK = 512  # tokens whose logits are in memory at a time
# Relative difference between log-probs of the same weights from two programs, by compute dtype.
ROUNDING = {"float32": FLOAT32_ROUNDING, "bfloat16": 2.0**-13}


def _logits(hidden: Array, head: Array, j: Array, size: int, cap: float | None) -> tuple[Array, Array]:
    """Returns chunk j of the hidden states [R, size, D] and its float32 logits [R, size, V]."""
    h = jax.lax.dynamic_slice_in_dim(hidden, j * size, size, axis=1)
    return h, capped(jnp.einsum("rsd,vd->rsv", h, head, preferred_element_type=jnp.float32), cap)


def _is_target(target: Array, j: Array, size: int, vocab: int) -> Array:
    """Returns bool[R, size, V]; a comparison, unlike a gather, needs no communication if the vocabulary is sharded."""
    t = jax.lax.dynamic_slice_in_dim(target, j * size, size, axis=1)
    return t[..., None] == jnp.arange(vocab)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_logps(hidden: Array, head: Array, target: Array, chunks: Array, size: int, cap: float | None = None) -> Array:
    """Returns log p(target | hidden) of each scored token, computed `size` columns at a time.

    The backward pass recomputes the logits, so that memory does not grow with S * V.

    Args:
      hidden: [R, S, D] in the compute dtype, S a multiple of `size`.
      head: float32[V, D]; a narrower dtype if it is not trained.
      target: int32[R, S].
      chunks: int32[], chunks that hold scored tokens; the others stay 0.
      size: columns in a chunk.
      cap: soft cap of the logits, see `capped`.

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

    zeros = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    d_hidden, d_head = jax.lax.fori_loop(0, chunks, body, zeros)
    return d_hidden, d_head.astype(head.dtype), None, None


token_logps.defvjp(_token_logps_fwd, _token_logps_bwd)


def _token_logps_by(model: Model, params: Any, scored: Array, target: Array, chunks: Array, size: int) -> Array:
    """Returns `token_logps` by a model's head, whole or split."""
    cap = model.architecture.logit_cap
    if model.split_head is not None:
        return split_token_logps(scored, model.split_head(params), target, chunks, size, cap)
    return token_logps(scored, model.head(params), target, chunks, size, cap)


def _log_collisions_by(model: Model, params: Any, scored: Array, chunks: Array, size: int) -> Array:
    """Returns `log_collisions` by a model's head, whole or split."""
    cap = model.architecture.logit_cap
    if model.split_head is not None:
        return split_log_collisions(scored, model.split_head(params), chunks, size, cap)
    return log_collisions(scored, model.head(params), chunks, size, cap)


class _Columns(NamedTuple):
    """Scored tokens, of all of a row or of this device's part: `Batch.source` (among the device's tokens), `target` and
    `slot`, whether a token is in the shared part of its response, and its weight (() where there are none)."""

    source: Array
    target: Array
    slot: Array
    shared: Array
    weight: Array | tuple[()]


def _chunked(columns: _Columns, size: int) -> _Columns:
    """Returns the scored-token columns padded to a multiple of a chunk."""
    extra = -columns.slot.shape[1] % size
    pad = partial(jnp.pad, pad_width=((0, 0), (0, extra)))
    return jax.tree.map(pad, columns)._replace(slot=pad(columns.slot, constant_values=-1))


def _own_columns(split: RowSplit, columns: _Columns, length: int, more: int) -> _Columns:
    """Returns the scored tokens whose source is on this device, first, of rows of `length` tokens.

    A token predicts one scored token, but the last one of a prompt one of each response: `more`, at most.
    """
    mine, source = split.locate(columns.source, length)
    mine &= columns.slot >= 0
    kept = jnp.argsort(~mine, axis=1, stable=True)[:, : length // split.parts + more]
    columns = columns._replace(source=source, slot=jnp.where(mine, columns.slot, -1))
    return jax.tree.map(partial(jnp.take_along_axis, indices=kept, axis=1), columns)


def log_collisions(hidden: Array, head: Array, chunks: Array, size: int, cap: float | None = None) -> Array:
    """Returns log sum_v p(v | hidden)^2 of each scored token, float32[R, S], without gradient.

    That two samples of the next token agree, as a log-probability. Args as for `token_logps`.
    """
    hidden, weight = jax.lax.stop_gradient((hidden, head.astype(hidden.dtype)))

    def body(j, out):
        _, logits = _logits(hidden, weight, j, size, cap)
        value = jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(out, value, j * size, axis=1)

    return jax.lax.fori_loop(0, chunks, body, jnp.zeros(hidden.shape[:2], jnp.float32))


def batch_logps(model: Model, params: Any, batch: Batch, *, chunk: int = CHUNK, confidence: bool = False) -> Logps:
    """Returns the log-probs of every response of one microbatch.

    Args:
      model: pure functions of an architecture.
      params: its parameters.
      batch: one microbatch, fields as in `Batch` without the leading axis.
      chunk: tokens whose logits are in memory at a time.
      confidence: whether to compute `Logps.confidence`, at the cost of one more pass of the head.

    Returns:
      Logps of B = R * G comparisons, in the order of the rows.
    """
    shape = batch.ref_logps.shape[:3]
    lengths = _adder(batch.slot, shape)(jnp.ones(batch.slot.shape))
    present = lengths > 0
    counted = token_counts(batch, present) if model.router_loss else None
    scored, columns, chunks, size, routing = _scored(
        model, params, batch, chunk, _is_shared(batch.slot, lengths), counted
    )
    logps = _token_logps_by(model, params, scored, columns.target, chunks, size)
    add, weighted = _adder(columns.slot, shape), len(columns.weight) > 0
    counted_logps = columns.weight * logps if weighted else logps
    sums = [add(counted_logps), add(jnp.where(columns.shared, counted_logps, 0.0))]
    if confidence:
        sums += [add(jax.lax.stop_gradient(logps) - _log_collisions_by(model, params, scored, chunks, size))]
    policy, policy_shared, *sure = model.split.sum(sums) if model.split else sums
    mean = sure[0] / jnp.maximum(lengths, 1) if confidence else jnp.full_like(lengths, jnp.nan)
    # A present response whose reference is not filled in stays NaN, so that the loss is NaN and not wrong.
    reference, reference_shared = jnp.moveaxis(jnp.where(present[..., None], batch.ref_logps, 0.0), -1, 0)
    each = {
        "policy": policy,
        "reference": reference,
        "policy_shared": policy_shared,
        "reference_shared": reference_shared,
        "lengths": lengths,
        "present": present,
        "scores": batch.scores,
        "confidence": mean,
        "rounding": ROUNDING[scored.dtype.name] * (abs(policy) + abs(reference)),
    }
    if weighted:
        each["mass"] = _adder(batch.slot, shape)(batch.token_weights)
    return _by_comparison(batch, each)._replace(routing=routing)


def sequence_logps(model: Model, params: Any, batch: Batch) -> Logps:
    """Returns the log-probs of every response of a batch, as `data.collate` makes it.

    Args:
      model: pure functions of an architecture.
      params: its parameters.
      batch: fields [M, R, ...].

    Returns:
      Logps of M * R * G comparisons in packed order (`unpack` gives that of the examples); absent ones have weight 0.
      `reference` is NaN unless `batch.ref_logps` is filled in.
    """
    chex.assert_rank([batch.tokens, batch.ref_logps], [3, 5])

    def one(micro: Batch) -> Logps:
        return batch_logps(model, params, micro)._replace(running=(), routing=())

    return concat_microbatches(map_microbatches(one, batch, batch.tokens.shape[0]))


def batch_rewards(model: Model, params: Any, batch: Batch) -> Logps:
    """Returns the rewards of every response of one microbatch as `Logps.policy`, by a reward model.

    The reward is the product of the head with the last hidden state that predicts a token of the response, in float32:
    a packed row lacks the response's last token, so `data.noise.append_token` appends one that is not read.

    Args and returns as for `batch_logps`; `lengths` counts the tokens that are read, and there is no reference.
    """
    rows, segments, responses, _ = batch.ref_logps.shape
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids)
    scored = _adder(batch.slot, (rows, segments, responses))(jnp.ones(batch.slot.shape))
    present = scored > 0
    # Tokens of a response are adjacent and in slot order, so the cumulative count ends at its last token.
    last = jnp.maximum(jnp.cumsum(scored.reshape(rows, -1), axis=1).astype(jnp.int32) - 1, 0)
    place = jnp.take_along_axis(batch.source, last, axis=1)
    mine, place = model.split.locate(place, batch.tokens.shape[1]) if model.split else (True, place)
    read = jnp.take_along_axis(hidden, place[..., None], axis=1).astype(jnp.float32)
    rewards = jnp.einsum("rpd,d->rp", read, model.head(params)[0].astype(jnp.float32))
    rewards = jnp.where(present, jnp.where(mine, rewards, 0.0).reshape(present.shape), 0.0)
    rewards = model.split.sum(rewards) if model.split else rewards
    none = jnp.zeros_like(rewards)
    each = {
        "policy": rewards,
        "reference": none,
        "policy_shared": rewards,
        "reference_shared": none,
        "lengths": jnp.maximum(scored - 1.0, 0.0),
        "present": present,
        "scores": batch.scores,
        "confidence": jnp.full_like(rewards, jnp.nan),
        "rounding": ROUNDING[hidden.dtype.name] * abs(rewards),
    }
    return _by_comparison(batch, each)


def _by_comparison(batch: Batch, each: dict[str, Array]) -> Logps:
    """Returns Logps from fields float32[R, G, P] and the comparison fields of the batch."""
    flat = {name: value.reshape(-1, value.shape[-1]) for name, value in each.items()}
    weights, preference = batch.weights.reshape(-1), batch.preference.reshape(-1)
    return Logps(weights=weights, preference=preference, running=jnp.zeros(()), **flat)


def logps_fn(model: Model, loss: Loss) -> LogpsFn:
    """Returns the function that computes the fields of Logps that a loss reads.

    Raises:
      UserError: no objective, or one of a reward model for a language model, or the reverse.
    """
    if checked_objective(loss).rewards != model.architecture.score:
        raise UserError(
            "loss: bradley_terry trains a reward model and all other losses a language model; give the other model"
        )
    if loss.rewards:
        return partial(batch_rewards, model)
    return partial(batch_logps, model, confidence=loss.confidence)


def token_logps_of_batch(model: Model, params: Any, batch: Batch, *, chunk: int = CHUNK) -> Array:
    """Returns the log-prob of every scored token of one microbatch, float32[R, S], aligned with `Batch.slot`."""
    return token_states_of_batch(model, params, batch, chunk=chunk)[0]


def token_states_of_batch(model: Model, params: Any, batch: Batch, *, chunk: int = CHUNK) -> tuple[Array, Array]:
    """Returns `token_logps_of_batch` and the hidden states that predict those tokens, [R, S, D]."""
    assert model.split is None, "a device would have the scored tokens of its part of a row only"
    scored, columns, chunks, size, _ = _scored(model, params, batch, chunk, batch.slot < 0)
    logps = _token_logps_by(model, params, scored, columns.target, chunks, size)
    return logps[:, : batch.slot.shape[1]], scored[:, : batch.slot.shape[1]]


def _scored(
    model: Model, params: Any, batch: Batch, chunk: int, shared: Array, counted: Array | None = None
) -> tuple[Array, _Columns, Array, int, Any]:
    """Returns the hidden states that predict this device's scored tokens, [R, S', D], those tokens, the number of
    chunks that hold any, the chunk size in columns (S' is a multiple of it), and `Logps.routing` by `counted`."""
    columns = _Columns(batch.source, batch.target, batch.slot, shared, batch.token_weights)
    if model.split:
        _, segments, responses = batch.scores.shape
        columns = _own_columns(model.split, columns, batch.tokens.shape[1], segments * (responses - 1))
    size = max(1, min(chunk // len(columns.slot), columns.slot.shape[1]))
    columns = _chunked(columns, size)
    chunks = (-(-jnp.max(jnp.sum(columns.slot >= 0, axis=1)) // size)).astype(jnp.int32)
    fields, routing = (batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids), ()
    if counted is None:
        hidden = model.hidden(params, *fields)
    else:
        hidden, routing = model.hidden(params, *fields, counted=counted)
        routing = model.split.sum(routing) if model.split else routing
    return jnp.take_along_axis(hidden, columns.source[..., None], axis=1), columns, chunks, size, routing


def as_ref_logps(lp: Logps, batch: Batch) -> Array:
    """Returns the log-probs of a microbatch in the layout of `Batch.ref_logps`."""
    return jnp.stack([lp.policy, lp.policy_shared], axis=-1).reshape(batch.ref_logps.shape)


def _adder(slot: Array, shape: tuple[int, int, int]) -> Callable[[Array], Array]:
    """Returns the function that sums over the tokens of each response, float32[R, S] -> float32[R, G, P]."""
    rows, segments, responses = shape
    # Padding is summed in one more segment, which is dropped.
    segment = jnp.where(slot >= 0, slot, segments * responses)
    add = jax.vmap(partial(jax.ops.segment_sum, num_segments=segments * responses + 1))
    return lambda x: add(x, segment)[:, :-1].reshape(rows, segments, responses)


def _is_shared(slot: Array, lengths: Array) -> Array:
    """Returns bool[R, S], whether a scored token is in the shared part of its response (see `Logps`).

    slot: int32[R, S]; lengths: float32[R, G, P].
    """
    rows, _, responses = lengths.shape
    shortest = jnp.min(jnp.where(lengths > 0, lengths, jnp.inf), axis=-1)
    # Tokens of a response are adjacent and in slot order.
    ends = jnp.cumsum(lengths.reshape(rows, -1), axis=1)
    start = jnp.take_along_axis(ends - lengths.reshape(rows, -1), jnp.maximum(slot, 0), axis=1)
    limit = jnp.take_along_axis(shortest, jnp.maximum(slot, 0) // responses, axis=1)
    return (slot >= 0) & (jnp.arange(slot.shape[1]) - start < limit)
