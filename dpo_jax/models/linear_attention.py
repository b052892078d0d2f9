"""Layers of linear attention: projections, a short convolution, the gated delta rule, a gated norm (arXiv 2412.06464).

Axis letters: R rows, T tokens, D model width, H value heads, d of keys, e of values, X channels, W taps, B sequences.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.architecture import Architecture, Delta
from dpo_jax.models.cache import DeltaCache
from dpo_jax.models.delta import DeltaInputs, Paths, delta_step, packed_delta
from dpo_jax.models.layers import Linear
from dpo_jax.models.remat import ACTIVATION, saved
from dpo_jax.records import Array

QKV = ("q", "k", "v")
LEAST = 1e-6  # added to the squared length of queries and keys


def delta_attention(
    a: Architecture, x: Array, cache: DeltaCache | None, paths: Paths | None
) -> tuple[Array, DeltaCache]:
    """Returns the branch of a layer [R, T, D] and its cache; call it inside a Linen module.

    Args:
      a: the architecture.
      x: [R, T, D]; with a cache [B, 1, D].
      cache: of the tokens before; None for rows.
      paths: of the rows' tokens; None with a cache.
    """
    delta, std = a.delta, a.initializer_range
    assert delta is not None
    sizes = delta.key_channels, delta.key_channels, delta.value_channels

    def linear(name: str, size: int) -> Array:
        return Linear((a.width,), (size,), ("embed", "heads"), False, std, name=f"delta_{name}")(x)

    places = None if paths is None else paths.before
    mixed, window = zip(*(
        _Convolution(size, delta.taps, std, name=f"delta_conv_{name}")(linear(name, size), places, old)
        for name, size, old in zip(QKV, sizes, (None,) * 3 if cache is None else cache.window, strict=True)
    ), strict=True)  # fmt: skip
    rates = _Rates(delta.value_heads, name="delta_rates")
    inputs = _inputs(delta, mixed, *rates(linear("decay", delta.value_heads), linear("rate", delta.value_heads)))
    if cache is None:
        assert paths is not None
        read, state = packed_delta(inputs, paths)
    else:
        read, state = delta_step(cache.state, jax.tree.map(lambda y: y[:, 0], inputs))
        read = read[:, None]
    gate = linear("gate", sizes[-1]).reshape(read.shape)
    read = _GatedNorm(delta.value_dim, a.eps, name="delta_norm")(read, gate).astype(x.dtype)
    out = Linear((sizes[-1],), (a.width,), ("heads", "embed"), False, std * a.residual_scale, name="delta_o")
    return out(saved(read.reshape(*x.shape[:2], -1), ACTIVATION)), DeltaCache(window, state)


def _inputs(delta: Delta, mixed: tuple[Array, ...], g: Array, b: Array) -> DeltaInputs:
    """Returns the inputs of the rule, from the outputs of the convolutions [R, T, X], float32."""
    dims = delta.key_dim, delta.key_dim, delta.value_dim
    q, k, v = (y.reshape(*y.shape[:2], -1, dim) for y, dim in zip(mixed, dims, strict=True))
    shared = partial(jnp.repeat, repeats=delta.value_heads // delta.key_heads, axis=2)
    q, k = (shared(y * jax.lax.rsqrt((y * y).sum(-1, keepdims=True) + LEAST)) for y in (q, k))
    return DeltaInputs(q * delta.key_dim**-0.5, k, v, g, b)


class _Convolution(nn.Module):
    """A causal convolution of each channel with `weight` [X, W], whose last tap is the token's own, then SiLU."""

    channels: int
    taps: int
    std: float

    @nn.compact
    def __call__(self, x: Array, places: Array | None, window: Array | None) -> tuple[Array, Array]:
        """Returns float32[R, T, X], and the last W - 1 inputs.

        Args:
          x: [R, T, X], or with a window [R, 1, X].
          places: `Paths.before`; None with a window.
          window: the inputs before, [R, W - 1, X].
        """
        drawn = nn.with_logical_partitioning(nn.initializers.normal(self.std), ("heads", "taps"))
        weight = jnp.asarray(self.param("weight", drawn, (self.channels, self.taps)), jnp.float32)
        if window is not None:
            before = window[:, None]
        else:
            # In float32, so that the gradients of a token's descendants are summed in it.
            before = x.astype(jnp.float32).at[jnp.arange(len(x))[:, None, None], places].get(mode="fill", fill_value=0)
        every = jnp.concatenate([before.astype(jnp.float32), x.astype(jnp.float32)[:, :, None]], axis=2)
        y = jax.nn.silu((every * weight.T).sum(2))
        return y, every[:, -1, 1:].astype(x.dtype)


class _Rates(nn.Module):
    """How much of the state a token leaves and how much it writes, with parameters `log` and `shift` [H]."""

    heads: int

    @nn.compact
    def __call__(self, decay: Array, rate: Array) -> tuple[Array, Array]:
        """Returns the logarithm of the decay, -exp(log) * softplus(decay + shift), and the sigmoid of the rate."""

        def drawn(key: Array, shape: tuple[int, ...]) -> Array:
            return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0))

        log, shift = (
            jnp.asarray(self.param(name, nn.with_logical_partitioning(init, ("heads",)), (self.heads,)), jnp.float32)
            for name, init in (("log", drawn), ("shift", nn.initializers.ones))
        )
        decay, rate = decay.astype(jnp.float32), rate.astype(jnp.float32)
        return -jnp.exp(log) * jax.nn.softplus(decay + shift), jax.nn.sigmoid(rate)


class _GatedNorm(nn.Module):
    """A root-mean-square norm of each head with `scale` [e], multiplied by the SiLU of a gate, in float32."""

    size: int
    eps: float

    @nn.compact
    def __call__(self, x: Array, gate: Array) -> Array:
        """Returns float32 of the shape of x and of the gate, [R, T, H, e]."""
        one = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        scale = jnp.asarray(self.param("scale", one, (self.size,)), jnp.float32)
        normal = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return normal * scale * jax.nn.silu(gate.astype(jnp.float32))
