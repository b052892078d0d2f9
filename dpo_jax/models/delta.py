"""The gated delta rule (arXiv 2412.06464) over packed rows, in chunks; and token by token. Pure functions, in float32.

A head has a state S, a matrix from keys to values. A token with the query q, the key k, the value v, the decay
a = exp(g) and the rate b replaces it by S' = a S + b k (v - a S^T k)^T and reads S'^T q. In a packed row a token
continues the state of its parent: the token before it in its prompt or response, or the last token of the prompt for
the first one of a response.

Within a chunk the rule is a triangular system (equations 8 and 9 of arXiv 2406.06484, with decays), whose masks are
those of attention: a token sees its ancestors. What a chunk needs of earlier ones is two states: that of the last token
before it, and that of the last token of its prompt, with which another response begins.

Axis letters: R rows, T tokens, N chunks, C tokens of a chunk, H heads, d of keys, e of values, W taps of a convolution.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.records import Array

CHUNK = 64  # tokens of a chunk; a power of 2
# Matmuls of accelerators round float32 otherwise.
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class DeltaInputs(NamedTuple):
    """What the tokens of rows do to the state, float32.

    Attributes:
      q: [R, T, H, d], of length 1 / sqrt(d).
      k: [R, T, H, d], of length 1.
      v: [R, T, H, e].
      g: [R, T, H], the logarithm of the decay, at most 0.
      b: [R, T, H], between 0 and 1.
    """

    q: Array
    k: Array
    v: Array
    g: Array
    b: Array


class Paths(NamedTuple):
    """Whose state each token of packed rows continues; the same for all layers.

    In the last axis of `enters`, `ends` and `carries` the first is the "run" and the second the "fork": of the tokens
    before a chunk, the last one and the last one of its prompt; of a chunk itself, the same of its own last token.

    Attributes:
      before: int32[R, T, W - 1], places of each token's last ancestors, the nearest last; T for none.
      visible: bool[N, R, 1, C, C], a token's ancestors in its chunk and itself.
      enters: float32[N, R, 1, C, 2], 1 for tokens that continue the state of the run or the fork before the chunk.
      ends: float32[N, R, 1, C, 2], 1 for the ancestors of the chunk's run or fork and for itself.
      carries: float32[N, R, 1, 2, 2], 1 if the chunk's run or fork (first axis) continues the one before it (second).
    """

    before: Array
    visible: Array
    enters: Array
    ends: Array
    carries: Array


def paths_of(segment_ids: Array, branch_ids: Array, taps: int) -> Paths:
    """Returns the paths of packed rows, int32[R, T]: prompts, each followed by its responses; see `Batch`."""
    more = -segment_ids.shape[1] % CHUNK
    padded = (jnp.pad(x, ((0, 0), (0, more)), mode="edge") for x in (segment_ids, branch_ids))
    segment, branch = (x.reshape(len(x), -1, CHUNK).swapaxes(0, 1) for x in padded)  # [N, R, C]
    own = (branch[..., None, :] == 0) | (branch[..., None, :] == branch[..., None])
    visible = jnp.tril((segment[..., None, :] == segment[..., None]) & own)
    last, kind = segment[..., -1:], branch[..., -1:]
    before, old = (jnp.pad(x[:-1], ((1, 0), (0, 0), (0, 0)), constant_values=-1) for x in (last, kind))
    run = (segment == before) & (branch == old)  # at a prompt's end a response continues the fork, the same state
    fork = (segment == before) & ~run
    prompt = (segment == last) & (branch == 0)  # of the chunk's last token, in the chunk
    ended, begun = ~prompt.any(-1), (last == before)[..., 0]
    carries = jnp.stack([run[..., -1], fork[..., -1], begun & ~ended, ended], axis=-1)
    enters, ends = jnp.stack([run, fork], axis=-1), jnp.stack([visible[..., -1, :], prompt], axis=-1)
    masks = (enters, ends, carries.reshape(*carries.shape[:-1], 2, 2))
    return Paths(
        ancestors(segment_ids, branch_ids, taps - 1),
        visible[:, :, None],
        *(x[:, :, None].astype(jnp.float32) for x in masks),
    )


def ancestors(segment_ids: Array, branch_ids: Array, count: int) -> Array:
    """Returns the places of each token's `count` last ancestors int32[R, T, count], the nearest last; T for none."""
    length = segment_ids.shape[1]
    index, missing = jnp.arange(length), ((0, 0), (1, 0))
    prompt = jax.lax.cummax(jnp.where(branch_ids == 0, index, -1), axis=1)
    segment, branch = (jnp.pad(x[:, :-1], missing, constant_values=-1) for x in (segment_ids, branch_ids))
    follows = (segment_ids == segment) & (branch_ids == branch)
    parent = jnp.where(follows, index - 1, jnp.where(branch_ids == 0, length, prompt))
    # One more place, whose parent is itself, stands for no token.
    parent = jnp.pad(parent, ((0, 0), (0, 1)), constant_values=length)
    found = [parent]
    for _ in range(count - 1):
        found.append(jnp.take_along_axis(parent, found[-1], axis=1))
    return jnp.stack(found[::-1], axis=-1)[:, :length]


@jax.custom_vjp
def unit_inverse(a: Array) -> Array:
    """Returns the inverse of I + a, float32[..., C, C], where a is strictly lower triangular and C a power of 2.

    Diagonal blocks are inverted; two neighbors and the block below the first become one of twice the size.
    """
    place, identity = jnp.arange(a.shape[-1]), jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

    def join(n: Array, inverse: Array) -> Array:
        pair, second = place >> (n + 1), (place >> n) % 2 == 1
        corner = (pair[:, None] == pair) & second[:, None] & ~second
        return inverse - matmul(matmul(inverse, jnp.where(corner, a, 0.0)), inverse)

    return jax.lax.fori_loop(0, a.shape[-1].bit_length() - 1, join, identity)


def _unit_inverse_fwd(a):
    inverse = unit_inverse(a)
    return inverse, inverse


def _unit_inverse_bwd(inverse, g):
    transposed = inverse.swapaxes(-1, -2)
    return (-matmul(matmul(transposed, g), transposed),)


unit_inverse.defvjp(_unit_inverse_fwd, _unit_inverse_bwd)


def packed_delta(x: DeltaInputs, paths: Paths) -> tuple[Array, Array]:
    """Returns what the tokens of packed rows read, float32[R, T, H, e], and the rows' last states, float32[R, H, d, e].

    A response begins with the state of its prompt's end, and a comparison with an empty one.
    """
    rows, length, heads, dim = x.q.shape
    # What is added follows the last token, and neither decays nor writes.
    more = -length % CHUNK
    x = DeltaInputs(*(jnp.pad(y, ((0, 0), (0, more)) + ((0, 0),) * (y.ndim - 2)) for y in x))
    states = jnp.zeros((rows, heads, 2 * dim, x.v.shape[-1]), jnp.float32)
    states, read = jax.lax.scan(_next_chunk, states, _chunks(x, paths))
    read = read.transpose(1, 0, 3, 2, 4)  # [N, R, H, C, e] -> [R, N, C, H, e]
    return read.reshape(rows, -1, *read.shape[3:])[:, :length], states[:, :, :dim]


class _Chunk(NamedTuple):
    """What a chunk does to the states of the run and the fork, of which S [2d, e] is the one above the other.

    Attributes:
      values: [R, H, C, e], what tokens write if S is 0.
      reads: [R, H, 2C, 2d], with which they read S, first to correct what they write and then for themselves.
      scores: [R, H, C, C], by which they read what their ancestors in the chunk write.
      writes: [R, H, C, 2d], keys with which they write to the new S.
      carries: [R, H, 2, 2], what the new states keep of the old ones.
    """

    values: Array
    reads: Array
    scores: Array
    writes: Array
    carries: Array


def _next_chunk(states: Array, c: _Chunk) -> tuple[Array, Array]:
    """Returns the states after a chunk, and what its tokens read."""
    correction, old = jnp.split(matmul(c.reads, states), 2, axis=-2)
    written = c.values - correction
    kept = matmul(c.carries, states.reshape(*states.shape[:2], 2, -1)).reshape(states.shape)
    return kept + matmul(c.writes.swapaxes(-1, -2), written), old + matmul(c.scores, written)


def _chunks(x: DeltaInputs, paths: Paths) -> _Chunk:
    """Returns the chunks [N, ...] of rows whose length is a multiple of `CHUNK`."""
    q, k, v, g, b = (jnp.moveaxis(y.reshape(len(y), -1, CHUNK, *y.shape[2:]), (1, 3), (0, 2)) for y in x)
    visible, rated = paths.visible, k * b[..., None]
    total = matmul(visible.astype(jnp.float32), g[..., None])  # log-decays of ancestors and itself, [N, R, H, C, 1]
    decay = jnp.exp(jnp.where(visible, total - total.swapaxes(-1, -2), -jnp.inf))
    system, scores = jnp.split(matmul(jnp.concatenate([rated, q], axis=-2), k.swapaxes(-1, -2)), 2, axis=-2)
    inverse = unit_inverse(jnp.tril(system * decay, -1))
    enters = paths.enters * jnp.exp(total)
    solved = matmul(inverse, jnp.concatenate([v * b[..., None], _for_both(rated, enters)], axis=-1))
    values, keys = jnp.split(solved, (v.shape[-1],), axis=-1)
    last = matmul(g[..., None, :], paths.ends)  # [N, R, H, 1, 2]
    ends = jnp.exp(jnp.where(paths.ends > 0, last - total, -jnp.inf))
    return _Chunk(
        values,
        reads=jnp.concatenate([keys, _for_both(q, enters)], axis=-2),
        scores=scores * decay,
        writes=_for_both(k, ends),
        carries=paths.carries * jnp.exp(last).swapaxes(-1, -2),
    )


def _for_both(x: Array, weight: Array) -> Array:
    """Returns x [..., C, d] times weights [..., C, 2] of the run and the fork, [..., C, 2d]."""
    return jnp.concatenate([x * weight[..., :1], x * weight[..., 1:]], axis=-1)


def delta_step(state: Array, x: DeltaInputs) -> tuple[Array, Array]:
    """Returns what one token of each sequence reads [R, H, e], and the new states; `x` without the axis of tokens.

    Args:
      state: float32[R, H, d, e].
      x: [R, H, ...].
    """
    state = state * jnp.exp(x.g)[..., None, None]
    written = (x.v - matmul(x.k[..., None, :], state)[..., 0, :]) * x.b[..., None]
    state = state + x.k[..., None] * written[..., None, :]
    return matmul(x.q[..., None, :], state)[..., 0, :], state
