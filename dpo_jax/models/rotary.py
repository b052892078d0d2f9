"""Rotary positions: the angles of positions, and their application to queries and keys."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from dpo_jax.models.architecture import Rope
from dpo_jax.records import Array

Angles = tuple[Array, Array]  # cosine and sine of rotary angles, float32[R, T, 1, dims / 2] each


def frequencies(rope: Rope) -> np.ndarray:
    """Returns float32[dims / 2], radians per position for each pair of rotated dimensions.

    Llama 3's scaling divides low frequencies by `factor`, keeps high ones, and interpolates between them (reference
    code of Llama 3.1).
    """
    stretch = np.asarray(rope.short or 1.0)
    frequency = (1.0 / (stretch * rope.theta ** (np.arange(0, rope.dims, 2) / rope.dims))).astype(np.float32)
    if rope.turned is not None:
        frequency[rope.turned :] = 0
    if rope.scaling == "llama3":
        turns = rope.original_positions * frequency / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = np.clip(smooth, 0.0, 1.0)
        return (kept * frequency + (1 - kept) * frequency / rope.factor).astype(np.float32)
    return frequency / np.float32(rope.factor)


def angles_at(rope: Rope, positions: Int[Any, "..."]) -> tuple[Float32[Any, "..."], Float32[Any, "..."]]:
    """Returns the cosine and the sine of the rotary angles at positions [...], [..., 1, dims / 2] each.

    With LongRoPE and dynamic scaling they are NaN beyond the original context length, where others would apply.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope)
    if rope.end is not None:
        angles = jnp.where(positions[..., None, None] < rope.end, angles, jnp.nan)
    return rope.amplitude * jnp.cos(angles), rope.amplitude * jnp.sin(angles)


def growth_at(rope: Rope | None, positions: Int[Any, "..."]) -> Float32[Any, "..."] | None:
    """Returns what queries at positions [...] are multiplied by, [..., 1, 1]; None for nothing."""
    if rope is None or not rope.growth:
        return None
    contexts = jnp.floor(positions[..., None, None] / rope.original_positions)
    return 1 + rope.growth * jnp.log1p(contexts.astype(jnp.float32))


def layer_angles(kinds: tuple[Angles, ...], window: Array | None, rotated: Array | None) -> Angles | None:
    """Returns the angles of one layer; None with learned positions.

    The scan over layers is traced once, so that what a layer is like is an array, not a Python value: all angles are
    computed before the scan, and every layer selects its own here.

    Args:
      kinds: the angles of all layers, or those of layers without a window and those of layers with one.
      window: int32[], 0 for none.
      rotated: bool[], False for a layer without positions; None if all have them.
    """
    if not kinds:
        return None
    without, within = kinds[0], kinds[-1]
    cos, sin = without if len(kinds) < 2 else jax.tree.map(lambda x, y: jnp.where(window == 0, x, y), without, within)
    return (cos, sin) if rotated is None else (jnp.where(rotated, cos, 1.0), jnp.where(rotated, sin, 0.0))


def rotate(x: Float[Any, "R T heads d"], angles: Angles | None) -> Float[Any, "R T heads d"]:
    """Returns x with the first dimensions of each head rotated, dimension i paired with i + dims / 2."""
    if angles is None:
        return x
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
