"""One decoder for all families. Linen holds the parameters, and scans over layers; the mathematics is functions.

Axis letters as in `records`; a cache has P prompts of T tokens, and B sequences with room for N more. Parameters are
float32, with layers stacked on axis 0; activations are in the compute dtype, and matmuls accumulate and norms compute
in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.architecture import Architecture, Rope
from dpo_jax.models.attention import cached_attention, packed_attention
from dpo_jax.records import Array

# Keys and values of prompts [L, P, K, T, d], then of what follows them [L, B, K, N, d], in the compute dtype.
Cache = tuple[Array, ...]

# What the backward pass keeps, by name; the rest is computed again.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("projection", "attention"),
    "none": None,
}

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Context(NamedTuple):
    """What every layer sees beside the hidden states.

    Attributes:
      cos: float32[R, T, 1, dims / 2] of the rotary angles; None with learned positions.
      sin: float32[R, T, 1, dims / 2].
      group: int32[R, T]; None when decoding.
      branch: int32[R, T]; None when decoding.
      place: int32[], how many tokens follow the prompts in the cache; None for whole rows.
      mask: bool[P, T], which tokens of the prompts in the cache are some; None for whole rows.
    """

    cos: Array = None
    sin: Array = None
    group: Array = None
    branch: Array = None
    place: Array = None
    mask: Array = None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def project(x: Array, kernel: Array, bias: Array | None, contract: int) -> Array:
    """Multiplies the last axes of x with the first of a kernel, in the dtype of x, accumulating in float32.

    The kernel is the float32 master: the cast is inside, so that its gradient comes back in float32 though both
    products of the backward pass are of the compute dtype.

    Args:
      x: [..., *inputs] in the compute dtype.
      kernel: float32[*inputs, *outputs].
      bias: float32[*outputs] or None.
      contract: the number of input axes.

    Returns:
      [..., *outputs] in the dtype of x.
    """
    return _project_fwd(x, kernel, bias, contract)[0]


def _product(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def _project_fwd(x, kernel, bias, contract):
    axes = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
    y = _product(x, kernel.astype(x.dtype), axes)
    y = y if bias is None else y + bias
    return y.astype(x.dtype), (x, kernel, bias)


def _project_bwd(contract, residuals, g):
    x, kernel, bias = residuals
    lead = tuple(range(x.ndim - contract))
    outputs = tuple(range(len(lead), g.ndim)), tuple(range(contract, kernel.ndim))
    dx = _product(g, kernel.astype(x.dtype), outputs).astype(x.dtype)
    dw = _product(x, g, (lead, lead))
    return dx, dw, None if bias is None else g.astype(jnp.float32).sum(lead)


project.defvjp(_project_fwd, _project_bwd)

# Cheap elementwise work is done again in the backward pass, which then need not keep its float32 intermediates.
_cheap = partial(jax.checkpoint, prevent_cse=False)


@partial(_cheap, static_argnums=(3, 4))
def normalise(x: Array, scale: Array, bias: Array | None, kind: str, eps: float) -> Array:
    """Layer norm ("layer") or root-mean-square norm ("rms") of the last axis, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(_cheap, static_argnums=(2,))
def activate(up: Array, gate: Array | None, kind: str) -> Array:
    """Returns act(up), or act(gate) * up, computed in float32, in the dtype of `up`."""
    wide = up.astype(jnp.float32)
    act = ACTIVATIONS[kind]
    return (act(wide) if gate is None else act(gate.astype(jnp.float32)) * wide).astype(up.dtype)


def frequencies(rope: Rope) -> np.ndarray:
    """Returns the angle a position of each pair of rotated dimensions, float32[dims / 2].

    Llama 3's scaling divides slow frequencies by `factor`, leaves fast ones, and goes smoothly from one to the
    other between (Llama 3.1's reference code).
    """
    frequency = (1.0 / rope.theta ** (np.arange(0, rope.dims, 2) / rope.dims)).astype(np.float32)
    if rope.scaling == "llama3":
        turns = rope.original_positions * frequency / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = np.clip(smooth, 0.0, 1.0)
        return (kept * frequency + (1 - kept) * frequency / rope.factor).astype(np.float32)
    return frequency / np.float32(rope.factor)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the first dimensions of each head, pairing i with i + dims / 2; x is [R, T, H, d]."""
    if cos is None:
        return x
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class Linear(nn.Module):
    """A projection's parameters: `kernel` [*inputs, *outputs] and, if wanted, `bias` [*outputs]."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Projects x [..., *inputs] to [..., *outputs]."""
        count = len(self.inputs)
        weights = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[count:])
        kernel = self.param("kernel", weights, (*self.inputs, *self.outputs))
        bias = self.param("bias", zeros, self.outputs) if self.bias else None
        return checkpoint_name(project(x, kernel, bias, count), "projection")


class Norm(nn.Module):
    """A norm's parameters: `scale` and, for layer norm, `bias`, both [D]."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis of x [..., D]."""
        a = self.architecture
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        scale = self.param("scale", ones, (a.width,))
        bias = self.param("bias", zeros, (a.width,)) if a.norm == "layer" else None
        return normalise(x, scale, bias, a.norm, a.eps)


def _attention(a: Architecture, x: Array, cache: Cache | None, context: Context) -> tuple[Array, Cache]:
    """Returns attention's addition to the residual, and the keys and values of the tokens in x."""

    def linear(name: str, heads: int, axis: str) -> Linear:
        shape = (heads, a.head_dim)
        return Linear((a.width,), shape, ("embed", axis, "head_dim"), a.qkv_bias, a.initializer_range, name=name)

    q = rotate(linear("q", a.heads, "heads")(x), context.cos, context.sin)
    k = rotate(linear("k", a.kv_heads, "kv_heads")(x), context.cos, context.sin)
    v = linear("v", a.kv_heads, "kv_heads")(x)
    if cache is None:
        mixed = packed_attention(q, k, v, context.group, context.branch)
    else:
        mixed = cached_attention(q, k, v, cache, context.mask, context.place)
    axes = ("heads", "head_dim", "embed")
    std = a.initializer_range * a.residual_scale
    return Linear((a.heads, a.head_dim), (a.width,), axes, a.out_bias, std, name="o")(mixed), (k, v)


def _mlp(a: Architecture, x: Array) -> Array:
    """Returns the MLP's addition to the residual."""

    def linear(name: str) -> Linear:
        return Linear((a.width,), (a.mlp,), ("embed", "mlp"), a.mlp_bias, a.initializer_range, name=name)

    inner = activate(linear("up")(x), linear("gate")(x) if a.gated else None, a.activation)
    std = a.initializer_range * a.residual_scale
    return Linear((a.mlp,), (a.width,), ("mlp", "embed"), a.mlp_bias, std, name="down")(inner)


class Block(nn.Module):
    """One layer."""

    architecture: Architecture
    keep: bool

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, context: Context) -> tuple[Array, Cache | None]:
        """Returns the residual x [R, T, D] after the layer and, if `keep`, its tokens' keys and values."""
        a = self.architecture
        mixed, kept = _attention(a, Norm(a, name="attention_norm")(x), cache, context)
        if a.parallel:
            out = x + mixed + _mlp(a, Norm(a, name="mlp_norm")(x))
        else:
            x = x + mixed
            out = x + _mlp(a, Norm(a, name="mlp_norm")(x))
        return out, kept if self.keep else None


def _lookup(table: Array, index: Array, dtype: Any) -> Array:
    # An id beyond the table reads as NaN, which is noticed; JAX's default would silently read the last row.
    return jnp.asarray(table).at[index].get(mode="fill", fill_value=jnp.nan).astype(dtype)


class Decoder(nn.Module):
    """A decoder-only transformer without its head.

    Attributes:
      architecture: what it is.
      compute: dtype of the activations.
      remat: a name of `POLICIES`.
      keep: whether it returns the keys and values of the tokens it reads.
    """

    architecture: Architecture
    compute: str = "float32"
    remat: str = "none"
    keep: bool = False

    @nn.compact
    def __call__(
        self, tokens: Array, positions: Array, context: Context, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        """Returns hidden states [R, T, D] after the final norm, and new keys and values [L, R, T, K, d] or None.

        Args:
          tokens: int32[R, T].
          positions: int32[R, T].
          context: what the layers see, all but the rotary angles.
          cache: the keys and values before, to decode one token a row.
        """
        a = self.architecture
        normal = nn.initializers.normal(a.initializer_range)
        named = partial(nn.with_logical_partitioning, normal)
        x = _lookup(self.param("embedding", named(("vocab", "embed")), (a.vocab, a.width)), tokens, self.compute)
        if a.rope is None:
            table = self.param("positions", named(("positions", "embed")), (a.max_positions, a.width))
            x = x + _lookup(table, positions, self.compute)
        else:
            angles = positions[..., None, None].astype(jnp.float32) * frequencies(a.rope)
            context = context._replace(cos=jnp.cos(angles), sin=jnp.sin(angles))
        if not a.tied:
            self.param("head", named(("vocab", "embed")), (a.vocab, a.width))
        x, kept = self._layers()(x, cache, context)
        return Norm(a, name="final_norm")(x), kept

    def _layers(self) -> Callable[..., tuple[Array, Cache | None]]:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=POLICIES[self.remat], prevent_cse=False)
        axes: Any = (0, nn.broadcast)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=self.architecture.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.architecture, self.keep, name="layers")
