"""Parts of a decoder layer: projections, norms and activations.

Parameters are float32 and activations are in the compute dtype. Matmuls accumulate and norms compute in float32.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.quantized import Quantized, dequantize
from dpo_jax.models.remat import ACTIVATION, PROJECTION, saved
from dpo_jax.records import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "clamped": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
LIMIT = 7.0  # of the inputs of "clamped"


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def project(x: Array, kernel: Array | Quantized, bias: Array | None, contract: int) -> Array:
    """Returns x @ kernel + bias in the dtype of x, accumulated in float32.

    Args:
      x: [..., *inputs] in the compute dtype.
      kernel: [*inputs, *outputs], float32 or, if it is not trained, narrower or quantized. A quantized kernel gets no
        gradient.
      bias: float32[*outputs] or None.
      contract: number of input axes.

    Returns:
      [..., *outputs] in the dtype of x.
    """
    return _project_fwd(x, kernel, bias, contract)[0]


def _matmul(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


# Why `project` has a derivative of its own. Autodiff of `dot(x, kernel.astype(bfloat16))` would return the kernel's
# gradient in bfloat16 and only then widen it, so the sum over tokens would be rounded. Here the cast is inside:
# matmuls read the compute dtype, and the gradient leaves its float32 accumulator unrounded. The residuals hold the
# kernel as it is stored; the cast or dequantized copy is made for each matmul and saved for neither.


def _project_fwd(x, kernel, bias, contract):
    axes = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
    y = _matmul(x, dequantize(kernel, x.dtype), axes)
    y = y if bias is None else y + bias
    return y.astype(x.dtype), (x, kernel, bias)


def _project_bwd(contract, residuals, g):
    x, kernel, bias = residuals
    batch = tuple(range(x.ndim - contract))
    outputs = tuple(range(len(batch), g.ndim)), tuple(range(contract, kernel.ndim))
    dx = _matmul(g, dequantize(kernel, x.dtype), outputs).astype(x.dtype)
    db = None if bias is None else g.astype(jnp.float32).sum(batch).astype(bias.dtype)
    if isinstance(kernel, Quantized):
        return dx, None, db
    x = jax.lax.optimization_barrier(x)
    return dx, _matmul(x, g, (batch, batch)).astype(kernel.dtype), db


project.defvjp(_project_fwd, _project_bwd)
# Elementwise functions are recomputed in the backward pass, so that their float32 intermediates are not saved.
_recompute = partial(jax.checkpoint, prevent_cse=False)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: Array, scale: Array, bias: Array | None, kind: str, eps: float) -> Array:
    """Returns x normalized over the axes of `scale`, computed in float32, in the dtype of x.

    Args:
      x: [..., *shape].
      scale: float32[*shape].
      bias: float32[*shape] or None.
      kind: "layer" for layer norm, "rms" for root-mean-square norm.
      eps: added to the variance or mean square.
    """
    return _normalize_fwd(x, scale, bias, kind, eps)[0]


def _normalize_fwd(x, scale, bias, kind, eps):
    y, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    if kind == "layer":
        y = y - y.mean(axes, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axes, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, bias)


def _normalize_bwd(kind, eps, residuals, g):
    # On a CPU the sums that autodiff makes, of products of three arrays, take ten times as long as these: over the
    # tokens as one axis, and over the features as a product with a vector.
    x, scale, bias = residuals
    y, dy = (z.astype(jnp.float32).reshape(-1, scale.size) for z in (x, g))
    if kind == "layer":
        y = y - y.mean(1, keepdims=True)
    inverse = jax.lax.rsqrt((y * y).mean(1, keepdims=True) + eps)
    product = dy * y
    slope = jnp.dot(product, scale.reshape(-1, 1), precision=jax.lax.Precision.HIGHEST)
    slope = slope * jnp.square(inverse) / scale.size
    dx = inverse * (dy * scale.reshape(-1) - y * slope)
    if kind == "layer":
        dx = dx - dx.mean(1, keepdims=True)
    dscale = (product * inverse).sum(0).reshape(scale.shape)
    dbias = None if bias is None else dy.sum(0).reshape(bias.shape)
    return dx.reshape(x.shape).astype(x.dtype), dscale, dbias


normalize.defvjp(_normalize_fwd, _normalize_bwd)


@partial(_recompute, static_argnums=(2,))
def activate(up: Array, gate: Array | None, kind: str) -> Array:
    """Returns act(up), or act(gate) * up, computed in float32, in the dtype of `up`.

    "clamped" is act(min(gate, 7)) * (clip(up, -7, 7) + 1), as in GPT-OSS (arXiv 2508.10925).
    """
    act, wide = ACTIVATIONS[kind], up.astype(jnp.float32)
    if gate is None:
        return act(wide).astype(up.dtype)
    inner: Array = gate.astype(jnp.float32)
    if kind == "clamped":
        inner, wide = jnp.minimum(inner, LIMIT), jnp.clip(wide, -LIMIT, LIMIT) + 1
    return (act(inner) * wide).astype(up.dtype)


def scaled(x: Array, factor: float) -> Array:
    """Returns x times a number, in the dtype of x."""
    # A factor that is rounded to bfloat16 would be up to 0.4% off, and the same way in every layer.
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class Linear(nn.Module):
    """A projection with parameters `kernel` [*inputs, *outputs] and, if `bias`, `bias` [*outputs].

    Optional leaves of the parameters change what it computes:
      `lora_a` [*inputs, r] and `lora_b` [r, *outputs]: the product x A B is added (LoRA).
      `quantized` and `scale`: replace `kernel` (QLoRA).

    Attributes:
      inputs: sizes of the input axes.
      outputs: sizes of the output axes.
      axes: logical names of all axes of the kernel.
      bias: whether there is a bias.
      std: standard deviation of new weights.
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
        if self.has_variable("params", "quantized"):
            kernel = Quantized(*(self.get_variable("params", name) for name in ("quantized", "scale")))
        else:
            kernel = self.param("kernel", weights, (*self.inputs, *self.outputs))
        bias = self.param("bias", zeros, self.outputs) if self.bias else None
        y: Array = project(x, kernel, bias, count)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            y = y + project(project(x, a, None, count), b, None, 1)
        return saved(y, PROJECTION)


class Norm(nn.Module):
    """A norm with parameters `scale` and, for layer norm with a bias, `bias`, both of shape `shape`, [D] by default."""

    architecture: Architecture
    shape: tuple[int, ...] = ()
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes the last axes of x [..., *shape]."""
        a, shape = self.architecture, self.shape or (self.architecture.width,)
        # The scale of a Gemma norm is `norm_offset` + its parameter, so that a new parameter is 1 - norm_offset.
        one = nn.with_logical_partitioning(nn.initializers.constant(1.0 - a.norm_offset), self.axes)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes)
        scale = self.param("scale", one, shape)
        bias = self.param("bias", zeros, shape) if a.norm == "layer" and a.norm_bias else None
        return saved(normalize(x, scale + jnp.float32(a.norm_offset), bias, a.norm, a.eps), ACTIVATION)


class Sinks(nn.Module):
    """The scores of the attention sinks of all heads, `score` [H]."""

    heads: int
    std: float

    @nn.compact
    def __call__(self) -> Array:
        """Returns float32[H]."""
        drawn = nn.with_logical_partitioning(nn.initializers.normal(self.std), ("heads",))
        return jnp.asarray(self.param("score", drawn, (self.heads,)), jnp.float32)


class Constant(nn.Module):
    """A number that multiplies its input, `constant` [1]. It is not trained."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns x times the number, in the dtype of x."""
        one = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        factor = jax.lax.stop_gradient(jnp.asarray(self.param("constant", one, (1,)), jnp.float32))
        return (x.astype(jnp.float32) * factor).astype(x.dtype)


def mlp(a: Architecture, x: Array, size: int, before: str = "") -> Array:
    """Returns the MLP branch [R, T, D] of an inner width; call it inside a Linen module.

    `before` begins the names of its projections.
    """

    def linear(name: str) -> Linear:
        axes = ("embed", "mlp")
        return Linear((a.width,), (size,), axes, a.mlp_bias, a.initializer_range, name=f"{before}{name}")

    inner = saved(activate(linear("up")(x), linear("gate")(x) if a.gated else None, a.activation), ACTIVATION)
    std = a.initializer_range * a.residual_scale
    return Linear((size,), (a.width,), ("mlp", "embed"), a.mlp_bias, std, name=f"{before}down")(inner)
