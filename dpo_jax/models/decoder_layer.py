"""One layer of the decoder: attention and MLP around the residual, by the kind of the layer.

Axis letters: R rows, T tokens, D model width, H heads, L layers, P prompts.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.alibi import with_biases
from dpo_jax.models.architecture import GLOBAL, OWNERS, Architecture
from dpo_jax.models.attention import Attend, CacheMask, RowMask, Scoring, cached_attention
from dpo_jax.models.delta import Paths
from dpo_jax.models.experts import mixture, mixture_beside
from dpo_jax.models.heads import head_projection, output_projection, queries_keys_values
from dpo_jax.models.latent_attention import latent_heads
from dpo_jax.models.layer_embedding import embedding_branch
from dpo_jax.models.layers import Constant, Norm, Sinks, mlp, scaled
from dpo_jax.models.linear_attention import delta_attention
from dpo_jax.models.remat import ACTIVATION, saved
from dpo_jax.models.rotary import Angles, layer_angles
from dpo_jax.records import Array
from dpo_jax.sharding.expert_split import ExpertSplit


class LayerInputs(NamedTuple):
    """What differs between layers, [L], or one layer's; None where no layer differs.

    Attributes:
      window: int32, 0 for none.
      factor: float32, of its queries.
      rotated: bool, False for a layer without rotary positions.
      embedding: that of the tokens for the layer, [L, R, T, P].
    """

    window: Array | None = None
    factor: Array | None = None
    rotated: Array | None = None
    embedding: Array | None = None


class Context(NamedTuple):
    """Inputs that are the same for every layer.

    Attributes:
      rows: the mask of packed rows, without window; None when decoding.
      generated: int32[], tokens in the cache after the prompts; None without a cache.
      mask: bool[P, T], True for real prompt tokens, False for left padding; None without a cache.
      angles: rotary angles, set by `Decoder`: one entry for all layers, or one for layers without a window and one for
        layers with a window, or for global layers and for the others; empty with learned positions.
      growth: what queries are multiplied by, float32[R, T, 1, 1], set by `Decoder`; None for nothing.
      biases: further dimensions of keys, `key_biases`, set by `Decoder`; None without ALiBi.
      paths: whose state each token continues, set by `Decoder`; None without linear attention, or with a cache.
      counted: float32[R, T], how often a token counts in the statistics of routers; None for no statistics.
    """

    rows: RowMask | None = None
    generated: Array = None
    mask: Array = None
    angles: tuple[Angles, ...] = ()
    growth: Array = None
    biases: Array | None = None
    paths: Paths | None = None
    counted: Array | None = None


def _angles(a: Architecture, kind: str, context: Context, own: LayerInputs) -> Angles | None:
    """Returns the angles of a layer."""
    if a.global_heads is None:
        return layer_angles(context.angles, own.window, own.rotated)
    return context.angles[0 if kind in GLOBAL else -1]


def scoring_of(a: Architecture) -> Scoring:
    """Returns the scale and the cap of an architecture's attention scores."""
    return Scoring(a.head_dim**-0.5 if a.score_scale is None else a.score_scale, a.score_cap)


def _attention(
    a: Architecture, kind: str, attend: Attend, x: Array, held: Any, context: Context, own: LayerInputs
) -> tuple[Array, tuple[Array, ...]]:
    """Returns the attention branch [R, T, D], and the keys and values of x or, when decoding, the updated cache.

    `held` is the cache when decoding; of a layer that reads another one, what that returned. Such a layer returns ().
    """
    window, angles = None if kind in GLOBAL else own.window, _angles(a, kind, context, own)
    q, k, v = queries_keys_values(a, kind, x, angles) if a.latent is None else latent_heads(a, x, angles)
    for factor in (own.factor, context.growth):
        q = q if factor is None else q * factor.astype(q.dtype)
    if context.biases is not None:
        q, k, v = with_biases(q, k, v, context.biases)
    scoring = scoring_of(a)
    width = None if window is None else jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window)
    sinks = (Sinks(a.heads, a.initializer_range, name="sinks")(),) if a.sinks else ()
    if context.rows is not None:
        k, v = held if k is None else (k, v)
        mixed = attend(q, k, v, context.rows._replace(window=width), scoring, *sinks)
        kept = k, v
    else:
        seen = CacheMask(context.mask, context.generated, width)
        mixed, kept = cached_attention(q, k, v, held, seen, scoring, *sinks)
    if a.gated_attention:
        gate = head_projection(a, kind, x, "q_gate").astype(jnp.float32)
        mixed = (mixed.astype(jnp.float32) * jax.nn.sigmoid(gate)).astype(mixed.dtype)
    return output_projection(a, kind, mixed), () if kind in OWNERS else kept


class Block(nn.Module):
    """One layer: attention and MLP, one after the other or in parallel, each added to the residual.

    `kind` says what the layer has: see `Architecture.kinds`.
    """

    architecture: Architecture
    return_kv: bool
    attend: Attend
    kind: str = "attention"
    experts: ExpertSplit | None = None

    @nn.compact
    def __call__(self, x: Array, held: Any, own: LayerInputs, context: Context) -> tuple[Array, Any]:
        """Returns the residual [R, T, D] after the layer, and its keys and values or its cache if `return_kv`, else
        what `routing_of` says of a mixture. `held` is that of `_attention`."""
        a, x = self.architecture, saved(x, ACTIVATION)
        read = self._norm(x, "attention_norm", a.pre_norm)
        if self.kind == "delta":
            mixed, kept = delta_attention(a, read, held, context.paths)
        else:
            mixed, kept = _attention(a, self.kind, self.attend, read, held, context, own)
        x, before = x + self._branch(mixed, "attention_post_norm"), x
        if not a.shared_norm:
            read = self._norm(before if a.parallel else x, "mlp_norm", a.pre_norm)
        inner, routing = self._mlp(x, read, context)
        x = x + self._branch(inner, "mlp_post_norm")
        if own.embedding is not None:
            x = x + self._norm(embedding_branch(a, x, own.embedding), "embedding_post_norm", True)
        x = Constant(name="layer_constant")(x) if a.layer_constant else x
        return x, kept if self.return_kv else routing

    def _norm(self, x: Array, name: str, wanted: bool) -> Array:
        return Norm(self.architecture, name=name)(x) if wanted else x

    def _branch(self, x: Array, name: str) -> Array:
        """Returns a branch [R, T, D] as it is added to the residual: perhaps normalized, and scaled."""
        a = self.architecture
        return scaled(self._norm(x, name, a.post_norm), a.residual_multiplier)

    def _mlp(self, x: Array, read: Array, context: Context) -> tuple[Array, Array | None]:
        """Returns the branch of the MLP or of the mixture, and what `routing_of` says of that.

        x is the residual, and `read` what the branch reads of it: the same, or normalized.
        """
        a = self.architecture
        if a.mixture and a.mixture.beside:
            return mixture_beside(a, x, read, context.counted, self.experts)
        if a.mixture and self.kind != "dense":
            return mixture(a, read, context.counted, self.experts)
        if self.kind in OWNERS:
            assert a.reader_mlp is not None
            return mlp(a, read, a.reader_mlp, "reader_"), None
        return mlp(a, read, a.dense), None
