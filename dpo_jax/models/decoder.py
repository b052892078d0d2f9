"""One decoder for all families. Linen holds the parameters and scans over layers; the mathematics is functions.

Axis letters: R rows, T tokens, D model width, H heads, K key-value heads, d head dimension, L layers, P prompts,
B sequences, C capacity of a cache. Parameters are float32, with layers stacked on axis 0. Activations are in the
compute dtype; matmuls accumulate and norms compute in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.alibi import key_biases
from dpo_jax.models.architecture import OWNERS, Architecture
from dpo_jax.models.attention import Attend, RowMask, packed_attention
from dpo_jax.models.cache import Cache, DeltaCache
from dpo_jax.models.decoder_layer import Block, Context, LayerInputs, scoring_of
from dpo_jax.models.delta import paths_of
from dpo_jax.models.groups import init_groups, scan_groups
from dpo_jax.models.layer_embedding import layer_embeddings
from dpo_jax.models.layers import Norm, scaled
from dpo_jax.models.remat import POLICIES
from dpo_jax.models.rotary import angles_at, growth_at
from dpo_jax.records import Array
from dpo_jax.sharding.expert_split import ExpertSplit


def _lookup(table: Array, index: Array, dtype: Any) -> Array:
    # An index outside the table gives NaN, which is noticed. By default JAX would silently read the last row.
    return jnp.asarray(table).at[index].get(mode="fill", fill_value=jnp.nan).astype(dtype)


def _length(rows: RowMask | None, cache: Cache | None) -> int:
    """Returns the most keys that a query may see."""
    if cache is not None:
        return max((c[0].shape[2] + c[2].shape[2] for c in cache if c and not isinstance(c, DeltaCache)), default=0)
    assert rows is not None
    return rows.keys.index.shape[1]


def _unmeasured(rows: RowMask | None) -> RowMask | None:
    """Returns a mask without positions, which no window needs."""
    return rows and RowMask(*(ids._replace(positions=None) for ids in (rows.queries, rows.keys)))


def _windows(a: Architecture, length: int) -> Array | None:
    """Returns int32[L], the window of each layer (0 for none); None if no layer differs within `length` tokens."""
    by_window = a.window_rope is not None and a.global_heads is None  # else the kind tells which angles are a layer's
    matter = any(0 < window < length for window in a.windows) or by_window
    return jnp.asarray(a.windows, jnp.int32) if a.windows and matter else None


def _no_keys(a: Architecture, kind: str, x: Array) -> tuple[Array, Array]:
    """Returns zeros like the keys and values of layers of a kind, for the residual [R, T, D]."""
    of = a.heads_in(kind)
    zeros = jnp.zeros((*x.shape[:2], of.kv_heads, of.head_dim), x.dtype)
    return zeros, zeros


class Decoder(nn.Module):
    """A decoder-only transformer up to its final norm; it also holds the head's parameters.

    Attributes:
      architecture: shapes and options of the model.
      compute: dtype of the activations.
      remat: key of `POLICIES`.
      return_kv: also return keys and values.
      gather: all-gathers the parameters of one layer; None if nothing is sharded.
      exchange: looks embeddings up in parts of the table, `Collectives.exchange`; None if it is whole.
      attend: attention over packed rows.
      experts: how devices shard the experts of a mixture; None if each has all of them.
    """

    architecture: Architecture
    compute: str = "float32"
    remat: str = "none"
    return_kv: bool = False
    gather: Callable[[Any], Any] | None = None
    exchange: Callable[[Callable[[Array], Array], Array], Array] | None = None
    attend: Attend = packed_attention
    experts: ExpertSplit | None = None

    @nn.compact
    def __call__(
        self, tokens: Array, positions: Array, context: Context, cache: Cache | None = None
    ) -> tuple[Array, Any]:
        """Returns hidden states after the final norm, and keys and values.

        Args:
          tokens: int32[R, T].
          positions: int32[R, T].
          context: masks; the rest is filled in here.
          cache: keys and values so far, to decode one token per sequence (R = B, T = 1). The parameters of the layers
            must then be a list (`Model.unstack`).

        Returns:
          Hidden states [R, T, D]; with a head bias [R, T, D + 1], the last column being ones that multiply the bias.
          With a cache the updated cache; else, if `return_kv`, keys and values [L, R, T, K, d], or a list of what each
          of unlike layers keeps; else, if tokens are `counted`, `routing_of` each mixture [L, R, 2, E]; else None.
        """
        a = self.architecture
        x = self._embed(tokens, positions)
        angles = tuple(angles_at(rope, positions) for rope in (a.rope, a.window_rope) if rope is not None)
        windows = _windows(a, _length(context.rows, cache))
        rows = _unmeasured(context.rows) if windows is None else context.rows
        context = context._replace(angles=angles, growth=growth_at(a.rope, positions), rows=rows)
        if a.alibi is not None:
            context = context._replace(biases=key_biases(a, positions, scoring_of(a).scale, self.compute))
        if a.delta is not None and rows is not None:
            context = context._replace(paths=paths_of(rows.queries.segment_ids, rows.queries.branch_ids, a.delta.taps))
        factors = 1 / jnp.arange(1.0, a.layers + 1) if a.layer_scaled else None
        own = LayerInputs(windows, factors, ~jnp.asarray(a.nope) if a.nope else None, self._layer_embeddings(tokens, x))
        if cache is not None:
            x, kept = self._unrolled_layers(x, cache, own, context)
        elif a.kinds:
            x, kept = self._scan_groups(x, own, context)
        else:
            x, kept = self._scan_layers()(x, None, own, context)
        x = scaled(Norm(a, name="final_norm")(x), a.logit_scale)
        if a.head_bias:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        return x, kept

    def _embed(self, tokens: Array, positions: Array) -> Array:
        """Returns the residual before the first layer, and creates the parameters of embedding and head."""
        a = self.architecture
        normal = nn.initializers.normal(a.initializer_range)
        named = partial(nn.with_logical_partitioning, normal)
        x = self._table_rows("embedding", a.width, tokens)
        x = scaled(x, float(np.asarray(a.embedding_scale, x.dtype)) if a.scale_rounded else a.embedding_scale)
        if a.learned_positions:
            rows = a.max_positions + a.position_offset
            table = self.param("positions", named(("positions", "embed")), (rows, a.width))
            x = x + _lookup(table, positions + a.position_offset, self.compute)
        x = Norm(a, name="embedding_norm")(x) if a.embedding_norm else x
        if self.is_initializing():  # `Model.head` reads them
            self._create_head(named)
        return x

    def _layer_embeddings(self, tokens: Array, x: Array) -> Array | None:
        """Returns the embeddings [L, R, T, P] that the layers have for themselves; None if they have none."""
        a = self.architecture
        if a.layer_embedding is None:
            return None
        return layer_embeddings(a, self._table_rows("layer_embedding", a.layers * a.layer_embedding, tokens), x)

    def _table_rows(self, name: str, size: int, tokens: Array) -> Array:
        """Returns the rows [R, T, size] of a table [V, size], of which a device may have some columns."""
        if self.exchange is not None:
            part = self.get_variable("params", name)  # `param` would refuse some columns
            if part.shape[1] < size:
                return self.exchange(lambda every: _lookup(part, every, self.compute), tokens)
        normal = nn.initializers.normal(self.architecture.initializer_range)
        drawn = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        return _lookup(self.param(name, drawn, (self.architecture.vocab, size)), tokens, self.compute)

    def _create_head(self, named: Callable[..., Any]) -> None:
        a = self.architecture
        if a.score:
            initial = nn.initializers.normal(a.score_std)
            self.param("score", nn.with_logical_partitioning(initial, (None, "embed")), (1, a.width))
        if not a.tied:
            self.param("head", named(("vocab", "embed")), (a.vocab, a.width))
        if a.head_bias:
            self.param("head_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (a.vocab,))

    def _unrolled_layers(self, x: Array, cache: Cache, own: LayerInputs, context: Context) -> tuple[Array, Cache]:
        """Runs the layers unrolled, to decode: a scan would copy each layer's parameters and cache at every token."""
        kept, shared, kinds = [], dict[str, Any](), self.architecture.layer_kinds
        for i, (params, old) in enumerate(zip(self.get_variable("params", "layers"), cache, strict=True)):
            if self.gather is not None:  # not before its turn: a loop over tokens would gather all layers first
                params, x = jax.lax.optimization_barrier((params, x))
                params = self.gather(params)
            block = Block(self.architecture, self.return_kv, self.attend, kinds[i], parent=None)
            held = shared[OWNERS[kinds[i]]] if kinds[i] in OWNERS else old
            x, new = block.apply({"params": params}, x, held, jax.tree.map(lambda y, i=i: y[i], own), context)
            kept.append(new)
            shared[kinds[i]] = new
        return x, tuple(kept)

    def _scan_groups(self, x: Array, own: LayerInputs, context: Context) -> tuple[Array, Any]:
        """Runs unlike layers as one scan over groups of them; else as `_scan_layers`.

        Beside the residual a layer hands on the keys and values that layers after it read: those of the newest layer of
        each kind that has readers.
        """
        a, kinds = self.architecture, self.architecture.kinds
        shared = {OWNERS[kind]: _no_keys(a, OWNERS[kind], x) for kind in kinds if kind in OWNERS}
        given = {k: (a, self.return_kv or k in shared, self.attend, k, self.experts) for k in set(kinds)}
        blocks = {k: Block(*arguments, parent=None) for k, arguments in given.items()}

        def init(kind: str, key: Array) -> Any:
            one = LayerInputs(embedding=None if own.embedding is None else own.embedding[0])
            return blocks[kind].init(key, x, shared.get(OWNERS.get(kind, "")), one, context)["params"]

        def run(kind: str, params: Any, x: Array, held: Any, own: LayerInputs) -> tuple[Array, Any]:
            params = params if self.gather is None else self.gather(params)
            return blocks[kind].apply({"params": params}, x, held, own, context)

        again = {k: jax.checkpoint(partial(run, k), policy=POLICIES[self.remat], prevent_cse=False) for k in blocks}

        def layer(kind: str, params: Any, given: tuple[Array, Any], own: LayerInputs) -> tuple[Any, Any]:
            x, shared = given
            x, kept = again[kind](params, x, shared.get(OWNERS.get(kind, "")), own)
            if kind not in shared:
                return (x, shared), kept
            return (x, shared | {kind: kept}), kept if self.return_kv else None

        if self.is_initializing():
            self.param("layers", partial(init_groups, kinds, init))
        layers = {k: partial(layer, k) for k in blocks}
        (x, _), kept = scan_groups(kinds, layers, self.get_variable("params", "layers"), (x, shared), own)
        if self.return_kv:
            return x, kept
        routing = [one for one in kept if one is not None]
        return x, jnp.stack(routing) if routing else None

    def _scan_layers(self) -> Callable[..., tuple[Array, tuple[Array, ...] | None]]:
        """Returns the layers as one scan, so that the program and its compile time do not grow with L.

        The transforms nest as scan(remat(gather(Block))). The scan slices one layer out of the sharded stack, and only
        that is all-gathered. Remat does not save it for the backward pass, which gathers again: see `POLICIES`.
        """
        block = Block
        if self.gather is not None:
            gather = self.gather
            block = nn.map_variables(Block, "params", lambda v: {"params": gather(v["params"])})
        # prevent_cse is for code outside a scan, where XLA could merge the recomputation with the forward pass.
        block = nn.remat(block, policy=POLICIES[self.remat], prevent_cse=False)
        axes: Any = (0, 0, nn.broadcast)  # of cache (None here), inputs of the layers and context
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=self.architecture.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # One more trace of a layer, for results that layers share: there are none. At initialization it stays,
            # because other random numbers are drawn without it.
            check_constancy_invariants=self.is_initializing(),
        )
        return scan(self.architecture, self.return_kv, self.attend, experts=self.experts, name="layers")
