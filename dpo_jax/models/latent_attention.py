"""Multi-head latent attention (arXiv 2405.04434): queries, keys and values of a few numbers a token.

Axis letters: R rows, T tokens, D model width, H heads, d head dimension of queries and keys, e of values.
"""

import dataclasses

import jax.numpy as jnp

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.layers import Linear, Norm
from dpo_jax.models.rotary import Angles, rotate
from dpo_jax.records import Array

EPS = 1e-6  # of the norms of latents in transformers, whatever the model's


def latent_heads(a: Architecture, x: Array, angles: Angles | None) -> tuple[Array, Array, Array]:
    """Returns the queries, keys and values of x [R, T, D], each [R, T, H, max(d, e)]; call it inside a Linen module.

    A head begins with its rotated dimensions, whose keys are those of all heads. The shorter of keys and values ends in
    zeros, which change no score and are cut off the output: every way to attend takes one head dimension.
    """
    assert a.latent is not None
    assert a.rope is not None
    inner, rotated = _latent(a, x, "kv_down", a.latent.keys), a.rope.dims
    k_rotary = _linear(a, x, "k_rotary", (rotated,), ("head_dim",), a.qkv_bias)[..., None, :]
    k = _by_head(a, inner, "k", a.head_dim - rotated)
    shared = jnp.broadcast_to(rotate(k_rotary, angles), (*k.shape[:-1], rotated))
    q = x if a.latent.queries is None else _latent(a, x, "q_down", a.latent.queries)
    q = rotate(_by_head(a, q, "q", a.head_dim), angles)
    v, wide = _by_head(a, inner, "v", a.value_dim), max(a.head_dim, a.value_dim)
    return _padded(q, wide), _padded(jnp.concatenate([shared, k], -1), wide), _padded(v, wide)


def _latent(a: Architecture, x: Array, name: str, size: int) -> Array:
    """Returns a normalized projection of x [R, T, size]."""
    down = _linear(a, x, name, (size,), ("latent",), a.qkv_bias)
    return Norm(dataclasses.replace(a, eps=EPS), (size,), ("latent",), name=f"{name}_norm")(down)


def _by_head(a: Architecture, x: Array, name: str, size: int) -> Array:
    """Returns a projection of latents, or of the residual, [R, T, H, size]."""
    return _linear(a, x, name, (a.heads, size), ("heads", "head_dim"), False)


def _linear(a: Architecture, x: Array, name: str, outputs: tuple[int, ...], axes: tuple[str, ...], bias: bool) -> Array:
    inputs = "latent" if name in ("k", "v") or (name == "q" and a.latent and a.latent.queries) else "embed"
    return Linear((x.shape[-1],), outputs, (inputs, *axes), bias, a.initializer_range, name=name)(x)


def _padded(x: Array, size: int) -> Array:
    return x if x.shape[-1] == size else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
