"""What a decoder's layers are made of: projections, norms, activations and rotary positions.

Parameters are float32; activations are in the compute dtype, matmuls accumulate and norms compute in float32.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.architecture import Architecture, Rope
from dpo_jax.models.quantized import Quantized, dequantize
from dpo_jax.records import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def project(x: Array, kernel: Array | Quantized, bias: Array | None, contract: int) -> Array:
    """Multiplies the last axes of x with the first of a kernel, in the dtype of x, accumulating in float32.

    The kernel is the float32 master: the cast is inside, so that its gradient comes back in float32 though both
    products of the backward pass are of the compute dtype. One in few bits is made whole for either product and kept
    for neither; it has no gradient.

    Args:
      x: [..., *inputs] in the compute dtype.
      kernel: float32[*inputs, *outputs], in few bits, or narrower where it is not trained.
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
    y = _product(x, dequantize(kernel, x.dtype), axes)
    y = y if bias is None else y + bias
    return y.astype(x.dtype), (x, kernel, bias)


def _project_bwd(contract, residuals, g):
    x, kernel, bias = residuals
    lead = tuple(range(x.ndim - contract))
    outputs = tuple(range(len(lead), g.ndim)), tuple(range(contract, kernel.ndim))
    dx = _product(g, dequantize(kernel, x.dtype), outputs).astype(x.dtype)
    db = None if bias is None else g.astype(jnp.float32).sum(lead).astype(bias.dtype)
    if isinstance(kernel, Quantized):
        return dx, None, db
    return dx, _product(x, g, (lead, lead)).astype(kernel.dtype), db


project.defvjp(_project_fwd, _project_bwd)
# Cheap elementwise work is done again in the backward pass, which then need not keep its float32 intermediates.
_cheap = partial(jax.checkpoint, prevent_cse=False)


@partial(_cheap, static_argnums=(3, 4))
def normalise(x: Array, scale: Array, bias: Array | None, kind: str, eps: float) -> Array:
    """Layer norm ("layer") or root-mean-square norm ("rms") over the axes of `scale`, in float32, in x's dtype."""
    y, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    if kind == "layer":
        y = y - y.mean(axes, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axes, keepdims=True) + eps) * scale
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
    stretch = np.asarray(rope.short or 1.0)
    frequency = (1.0 / (stretch * rope.theta ** (np.arange(0, rope.dims, 2) / rope.dims))).astype(np.float32)
    if rope.scaling == "llama3":
        turns = rope.original_positions * frequency / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = np.clip(smooth, 0.0, 1.0)
        return (kept * frequency + (1 - kept) * frequency / rope.factor).astype(np.float32)
    return frequency / np.float32(rope.factor)


def angles_at(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """Returns the cosine and the sine of the angles at positions [...], float32[..., 1, dims / 2] each.

    They are NaN where LongRoPE has other factors than `short`, which is noticed.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope)
    if rope.scaling == "longrope":
        angles = jnp.where(positions[..., None, None] < rope.original_positions, angles, jnp.nan)
    return rope.amplitude * jnp.cos(angles), rope.amplitude * jnp.sin(angles)


def rotate(x: Array, angles: tuple[Array, Array] | None) -> Array:
    """Rotates the first dimensions of each head, pairing i with i + dims / 2; x is [R, T, H, d]."""
    if angles is None:
        return x
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class Linear(nn.Module):
    """A projection's parameters: `kernel` [*inputs, *outputs] and, if wanted, `bias` [*outputs].

    Where it is given adapters, `lora_a` [*inputs, r] and `lora_b` [r, *outputs], their product is added. Instead of
    `kernel` it may be given `quantised` and `scale`, the same in few bits.
    """

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
        if self.has_variable("params", "quantised"):
            kernel = Quantized(*(self.get_variable("params", name) for name in ("quantised", "scale")))
        else:
            kernel = self.param("kernel", weights, (*self.inputs, *self.outputs))
        bias = self.param("bias", zeros, self.outputs) if self.bias else None
        y: Array = project(x, kernel, bias, count)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            y = y + project(project(x, a, None, count), b, None, 1)
        return checkpoint_name(y, "projection")


class Norm(nn.Module):
    """A norm's parameters: `scale` and, for layer norm, `bias`, of the shape of what is normalised, [D] by default."""

    architecture: Architecture
    shape: tuple[int, ...] = ()
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axes of x [..., *shape]."""
        a, shape = self.architecture, self.shape or (self.architecture.width,)
        one = nn.with_logical_partitioning(nn.initializers.constant(1.0 - a.norm_offset), self.axes)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes)
        scale = self.param("scale", one, shape)
        bias = self.param("bias", zeros, shape) if a.norm == "layer" else None
        return normalise(x, scale + jnp.float32(a.norm_offset), bias, a.norm, a.eps)
