"""Linear biases of attention scores (ALiBi, arXiv 2108.12409), as further dimensions of queries and keys.

The score of a key falls with its distance, slope * (key position - query position). The part of the query's position
is the same for all keys and changes no softmax. The other part is a product: ones in the query, slope * position in the
key. So every way to attend, over packed rows, a cache or sharded rows, computes it without knowing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.architecture import Architecture
from dpo_jax.records import Array

# Numbers of bfloat16 whose sum is one of float32. TPUs and newer GPUs round the operands of a float32 matmul, to
# bfloat16 or little more, which would move the bias of a far key by more than the slope.
PARTS = 3


def slopes(heads: int) -> np.ndarray:
    """Returns float32[H], the slope of each head: 2 ** (-8 h / H) for h = 1 .. H if H is a power of two.

    Of other numbers, those of the power of two below, then every second one of the power of two above.
    """
    below = 2 ** int(np.log2(heads))
    first, more = np.arange(1, below + 1) / below, np.arange(1, 2 * (heads - below), 2) / (2 * below)
    return np.exp2(-8 * np.concatenate([first, more])).astype(np.float32)


def bias_dims(a: Architecture) -> int:
    """Returns how many further dimensions queries, keys and values have; 0 without ALiBi."""
    return 0 if a.alibi is None else PARTS


def key_biases(a: Architecture, positions: Array, scale: float, compute: str) -> Array:
    """Returns the further dimensions of keys [R, T, H, 3] for positions [R, T]: each bias as a sum of three numbers.

    Args:
      a: the model; `a.alibi` says whether the biases are multiplied by the scale of scores.
      positions: int32[R, T].
      scale: of scores, which multiplies whatever a key holds.
      compute: dtype of the keys.
    """
    found = jnp.asarray(slopes(a.heads))
    place = positions.astype(jnp.float32)[..., None]
    bias = _rounded(_rounded(found) * _rounded(place)) if a.alibi == "scaled" else found * place / scale
    parts = []
    for _ in range(PARTS):
        parts.append(_rounded(bias))
        bias = bias - parts[-1]
    return jnp.stack(parts, -1).astype(compute)


def with_biases(q: Array, k: Array, v: Array, biases: Array) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values [R, T, H, d + n] with n further dimensions: ones, `key_biases` and zeros."""

    def added(x: Array, more: Array) -> Array:
        return jnp.concatenate([x, jnp.broadcast_to(more, (*x.shape[:-1], biases.shape[-1])).astype(x.dtype)], -1)

    return added(q, jnp.ones(())), added(k, biases), added(v, jnp.zeros(()))


def _rounded(x: Array) -> Array:
    """Returns float32 numbers rounded to bfloat16; a conversion there and back may be left out by the compiler."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
