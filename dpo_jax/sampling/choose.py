"""The choice of the next token from logits: greedy, or at random, from all tokens or the most likely ones.

Axis letters: B sequences, V vocabulary. Nothing here sorts the vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.records import Array

BLOCK = 128  # tokens of the vocabulary per block, see `sample_tokens`
SIGN = np.uint32(0x8000_0000)  # bit of a float32


def choose_tokens(
    logits: Array, keys: Array, random: bool, top_k: Array | int | None, top_p: Array | float | None
) -> Array:
    """Returns the next token int32[B] of each row of logits float32[B, V].

    Args:
      logits: float32[B, V].
      keys: random keys [B], of the rows.
      random: sample; False takes the most likely token.
      top_k, top_p: as for `filter_logits`.
    """
    if not random:
        return most_likely_tokens(logits)
    return sample_tokens(filter_logits(logits, top_k, top_p), keys)


def most_likely_tokens(logits: Array) -> Array:
    """Returns the most likely tokens int32[...], the first of equals, of logits float32[..., V] without NaN.

    First the block of consecutive tokens that has it, then the token: `argmax` over V takes a CPU thirteen times as
    long (49,152 tokens, a multiple of a block), because XLA compares one number at a time there.
    """
    blocks = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % BLOCK)], constant_values=-jnp.inf)
    blocks = blocks.reshape(*logits.shape[:-1], -1, BLOCK)
    block = jnp.argmax(blocks.max(-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return (block * BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def filter_logits(logits: Array, top_k: Array | int | None, top_p: Array | float | None) -> Array:
    """Returns float32 logits [B, V] with -inf for excluded tokens; top_k is applied before top_p.

    The most likely token is always kept, and so are tokens as likely as the least likely one that is kept.
    """
    if top_k is not None:
        logits = _keep_while(logits, 1.0, jnp.asarray(top_k, jnp.float32))
    if top_p is not None:
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        logits = _keep_while(logits, weights, top_p * _sum_blocks(weights))
    return logits


def _keep_while(logits: Array, weights: Array | float, limit: Array) -> Array:
    """Returns logits [B, V] with -inf for tokens once the weights of more likely ones reach a limit > 0."""
    return jnp.where(logits < _least_kept(logits, weights, limit), -jnp.inf, logits)


def _least_kept(logits: Array, weights: Array | float, limit: Array) -> Array:
    """Returns float32[B, 1], the least t for which the weights of logits above t sum to less than a limit.

    A binary search over the bits of t, whose order is that of the numbers (`_rank`): 32 passes over any vocabulary.
    """
    low, high = _rank(jnp.float32(-jnp.inf)), _rank(logits.max(-1, keepdims=True))

    def one(step: Array, found: Array) -> Array:
        bit = jnp.uint32(1) << (31 - step).astype(jnp.uint32)
        tried = low + jnp.minimum(found + bit - 1, high - low)
        above = _sum_blocks(jnp.where(logits > _unrank(tried), weights, 0.0))
        return jnp.where(above < limit, found, found + bit)

    return _unrank(low + jax.lax.fori_loop(0, 32, one, jnp.zeros_like(high)))


def _rank(x: Array) -> Array:
    """Returns uint32, in the order of the float32 numbers x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= SIGN, ~bits, bits | SIGN)


def _unrank(rank: Array) -> Array:
    """Returns the float32 numbers of ranks: the inverse of `_rank`."""
    return jax.lax.bitcast_convert_type(jnp.where(rank >= SIGN, rank ^ SIGN, ~rank), jnp.float32)


def _blocks(x: Array, fill: float) -> Array:
    """[..., V] -> [..., BLOCK, V / BLOCK], filled up; tokens of a block are V / BLOCK apart: sums add whole vectors."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)], constant_values=fill)
    return x.reshape(*x.shape[:-1], BLOCK, -1)


def _sum_blocks(x: Array) -> Array:
    """Returns sums [..., 1] over the last axis."""
    return _blocks(x, 0.0).sum(-2).sum(-1, keepdims=True)


def sample_tokens(logits: Array, keys: Array) -> Array:
    """Returns tokens int32[B] sampled with probability softmax(logits), from logits float32[B, V] and keys [B].

    First a block of tokens is sampled by its total probability, then a token of the block: two random numbers per row,
    where Gumbel noise takes V. Exponentials are computed for the sums, and again for the sampled block, but never
    stored.
    """
    blocks = _blocks(logits, -jnp.inf)
    top = blocks.max((1, 2), keepdims=True)
    uniform = jax.vmap(partial(jax.random.uniform, shape=(2,)))(keys)
    block = _sample_index(jnp.exp(blocks - top).sum(1), uniform[:, 0])
    inside = jnp.exp(jnp.take_along_axis(blocks, block[:, None, None], axis=2) - top)[..., 0]
    return block + blocks.shape[2] * _sample_index(inside, uniform[:, 1])


def _sample_index(weights: Array, fraction: Array) -> Array:
    """Returns int32[B], the first index at which the cumulative sum of weights [B, K] exceeds a fraction [B] of all."""
    so_far = jnp.cumsum(weights, axis=-1)
    # A fraction just below 1 may round to the full sum, which is reached at the last weight that is not 0.
    reached = (so_far > fraction[:, None] * so_far[:, -1:]) | (so_far >= so_far[:, -1:])
    return jnp.argmax(reached, axis=-1).astype(jnp.int32)
