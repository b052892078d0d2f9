"""Mixtures of experts: a router, and one grouped matmul over the tokens of all experts. No token is ever dropped.

Axis letters: R rows, T tokens, N = R * T, D model width, E experts, k experts of a token, F inner width of an expert.
A token's copies, one for each of its experts, are N * k rows sorted by expert, so that the rows of an expert are
adjacent and a grouped matmul multiplies each group by its own kernel.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.architecture import Architecture, Mixture
from dpo_jax.models.grouped import group_of_rows, multiply_groups, outer_groups
from dpo_jax.models.layers import Linear, Norm, activate, mlp, normalize
from dpo_jax.models.quantized import Quantized, dequantize
from dpo_jax.models.remat import ACTIVATION, PROJECTION, named, saved
from dpo_jax.records import Array
from dpo_jax.sharding.expert_split import ExpertSplit

LEAST = 1e-20  # added to the sum of a token's sigmoids, which may all be 0


class Routes(NamedTuple):
    """Where tokens go.

    Attributes:
      probs: float32[N, E], the router's softmax or sigmoids; None where experts alone read the routes.
      weight: float32[N, k], by which the output of each chosen expert is multiplied.
      expert: int32[N, k], the chosen experts.
    """

    probs: Array
    weight: Array
    expert: Array


def route(logits: Array, mixture: Mixture, correction: Array | None = None) -> Routes:
    """Returns the routes of tokens, from router logits float32[N, E]: the k largest probabilities.

    Which experts are chosen has no gradient, their weights do. `correction` is float32[E], with sigmoids.
    """
    if correction is None:
        probs = jax.nn.softmax(logits)
        weight, expert = jax.lax.top_k(probs, mixture.chosen)
        return Routes(probs, weight / weight.sum(-1, keepdims=True) if mixture.renormalized else weight, expert)
    probs = jax.nn.sigmoid(logits)
    _, expert = jax.lax.top_k(_in_best_groups(jax.lax.stop_gradient(probs + correction), mixture), mixture.chosen)
    weight = jnp.take_along_axis(probs, expert, axis=1)
    total = weight.sum(-1, keepdims=True) + LEAST if mixture.renormalized else 1.0
    return Routes(probs, weight * (mixture.factor / total), expert)


def _in_best_groups(scores: Array, mixture: Mixture) -> Array:
    """Returns scores [N, E] with -inf for experts of all groups but the chosen ones (arXiv 2412.19437)."""
    groups = scores.reshape(len(scores), mixture.groups, -1)
    if mixture.chosen_groups == mixture.groups:
        return scores
    _, best = jax.lax.top_k(jax.lax.top_k(groups, 2)[0].sum(-1), mixture.chosen_groups)
    chosen = jnp.any(best[..., None] == jnp.arange(mixture.groups), axis=1)
    return jnp.where(chosen[..., None], groups, -jnp.inf).reshape(scores.shape)


@jax.custom_vjp
def project_groups(x: Array, kernel: Array | Quantized, sizes: Array, bias: Array | None = None) -> Array:
    """Returns x @ kernel[e] + bias[e] for the rows of each expert e, accumulated in float32, in the dtype of x.

    Like `layers.project`: the kernel's gradient is not rounded to the compute dtype, and no cast copy is saved.

    Args:
      x: [N * k, inputs] in the compute dtype, sorted by expert.
      kernel: [E, inputs, outputs], float32 or, if it is not trained, narrower or quantized. A quantized kernel gets no
        gradient.
      sizes: int32[E], rows of each expert; rows beyond their sum are zero.
      bias: float32[E, outputs] or None.
    """
    return _groups_fwd(x, kernel, sizes, bias)[0]


def _groups_fwd(x, kernel, sizes, bias):
    y = multiply_groups(x, dequantize(kernel, x.dtype), sizes)
    if bias is not None:
        y = y + jnp.asarray(bias).at[group_of_rows(sizes, len(x))].get(mode="fill", fill_value=0.0)
    return y.astype(x.dtype), (x, kernel, sizes, bias)


def _groups_bwd(residuals, g):
    x, kernel, sizes, bias = residuals
    dx = multiply_groups(g, dequantize(kernel, x.dtype).swapaxes(1, 2), sizes).astype(x.dtype)
    db = None if bias is None else outer_groups(jnp.ones((len(g), 1), g.dtype), g, sizes)[:, 0].astype(bias.dtype)
    if isinstance(kernel, Quantized):
        return dx, None, None, db
    dk = outer_groups(x, g, sizes)
    return dx, dk.astype(kernel.dtype), None, db


project_groups.defvjp(_groups_fwd, _groups_bwd)


@jax.custom_vjp
def _dispatch(tokens: Array, order: Array, inverse: Array) -> Array:
    """Returns the copies of tokens [N, D], sorted by expert: row i is copy order[i], of token order[i] // k.

    Autodiff would add a token's k gradients one after another in the compute dtype; here they are summed in float32.
    """
    return _dispatch_fwd(tokens, order, inverse)[0]


def _dispatch_fwd(tokens, order, inverse):
    return tokens[order // (len(order) // len(tokens))], (inverse, len(tokens))


def _dispatch_bwd(residuals, g):
    inverse, count = residuals
    copies = g[inverse].reshape(count, -1, g.shape[1])
    return copies.astype(jnp.float32).sum(1).astype(g.dtype), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _collect(rows: Array, order: Array, inverse: Array) -> Array:
    """Returns rows in the order of the tokens' copies: the inverse of the sort, a gather in both directions."""
    return _collect_fwd(rows, order, inverse)[0]


def _collect_fwd(rows, order, inverse):
    return rows[inverse], order


_collect.defvjp(_collect_fwd, lambda order, g: (g[order], None, None))


class ExpertLinear(nn.Module):
    """One projection of all experts: `kernel` [E, inputs, outputs] and, if `biased`, `bias` [E, outputs].

    `Linear`'s optional leaves have an E, too.
    """

    shape: tuple[int, int, int]
    axes: tuple[str, str]
    std: float
    biased: bool

    @nn.compact
    def __call__(self, x: Array, sizes: Array) -> Array:
        """Projects rows [N * k, inputs], sorted by expert; `sizes` int32[E] are the rows of each."""
        drawn = nn.with_logical_partitioning(nn.initializers.normal(self.std), ("experts", *self.axes))
        if self.has_variable("params", "quantized"):
            kernel = Quantized(*(self.get_variable("params", name) for name in ("quantized", "scale")))
        else:
            kernel = self.param("kernel", drawn, self.shape)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("experts", self.axes[1]))
        bias = self.param("bias", zeros, self.shape[::2]) if self.biased else None
        y = project_groups(x, kernel, sizes, bias)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            y = y + project_groups(project_groups(x, a, sizes), b, sizes)
        return y


class Router(nn.Module):
    """The router, `weight` [E, D] and perhaps `bias` [E], or `correction` [E], which is not trained.

    It computes in float32 in every dtype, so that all programs route alike. That of a mixture `beside` an MLP has a
    `scale` [D] of its normalized input, and an `expert_scale` [E] of weights.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, tokens: Array) -> Routes:
        """Returns the routes of tokens [N, D]."""
        a = self.architecture
        assert a.mixture is not None
        drawn = nn.with_logical_partitioning(nn.initializers.normal(a.initializer_range), ("routes", "embed"))
        weight = jnp.asarray(self.param("weight", drawn, (a.mixture.experts, a.width)), jnp.float32)
        wide = tokens.astype(jnp.float32)
        if a.mixture.beside:
            scale = self._scale("scale", a.width, "embed") * a.width**-0.5
            wide = normalize(wide, scale, None, "rms", a.eps)
        logits: Any = jnp.einsum("nd,ed->ne", wide, weight, precision=jax.lax.Precision.HIGHEST)
        if a.mixture.biased:
            drawn = nn.with_logical_partitioning(nn.initializers.normal(a.initializer_range), ("routes",))
            logits = logits + self.param("bias", drawn, (a.mixture.experts,))
        if a.mixture.beside:
            routes = route(logits, a.mixture)
            every = self._scale("expert_scale", a.mixture.experts, "routes")
            return routes._replace(weight=routes.weight * every[routes.expert])
        if not a.mixture.sigmoid:
            return route(logits, a.mixture)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("routes",))
        correction = self.param("correction", zeros, (a.mixture.experts,))
        return route(logits, a.mixture, jax.lax.stop_gradient(jnp.asarray(correction, jnp.float32)))

    def _scale(self, name: str, size: int, axis: str) -> Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
        return jnp.asarray(self.param(name, ones, (size,)), jnp.float32)


def mixture_of_experts(
    a: Architecture,
    x: Array,
    counted: Array | None,
    split: ExpertSplit | None = None,
    routed: Array | None = None,
) -> tuple[Array, Array | None]:
    """Returns the branch of a mixture [R, T, D], and what `routing_of` says; call it inside a Linen module.

    Args:
      a: the architecture, with a mixture.
      x: [R, T, D].
      counted: float32[R, T], see `routing_of`; None for no statistics.
      split: how devices shard the experts; None if each has all of them.
      routed: what the router reads, [R, T, D]; None for x.
    """
    assert a.mixture is not None
    tokens = x.reshape(-1, a.width)
    routes = Router(a, name="router")(tokens if routed is None else routed.reshape(tokens.shape))
    if split is None:
        y: Any = _experts(a, a.mixture.experts, tokens, routes).astype(x.dtype)
    else:
        y = _sharded_experts(a, split, tokens, routes)
    y = saved(y, PROJECTION)
    routing = None if counted is None else routing_of(routes, counted)
    return y.reshape(x.shape), routing


def _sharded_experts(
    a: Architecture,
    split: ExpertSplit,
    tokens: Array,
    routes: Routes,
) -> Array:
    """Returns the weighted sum of the experts of this device's tokens [N, D], where each device has some experts.

    Every device computes what its experts add to the tokens of all devices.
    """
    assert a.mixture is not None
    count = a.mixture.experts // split.parts
    every = Routes(None, split.gather(routes.weight), split.own(split.gather(routes.expert), count))
    return split.scatter(_experts(a, count, split.gather(tokens), every), tokens.dtype)


def _experts(a: Architecture, count: int, tokens: Array, routes: Routes) -> Array:
    """Returns the weighted sum of each token's experts among the first `count`, float32[N, D]."""
    assert a.mixture is not None
    biased, std = a.mixture.biased, a.initializer_range
    order = named(jnp.argsort(routes.expert.ravel()), PROJECTION)
    inverse = named(jnp.argsort(order), PROJECTION)
    sizes = jnp.sum(routes.expert.ravel()[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    rows = _dispatch(tokens, order, inverse)
    inwards = partial(ExpertLinear, (count, a.width, a.mlp), ("embed", "mlp"), std, biased)
    up, gate = (saved(inwards(name=f"expert_{name}")(rows, sizes), PROJECTION) for name in ("up", "gate"))
    std *= a.residual_scale
    outwards = ExpertLinear((count, a.mlp, a.width), ("mlp", "embed"), std, biased, name="expert_down")
    out = saved(outwards(saved(activate(up, gate, a.activation), ACTIVATION), sizes), ACTIVATION)
    out = _collect(out, order, inverse)
    copies = out.reshape(len(tokens), -1, a.width).astype(jnp.float32)
    return jnp.sum(copies * routes.weight[..., None], axis=1)


def routing_of(routes: Routes, counted: Array) -> Array:
    """Returns float32[R, 2, E], over the tokens of each row: how many went to each expert, and sums of probabilities.

    Args:
      routes: of all tokens.
      counted: float32[R, T], how often a token counts: 0 for padding.
    """
    chosen = jnp.sum(routes.expert[..., None] == jnp.arange(routes.probs.shape[1]), axis=1, dtype=jnp.float32)
    both: Any = jnp.stack([chosen, routes.probs], axis=1)
    return jnp.einsum("rt,rtce->rce", counted, both.reshape(*counted.shape, 2, -1))


def mixture(
    a: Architecture, x: Array, counted: Array | None, experts: ExpertSplit | None
) -> tuple[Array, Array | None]:
    """Returns the branch of a mixture [R, T, D], and what `mixture_of_experts` says."""
    y, routing = mixture_of_experts(a, x, counted, experts)
    if a.mixture is None or a.mixture.shared is None:
        return y, routing
    shared = mlp(a, x, a.mixture.shared, "shared_").astype(jnp.float32)
    if a.mixture.gated_shared:
        gate = Linear((a.width,), (1,), ("embed", "gate"), False, a.initializer_range, name="shared_weight")(x)
        shared = jax.nn.sigmoid(gate.astype(jnp.float32)) * shared
    return (y + shared).astype(x.dtype), routing


def mixture_beside(
    a: Architecture, x: Array, read: Array, counted: Array | None, experts: ExpertSplit | None
) -> tuple[Array, Array | None]:
    """Returns the branch of an MLP and a mixture beside it [R, T, D], and what `mixture_of_experts` says.

    x is the residual, and `read` the normalized one, which the MLP reads.
    """
    assert a.mixture is not None
    assert a.mixture.shared is not None
    y, routing = mixture_of_experts(a, Norm(a, name="expert_norm")(x), counted, experts, routed=x)
    shared = Norm(a, name="shared_post_norm")(mlp(a, read, a.mixture.shared, "shared_"))
    return shared + Norm(a, name="expert_post_norm")(y), routing
