"""Projections to the heads of attention and from them. Call these functions inside a Linen module.

Axis letters: R rows, T tokens, D model width, H heads, K key-value heads, d head dimension.
"""

import jax.numpy as jnp

from dpo_jax.models.architecture import GLOBAL, OWNERS, Architecture
from dpo_jax.models.layers import Linear, Norm, normalize
from dpo_jax.models.rotary import Angles, rotate
from dpo_jax.records import Array


def head_projection(a: Architecture, kind: str, x: Array, name: str) -> Array:
    """Returns the queries ("q"), keys ("k"), values ("v") or gates ("q_gate") of x, not rotated: [R, T, H or K, d]."""
    of = a.heads_in(kind)
    heads, axis = (a.heads, "heads") if name[0] == "q" else (of.kv_heads, "kv_heads")
    axes = ("embed", axis, "head_dim")
    name = _before(kind) + name
    return Linear((a.width,), (heads, of.head_dim), axes, a.qkv_bias, a.initializer_range, name=name)(x)


def _before(kind: str) -> str:
    """Returns the beginning of the names of attention's parameters in the layers of a kind."""
    return "global_" if kind in GLOBAL else ""


def _rotated(a: Architecture, kind: str, y: Array, name: str, angles: Angles | None) -> Array:
    """Returns queries ("q") or keys ("k"), normalized and rotated."""
    axes = ("heads" if name == "q" else "kv_heads", "head_dim")
    if a.qk_norm:
        first = 1 if a.qk_norm == "head" else 0
        y = Norm(a, y.shape[2 + first :], axes[first:], name=f"{_before(kind)}{name}_norm")(y)
    return rotate(y, angles)


def queries_keys_values(
    a: Architecture, kind: str, x: Array, angles: Angles | None
) -> tuple[Array, Array | None, Array | None]:
    """Returns the queries, keys and values of x; a layer that reads those of another one has queries only."""
    q = _rotated(a, kind, head_projection(a, kind, x, "q"), "q", angles)
    if kind in OWNERS:
        return q, None, None
    plain = head_projection(a, kind, x, "k")
    k = _rotated(a, kind, plain, "k", angles)
    v = plain if a.heads_in(kind).keys_as_values else head_projection(a, kind, x, "v")
    return q, k, normalize(v, jnp.ones(v.shape[-1]), None, a.norm, a.eps) if a.value_norm else v


def output_projection(a: Architecture, kind: str, mixed: Array) -> Array:
    """Returns the output projection [R, T, D] of what attention mixed, [R, T, H, d]."""
    size = a.value_dim if a.latent is not None else a.heads_in(kind).head_dim
    axes, std = ("heads", "head_dim", "embed"), a.initializer_range * a.residual_scale
    return Linear((a.heads, size), (a.width,), axes, a.out_bias, std, name=_before(kind) + "o")(mixed[..., :size])
