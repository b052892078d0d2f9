"""Builds the pure functions of an architecture on the decoder."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.attention import RowMask, packed_attention
from dpo_jax.models.blocks import block_attention
from dpo_jax.models.cache import begin_cache
from dpo_jax.models.decoder import Decoder
from dpo_jax.models.decoder_layer import Context
from dpo_jax.models.groups import layer_of
from dpo_jax.models.interface import Model
from dpo_jax.models.remat import POLICIES
from dpo_jax.records import Array

COMPUTE = ("float32", "bfloat16")


@lru_cache(maxsize=8)  # equal functions are traced once in a process, by all of its runs
def build_model(architecture: Architecture, *, compute: str = "float32", remat: str = "none") -> Model:
    """Returns the pure functions of an architecture. Allocates no parameters.

    Args:
      architecture: from `architecture_of` or `open_folder`.
      compute: dtype of activations and matmuls, "float32" or "bfloat16".
      remat: what the backward pass recomputes: "none"; "dots", everything but projections and attention; or "full".

    Raises:
      UserError: `compute` or `remat` is unknown.
    """
    for key, value, known in (("compute", compute, COMPUTE), ("remat", remat, tuple(POLICIES))):
        if value not in known:
            raise UserError(f"model.{key}: {value!r} is not known; choose one of {', '.join(known)}")
    decoder = Decoder(architecture, compute, remat)
    with_kv = Decoder(architecture, compute, return_kv=True)
    shapes = jax.eval_shape(partial(_init, decoder), jax.eval_shape(jax.random.key, 0))
    return Model(
        architecture,
        init=lambda key: nn.meta.unbox(_init(decoder, key)),
        hidden=partial(_hidden, decoder),
        head=partial(_head, architecture),
        prefill=partial(_prefill, with_kv),
        unstack=partial(_unstack, with_kv),
        decode=partial(_decode, with_kv),
        axes=jax.tree.map(lambda leaf: leaf.names, shapes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)),
        compute=compute,
    )


def _init(decoder: Decoder, key: Array) -> Any:
    one = jnp.zeros((1, 1), jnp.int32)
    return decoder.init(key, one, one, Context(RowMask.of(one, one, one)))["params"]


def _hidden(
    decoder, params, tokens, positions, segment_ids, branch_ids, gather=None, exchange=None, attend=None, split=None,
    counted=None, experts=None,
):  # fmt: skip
    rows = RowMask.of(segment_ids, branch_ids, positions)
    if split is None:
        attend = attend or packed_attention
    else:
        tokens, positions = split.own(tokens), split.own(positions)
        counted = None if counted is None else split.own(counted)
        rows = RowMask(jax.tree.map(split.own, rows.queries), jax.tree.map(split.in_order, rows.keys))
        attend = partial(_attend_all, attend or block_attention, split)
    decoder = decoder.clone(gather=gather, exchange=exchange, attend=attend, experts=experts)
    hidden, routing = decoder.apply({"params": params}, tokens, positions, Context(rows, counted=counted))
    return hidden if counted is None else (hidden, routing.mean(0))


def _attend_all(attend, split, q, k, v, mask, scoring, *sinks):
    return attend(q, split.gather(k), split.gather(v), mask, scoring, *sinks)


def _head(architecture: Architecture, params: Any) -> Array:
    if architecture.score:
        return params["score"]
    weight = params["embedding" if architecture.tied else "head"]
    return jnp.concatenate([weight, params["head_bias"][:, None]], axis=1) if architecture.head_bias else weight


def _prefill(decoder, params, tokens, positions, mask, copies, room, gather=None, exchange=None):
    # A prompt is one segment on branch 0; left padding is segment 0.
    context = Context(RowMask.of(mask, jnp.zeros_like(mask), positions))
    decoder = decoder.clone(gather=gather, exchange=exchange)
    hidden, kept = decoder.apply({"params": params}, tokens, positions, context)
    layers = decoder.architecture.layers
    kept = kept if decoder.architecture.kinds else [jax.tree.map(lambda x, i=i: x[i], kept) for i in range(layers)]
    return hidden, tuple(begin_cache(one, copies, room) for one in kept)


def _unstack(decoder: Decoder, params: Any) -> Any:
    def one(path: Any, x: Array) -> Array:
        return x.astype(decoder.compute) if path[-1].key == "kernel" else x

    a = decoder.architecture
    layers = (layer_of(a.kinds, params["layers"], i) for i in range(a.layers))
    return {**params, "layers": [jax.tree.map_with_path(one, layer) for layer in layers]}


def _decode(decoder, params, token, position, cache, valid, generated, gather=None, exchange=None):
    decoder = decoder.clone(gather=gather, exchange=exchange)
    context = Context(generated=generated, mask=valid)
    hidden, cache = decoder.apply({"params": params}, token[:, None], position[:, None], context, cache)
    return hidden[:, 0], cache
