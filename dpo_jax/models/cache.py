"""The cache of one layer: its beginning after the prompts, and the moves of its sequences.

Axis letters: R prompts, T their tokens, P prompts after a move, B = P * copies sequences, C capacity of the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.records import Array

# Keys and values of one layer: of the prompts [P, K, T, d] twice, then of the generated tokens [B, K, C, d] twice. A
# layer that reads those of another one has none: ().
LayerCache = tuple[Array, ...]


class DeltaCache(NamedTuple):
    """What a layer of linear attention keeps of the tokens so far, of each sequence.

    Attributes:
      window: the last W - 1 inputs of the convolutions of queries, keys and values, [B, W - 1, X] each.
      state: float32[B, H, d, e].
    """

    window: tuple[Array, ...]
    state: Array


Cache = tuple[LayerCache | DeltaCache, ...]  # one entry per layer


def begin_cache(kept: Any, copies: int, room: int) -> LayerCache | DeltaCache:
    """Returns the cache of a layer in which `copies` sequences continue each prompt.

    Args:
      kept: the keys and values of the prompts, [R, T, K, d] each, or (); of a layer of linear attention their
        `DeltaCache`, of which each sequence gets a copy.
      copies: sequences of a prompt.
      room: generated tokens that there is room for.
    """
    if isinstance(kept, DeltaCache):
        return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), kept)
    if not kept:
        return ()
    keys, values = (x.swapaxes(1, 2) for x in kept)
    own = jnp.zeros((len(keys) * copies, keys.shape[1], room, keys.shape[3]), keys.dtype)
    return keys, values, own, own


def move_cache(cache: LayerCache | DeltaCache, prompts: Array, places: Array, capacity: int) -> LayerCache | DeltaCache:
    """Returns the cache of other sequences: those of the former places int32[B], of the prompts int32[P]."""
    if isinstance(cache, DeltaCache):
        return jax.tree.map(lambda x: x[places], cache)
    if not cache:
        return ()

    def own(x: Array) -> Array:
        return jnp.pad(x[places], ((0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0)))

    keys, values, own_keys, own_values = cache
    return keys[prompts], values[prompts], own(own_keys), own(own_values)
