"""Decoder-only language models as pure functions of their parameters: the interface that the package uses."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.attention import CHUNKS, RowMask, packed_attention
from dpo_jax.models.blocks import block_attention
from dpo_jax.models.cache import begin_cache
from dpo_jax.models.decoder import Cache, Context, Decoder
from dpo_jax.models.groups import layer_of
from dpo_jax.models.remat import POLICIES
from dpo_jax.records import Array
from dpo_jax.sharding.row_split import RowSplit

COMPUTE = ("float32", "bfloat16")


class Model(NamedTuple):
    """The pure functions of one architecture. Parameters are a nested dict of float32, layers stacked on axis 0.

    Axis letters: R rows, T tokens, D model width, V vocabulary, P prompts, B = P * copies sequences.

    Attributes:
      architecture: shapes and options of the model.
      init: key -> params, random as Hugging Face initializes them. Jit it: it traces the model on one token.
      hidden: (params, tokens, positions, segment_ids, branch_ids), each int32[R, T] -> hidden states [R, T, D] after
        the final norm. Keyword `gather` all-gathers the parameters of each layer just before use; keyword `exchange`
        looks embeddings up in parts of the table (`Collectives.exchange`); keyword `attend` replaces
        `packed_attention`; keyword `split` returns those of this device's tokens only, [R, T / parts, D]; keyword
        `counted` float32[R, T] also returns the mean over layers of `experts.routing_of` [R, 2, E]; keyword `experts`
        says how devices shard the experts of a mixture (`Collectives.experts`).
      head: params -> float32[V, D]. Logits are hidden @ head.T, then `capped` by the architecture's `logit_cap`. A
        head bias is one more column of the head, multiplied by a column of ones in the hidden states. The head of a
        reward model is float32[1, D], and its product with a hidden state is the reward of the text up to there.
      prefill: (params, tokens, positions, mask, copies, room) -> hidden states [P, T, D] of P prompts, which end at
        the right, and a cache in which `copies` sequences share each prompt, with capacity for `room` generated
        tokens; `mask` int32[P, T] is 1 for real tokens, 0 for left padding. Keywords `gather` and `exchange`, as well
        as those of `decode`, are those of `hidden`.
      unstack: params -> decode-time params: one tree per layer, kernels cast to the compute dtype. A copy, made once
        per generation.
      decode: (params, token [B], position [B], cache, valid, generated) -> hidden states [B, D] and the cache with the
        new tokens; `generated` tokens per sequence precede them. `valid` bool[P, T] is True for real prompt tokens,
        False for left padding.
      axes: tree like params; the leaves are tuples with the logical name of each axis.
      compute: dtype of activations and matmuls.
      split_head: params -> the head in parts, which `split_token_logps` takes, where no device is to hold the whole;
        None where `head` is used.
      attention: name of the attention backend in `hidden`. The other functions always use the built-in one.
      split: how devices share the tokens of a row in `hidden`; None if each has whole rows.
      router_loss: weight of the router loss (`routing.load_balance`) in a step; 0 for none.
      hf_config: contents of the config.json it was loaded from; None if it was built from an architecture.
      end_ids: ids of the tokens that end a text, by the folder it was loaded from; () if it was built.
    """

    architecture: Architecture
    init: Callable[[Array], Any]
    hidden: Callable[..., Array]
    head: Callable[[Any], Array]
    prefill: Callable[[Any, Array, Array, Array, int, int], tuple[Array, Cache]]
    unstack: Callable[[Any], Any]
    decode: Callable[[Any, Array, Array, Cache, Array, Array], tuple[Array, Cache]]
    axes: Any
    compute: str = "float32"
    split_head: Callable[[Any], Any] | None = None
    attention: str = CHUNKS
    split: RowSplit | None = None
    router_loss: float = 0.0
    hf_config: Any = None
    end_ids: tuple[int, ...] = ()


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
