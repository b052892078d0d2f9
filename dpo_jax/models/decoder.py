"""One decoder for all families. Linen holds the parameters, and scans over layers; the mathematics is functions.

Axis letters as in `records`; a cache has P prompts of T tokens, and B sequences with room for N more. Parameters are
float32, with layers stacked on axis 0; activations are in the compute dtype, and matmuls accumulate and norms compute
in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.attention import CacheMask, RowMask, Scoring, cached_attention, packed_attention
from dpo_jax.models.kernels import Attend, keeps_attention
from dpo_jax.models.layers import Linear, Norm, activate, angles_at, rotate
from dpo_jax.records import Array

# Of each layer keys and values of prompts [P, K, T, d], then of what follows them [B, K, N, d], in the compute dtype.
Cache = tuple[tuple[Array, ...], ...]


def extend_cache(cache: Cache, room: int) -> Cache:
    """Returns a cache with room for so many own tokens of each sequence."""

    def one(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), (0, 0)))

    return tuple((keys, values, one(own_keys), one(own_values)) for keys, values, own_keys, own_values in cache)


# What the backward pass keeps, by name; the rest is computed again.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("projection"), keeps_attention
    ),
    "none": None,
}


def _recompute_gathers(primitive: Any, *_: Any, **__: Any) -> bool:
    """Checkpoint policy: keeps everything but all-gathered parameters, which the backward pass gathers again."""
    return primitive.name not in ("all_gather", "shard_map")


class Context(NamedTuple):
    """What every layer sees beside the hidden states.

    Attributes:
      segment_ids: int32[R, T]; None when decoding.
      branch_ids: int32[R, T]; None when decoding.
      positions: int32[R, T]; None when decoding.
      place: int32[], how many tokens follow the prompts in the cache; None for whole rows.
      mask: bool[P, T], which tokens of the prompts in the cache are some; None for whole rows.
      angles: the cosine and the sine of rotary angles, float32[R, T, 1, dims / 2] each, of every kind of layer: all,
        or those without a window and those with one. Empty with learned positions.
    """

    segment_ids: Array = None
    branch_ids: Array = None
    positions: Array = None
    place: Array = None
    mask: Array = None
    angles: tuple[tuple[Array, Array], ...] = ()


def _heads(a: Architecture, x: Array, name: str, angles: tuple[Array, Array] | None) -> Array:
    """Returns the queries ("q"), keys ("k") or values ("v") of x, [R, T, H or K, d]."""
    heads, axis = (a.heads, "heads") if name == "q" else (a.kv_heads, "kv_heads")
    shape, axes = (heads, a.head_dim), (axis, "head_dim")
    y = Linear((a.width,), shape, ("embed", *axes), a.qkv_bias, a.initializer_range, name=name)(x)
    if name == "v":
        return y
    if a.qk_norm:
        first = 1 if a.qk_norm == "head" else 0
        y = Norm(a, shape[first:], axes[first:], name=f"{name}_norm")(y)
    return rotate(y, angles)


def scoring_of(a: Architecture) -> Scoring:
    """Returns how its queries score keys."""
    return Scoring(a.head_dim**-0.5 if a.score_scale is None else a.score_scale, a.score_cap)


def _attention(
    a: Architecture,
    attend: Attend,
    x: Array,
    cache: tuple[Array, ...] | None,
    context: Context,
    window: Array | None,
) -> tuple[Array, tuple[Array, ...]]:
    """Returns attention's addition to the residual, and the keys and values of the tokens in x, or the cache with them.

    `window` is int32[], the window of this layer, 0 for none; None where no layer has one that matters.
    """
    angles = _angles(context.angles, window)
    q, k, v = (_heads(a, x, name, angles) for name in "qkv")
    scoring = scoring_of(a)
    reach = None if window is None else jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window)
    if cache is None:
        positions = None if reach is None else context.positions
        mixed = attend(q, k, v, RowMask(context.segment_ids, context.branch_ids, positions, reach), scoring)
        kept = k, v
    else:
        mixed, kept = cached_attention(q, k, v, cache, CacheMask(context.mask, context.place, reach), scoring)
    axes = ("heads", "head_dim", "embed")
    std = a.initializer_range * a.residual_scale
    return Linear((a.heads, a.head_dim), (a.width,), axes, a.out_bias, std, name="o")(mixed), kept


def _angles(kinds: tuple[tuple[Array, Array], ...], window: Array | None) -> tuple[Array, Array] | None:
    """Returns the rotary angles of a layer with this window."""
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    whole, near = kinds
    return jax.tree.map(lambda x, y: jnp.where(window == 0, x, y), whole, near)


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
    attend: Attend

    @nn.compact
    def __call__(
        self, x: Array, cache: tuple[Array, ...] | None, window: Array | None, context: Context
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Returns the residual x [R, T, D] after the layer and, if `keep`, what `_attention` keeps."""
        a = self.architecture

        def norm(x: Array, name: str, wanted: bool) -> Array:
            return Norm(a, name=name)(x) if wanted else x

        read = norm(x, "attention_norm", a.pre_norm)
        mixed, kept = _attention(a, self.attend, read, cache, context, window)
        x, before = x + norm(mixed, "attention_post_norm", a.post_norm), x
        if not a.shared_norm:
            read = norm(before if a.parallel else x, "mlp_norm", a.pre_norm)
        out = x + norm(_mlp(a, read), "mlp_post_norm", a.post_norm)
        return out, kept if self.keep else None


def _lookup(table: Array, index: Array, dtype: Any) -> Array:
    # An id beyond the table reads as NaN, which is noticed; JAX's default would silently read the last row.
    return jnp.asarray(table).at[index].get(mode="fill", fill_value=jnp.nan).astype(dtype)


def _windows(a: Architecture, reach: int) -> Array | None:
    """Returns int32[L], the window of each layer, 0 for none; None where all layers are alike for `reach` tokens."""
    matter = any(0 < window < reach for window in a.windows) or a.window_rope is not None
    return jnp.asarray(a.windows, jnp.int32) if a.windows and matter else None


class Decoder(nn.Module):
    """A decoder-only transformer without its head.

    Attributes:
      architecture: what it is.
      compute: dtype of the activations.
      remat: a name of `POLICIES`.
      keep: whether it returns the keys and values of the tokens it reads.
      gather: all-gathers the parameters of one layer; None where nothing is sharded.
      attend: attention over packed rows.
    """

    architecture: Architecture
    compute: str = "float32"
    remat: str = "none"
    keep: bool = False
    gather: Callable[[Any], Any] | None = None
    attend: Attend = packed_attention

    @nn.compact
    def __call__(
        self, tokens: Array, positions: Array, context: Context, cache: Cache | None = None
    ) -> tuple[Array, Any]:
        """Returns hidden states [R, T, D] after the final norm, and keys and values [L, R, T, K, d] or None; with a
        cache, that with the tokens.

        Where the head has a bias, the hidden states have a column of ones to multiply with it.

        Args:
          tokens: int32[R, T].
          positions: int32[R, T].
          context: what the layers see, all but positions and rotary angles.
          cache: the keys and values before, to decode one token a row; the layers' parameters are then a list.
        """
        a = self.architecture
        x = self._embed(tokens, positions)
        angles = tuple(angles_at(rope, positions) for rope in (a.rope, a.window_rope) if rope is not None)
        context = context._replace(positions=positions, angles=angles)
        windows = _windows(a, tokens.shape[1] if cache is None else cache[0][0].shape[2] + cache[0][2].shape[2])
        if cache is None:
            x, kept = self._layers()(x, None, windows, context)
        else:
            x, kept = self._one_by_one(x, cache, windows, context)
        x = Norm(a, name="final_norm")(x)
        if a.head_bias:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        return x, kept

    def _embed(self, tokens: Array, positions: Array) -> Array:
        """Returns the residual before the first layer; the head's parameters are made here too."""
        a = self.architecture
        normal = nn.initializers.normal(a.initializer_range)
        named = partial(nn.with_logical_partitioning, normal)
        x = _lookup(self.param("embedding", named(("vocab", "embed")), (a.vocab, a.width)), tokens, self.compute)
        if a.embedding_scale != 1:
            x = x * jnp.asarray(a.embedding_scale, x.dtype)
        if a.rope is None:
            rows = a.max_positions + a.position_offset
            table = self.param("positions", named(("positions", "embed")), (rows, a.width))
            x = x + _lookup(table, positions + a.position_offset, self.compute)
        if a.score:
            drawn = nn.initializers.normal(a.score_std)
            self.param("score", nn.with_logical_partitioning(drawn, (None, "embed")), (1, a.width))
        if not a.tied:
            self.param("head", named(("vocab", "embed")), (a.vocab, a.width))
        if a.head_bias:
            self.param("head_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (a.vocab,))
        return x

    def _one_by_one(self, x: Array, cache: Cache, windows: Array | None, context: Context) -> tuple[Array, Cache]:
        """Runs the layers unrolled: a scan would copy parameters and cache of each out of a stack at every token."""
        block, kept = Block(self.architecture, self.keep, self.attend, parent=None), []
        for i, (params, old) in enumerate(zip(self.get_variable("params", "layers"), cache, strict=True)):
            x, new = block.apply({"params": params}, x, old, None if windows is None else windows[i], context)
            kept.append(new)
        return x, tuple(kept)

    def _layers(self) -> Callable[..., tuple[Array, Cache | None]]:
        block = Block
        policy = POLICIES[self.remat]
        if self.gather is not None:
            gather, policy = self.gather, policy or _recompute_gathers
            block = nn.map_variables(Block, "params", lambda v: {"params": gather(v["params"])})
        if policy is not None:
            block = nn.remat(block, policy=policy, prevent_cse=False)
        axes: Any = (0, 0, nn.broadcast)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=self.architecture.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.architecture, self.keep, self.attend, name="layers")
