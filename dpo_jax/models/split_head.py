"""Log-probs by a head of which no device ever holds the whole: blocks of the vocabulary, one after the other.

Axis letters: R rows, S scored tokens, D model width, V vocabulary, N devices along fsdp, B blocks, W words in a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import MASKED, capped, capped_slope
from dpo_jax.records import Array

BLOCK = 2**23  # numbers in a block: 32 MiB of float32, matmuls of 2,048 words at a width of 4,096
# A TPU's compiler sums the gradient of a block whole, in place of scattering it, if the number of its words has a prime
# factor of at least `LARGE` (seen with 167 and 251, not with 127). It is then rounded up to a multiple of `TILE`, which
# has none from a width of 1,024 on.
LARGE, TILE = 128, 64


class SplitHead(NamedTuple):
    """A device's part of a head.

    Attributes:
      weight: [V, D / N].
      bias: [V], or None.
      gather: [W, D / N] -> [W, D] from all devices; its transpose sums gradients over them and returns the own part.
      words: W.
    """

    weight: Array
    bias: Array | None
    gather: Callable[[Array], Array]
    words: int


def words_per_block(vocab: int, width: int, block: int = BLOCK) -> int:
    """Returns W: blocks are equal but for padding in the last one. V if one block holds the whole head."""
    blocks = -(-vocab * width // block)
    words = -(-vocab // blocks)
    return words if blocks == 1 or _largest_factor(words) < LARGE else -(-words // TILE) * TILE


def _largest_factor(number: int) -> int:
    """Returns the largest prime factor of a number above 1."""
    factor = 2
    while factor * factor <= number:
        if number % factor:
            factor += 1
        else:
            number //= factor
    return number


def split_token_logps(
    hidden: Array, head: SplitHead, target: Array, chunks: Array, size: int, cap: float | None = None
) -> Array:
    """Returns what `logprobs.token_logps` does, up to rounding. Call it on every device along fsdp.

    The head is gathered one block at a time, forward and again backward, and the gradient of a block is summed over
    devices before the next one's begins: memory for whole numbers is that of a block, not of [V, D].

    Args:
      hidden: [R, S, D] in the compute dtype, or [R, S, D + 1] with a bias; S a multiple of `size`.
      head: this device's part.
      target: int32[R, S].
      chunks: int32[], chunks that hold scored tokens on this device; the others stay 0.
      size: columns in a chunk.
      cap: soft cap of the logits, see `capped`.
    """
    return _logps(hidden, (head.weight, head.bias), target, chunks, _Plan(size, cap, head.gather, head.words))


class _Plan(NamedTuple):
    """Static arguments."""

    size: int
    cap: float | None
    gather: Callable[[Array], Array]
    words: int


def _blocks(head: tuple[Array, Array | None], words: int) -> tuple[Array, Any]:
    """Returns the first word of each block, int32[B], and the head [B, W, ...], padded with zeros."""
    vocab = len(head[0])
    count = -(-vocab // words)

    def one(x: Array) -> Array:
        x = jnp.pad(x, ((0, count * words - vocab),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(count, words, *x.shape[1:])

    return words * jnp.arange(count), jax.tree.map(one, head)


def _whole(plan: _Plan, block: tuple[Array, Array | None]) -> Array:
    """Returns a block as `Model.head` has it: [W, D], or [W, D + 1] with a bias."""
    weight, bias = block
    weight = plan.gather(weight)
    return weight if bias is None else jnp.concatenate([weight, bias[:, None]], axis=1)


def _chunk(plan: _Plan, hidden: Array, weight: Array, first: Array, vocab: int, j: Array) -> tuple[Array, Array, Array]:
    """Returns hidden states [R, size, D] of chunk j, logits float32[R, size, W], and the words int32[W]."""
    h = jax.lax.dynamic_slice_in_dim(hidden, j * plan.size, plan.size, axis=1)
    logits = capped(jnp.einsum("rsd,vd->rsv", h, weight, preferred_element_type=jnp.float32), plan.cap)
    words = first + jnp.arange(len(weight))
    return h, logits if vocab % plan.words == 0 else jnp.where(words < vocab, logits, MASKED), words


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logps(hidden: Array, head: Any, target: Array, chunks: Array, plan: _Plan) -> Array:
    return _logps_fwd(hidden, head, target, chunks, plan)[0]


def _fold(plan: _Plan, hidden: Array, head: Any, chunks: Array, start: tuple[Array, ...], add: Callable) -> Any:
    """Returns float32[R, S] arrays after every chunk of every block of words.

    Args:
      plan, hidden, head, chunks: as for the functions above, with the head as a pair.
      start: the arrays before.
      add: (arrays so far, logits, words, cut) of a chunk -> the arrays; `cut` cuts the chunk out of another array.
    """
    put, vocab = partial(jax.lax.dynamic_update_slice_in_dim, axis=1), len(head[0])

    def one(so_far, given):
        first, block = given
        weight = _whole(plan, block).astype(hidden.dtype)

        def body(j, so_far):
            _, logits, words = _chunk(plan, hidden, weight, first, vocab, j)
            cut = partial(jax.lax.dynamic_slice_in_dim, start_index=j * plan.size, slice_size=plan.size, axis=1)
            news = add(tuple(map(cut, so_far)), logits, words, cut)
            return tuple(put(x, new, j * plan.size) for x, new in zip(so_far, news, strict=True))

        return jax.lax.fori_loop(0, chunks, body, so_far), None

    return jax.lax.scan(one, start, _blocks(head, plan.words))[0]


def split_log_collisions(hidden: Array, head: SplitHead, chunks: Array, size: int, cap: float | None = None) -> Array:
    """Returns what `logprobs.log_collisions` does, up to rounding. Args as for `split_token_logps`."""
    hidden, parts = jax.lax.stop_gradient((hidden, (head.weight, head.bias)))

    def add(so_far, logits, words, cut):
        top, total, squares = so_far
        higher = jnp.maximum(top, logits.max(-1))
        p, kept = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
        return higher, kept * total + p.sum(-1), kept**2 * squares + jnp.square(p).sum(-1)

    zeros = jnp.zeros(hidden.shape[:2], jnp.float32)
    plan, start = _Plan(size, cap, head.gather, head.words), (jnp.full_like(zeros, MASKED), zeros, zeros)
    _, total, squares = _fold(plan, hidden, parts, chunks, start, add)
    computed = total > 0
    return jnp.where(computed, jnp.log(squares + ~computed) - 2 * jnp.log(total + ~computed), 0.0)


def _logps_fwd(hidden, head, target, chunks, plan):
    def add(so_far, logits, words, cut):
        picked, top, total = so_far
        higher = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)
        return picked + jnp.where(cut(target)[..., None] == words, logits, 0.0).sum(-1), higher, total

    zeros = jnp.zeros(target.shape, jnp.float32)
    start = zeros, jnp.full_like(zeros, MASKED), zeros
    picked, top, total = _fold(plan, hidden, head, chunks, start, add)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), 0.0)
    return picked - lse, (hidden, head, target, chunks, lse)


def _logps_bwd(plan, residuals, g):
    hidden, head, target, chunks, lse = residuals
    vocab = len(head[0])

    def one(d_hidden, given):
        first, block = given
        whole, back = jax.vjp(partial(_whole, plan), block)
        weight = whole.astype(hidden.dtype)

        def body(j, so_far):
            d_hidden, d_block = so_far
            h, logits, words = _chunk(plan, hidden, weight, first, vocab, j)
            cut = partial(jax.lax.dynamic_slice_in_dim, start_index=j * plan.size, slice_size=plan.size, axis=1)
            p = jnp.exp(logits - cut(lse)[..., None])
            d = cut(g)[..., None] * ((cut(target)[..., None] == words) - p) * capped_slope(logits, plan.cap)
            d = d.astype(hidden.dtype)
            d_h = cut(d_hidden) + jnp.einsum("rsv,vd->rsd", d, weight, preferred_element_type=jnp.float32)
            d_block += jnp.einsum("rsv,rsd->vd", d, h, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(d_hidden, d_h, j * plan.size, axis=1), d_block

        d_hidden, d_block = jax.lax.fori_loop(0, chunks, body, (d_hidden, jnp.zeros(whole.shape, jnp.float32)))
        return d_hidden, back(d_block.astype(whole.dtype))[0]

    start = jnp.zeros(hidden.shape, jnp.float32)
    d_hidden, d_head = jax.lax.scan(one, start, _blocks(head, plan.words))
    d_head = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:vocab], d_head)
    return d_hidden.astype(hidden.dtype), d_head, None, None


_logps.defvjp(_logps_fwd, _logps_bwd)
