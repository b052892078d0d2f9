"""Decoder-only language models as pure functions of their parameters: what the rest of the package uses."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax.models import score
from dpo_jax.models.architecture import Architecture, Config
from dpo_jax.models.attention import capped, capped_slope, packed_attention
from dpo_jax.models.decoder import POLICIES, Cache, Context, Decoder, grown
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.records import Array, UserError

__all__ = ["Architecture", "Cache", "Model", "architecture_of", "build", "capped", "capped_slope"]
__all__ += ["described", "families", "family", "grown"]

COMPUTE = ("float32", "bfloat16")
ABSENT = {"mixtral": "a mixture of experts", "moe": "a mixture of experts"}  # nobody means a family of a similar name


class Model(NamedTuple):
    """The pure functions of one architecture. Parameters are a nested dict of float32, layers stacked on axis 0.

    Attributes:
      architecture: what it is.
      init: key -> params, random as Hugging Face initialises. Jit it, it runs the model on one token.
      hidden: (params, tokens, positions, group, branch), each int32[R, T] -> [R, T, D] after the final norm. With
        `whole`, a function, each layer's parameters go through it just before they are used; with `attend`, attention
        is computed by it, a function as `packed_attention`.
      head: params -> float32[V, D]; logits are hidden states times its transpose, then `capped` by the architecture's
        `logit_cap`. Where the head has a bias there is one more column, and a one in the hidden states. Of a reward
        model it is float32[1, D], and the product is the reward of the text so far.
      prefill: (params, tokens, positions, group, copies, room) -> hidden [P, T, D] of P prompts, which end at the
        right, and a cache in which each has `copies` sequences, B = P * copies, with room for so many more tokens;
        `group` 0 is padding.
      apart: params -> the same as `decode` takes them: a list of layers, kernels in the compute dtype. A copy, made
        once for many tokens.
      decode: (params, token [B], position [B], cache, valid, place) -> hidden [B, D] and the cache with the tokens,
        before which each sequence has `place` others; `valid` bool[P, T] says which tokens of the prompts are some.
      axes: like params, but tuples with the logical name of each axis.
      attention: the name of what computes attention in `hidden`; the other functions have their own.
    """

    architecture: Architecture
    init: Callable[[Array], Any]
    hidden: Callable[..., Array]
    head: Callable[[Any], Array]
    prefill: Callable[[Any, Array, Array, Array, int, int], tuple[Array, Cache]]
    apart: Callable[[Any], Any]
    decode: Callable[[Any, Array, Array, Cache, Array, Array], tuple[Array, Cache]]
    axes: Any
    attention: str = CHUNKS


def build(architecture: Architecture, *, compute: str = "float32", remat: str = "none") -> Model:
    """Returns the functions of an architecture.

    Args:
      architecture: what to build.
      compute: dtype of activations and matmuls, "float32" or "bfloat16".
      remat: what the backward pass computes again: "none"; "dots", all but projections and attention; "full".

    Raises:
      UserError: an unknown `compute` or `remat`.
    """
    for key, value, known in (("compute", compute, COMPUTE), ("remat", remat, tuple(POLICIES))):
        if value not in known:
            raise UserError(f"model.{key}: {value!r} is not known; choose one of {', '.join(known)}")
    decoder = Decoder(architecture, compute, remat)
    keeping = Decoder(architecture, compute, keep=True)
    shapes = jax.eval_shape(partial(_init, decoder), jax.eval_shape(jax.random.key, 0))
    return Model(
        architecture,
        init=lambda key: nn.meta.unbox(_init(decoder, key)),
        hidden=partial(_hidden, decoder),
        head=partial(_head, architecture),
        prefill=partial(_prefill, keeping),
        apart=partial(_apart, keeping),
        decode=partial(_decode, keeping),
        axes=jax.tree.map(lambda leaf: leaf.names, shapes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)),
    )


def _init(decoder: Decoder, key: Array) -> Any:
    one = jnp.zeros((1, 1), jnp.int32)
    return decoder.init(key, one, one, Context(group=one, branch=one))["params"]


def _hidden(decoder, params, tokens, positions, group, branch, whole=None, attend=packed_attention):
    context = Context(group=group, branch=branch)
    return decoder.clone(whole=whole, attend=attend).apply({"params": params}, tokens, positions, context)[0]


def _head(architecture: Architecture, params: Any) -> Array:
    if architecture.score:
        return params["score"]
    weight = params["embedding" if architecture.tied else "head"]
    return jnp.concatenate([weight, params["head_bias"][:, None]], axis=1) if architecture.head_bias else weight


def _prefill(decoder, params, tokens, positions, group, copies, room):
    context = Context(group=group, branch=jnp.zeros_like(group))
    hidden, kept = decoder.apply({"params": params}, tokens, positions, context)
    keys, values = (x.swapaxes(2, 3) for x in kept)
    layers, prompts, kv_heads, _, dim = keys.shape
    own = jnp.zeros((prompts * copies, kv_heads, room, dim), keys.dtype)
    return hidden, tuple((keys[i], values[i], own, own) for i in range(layers))


def _apart(decoder: Decoder, params: Any) -> Any:
    def one(path: Any, x: Array, layer: int) -> Array:
        return x[layer].astype(decoder.compute) if path[-1].key == "kernel" else x[layer]

    layers = range(decoder.architecture.layers)
    return {**params, "layers": [jax.tree.map_with_path(partial(one, layer=i), params["layers"]) for i in layers]}


def _decode(decoder, params, token, position, cache, valid, place):
    context = Context(place=place, mask=valid)
    hidden, cache = decoder.apply({"params": params}, token[:, None], position[:, None], context, cache)
    return hidden[:, 0], cache


def described() -> list[tuple[str, str, str]]:
    """Returns of each family its `model_type`, its class in transformers, and a line that says what it is."""
    modules = [(name, family(name)) for name in families()]
    return [(name, module.CLASS, (module.__doc__ or "").splitlines()[0]) for name, module in modules]


def architecture_of(config: Config) -> Architecture:
    """Returns what a config.json describes: a language model or, if its `architectures` says so, a reward model.

    Raises:
      UserError: a family or a setting that is missing or not supported.
    """
    found = family(config["model_type"]).architecture(config)
    return score.scoring(found) if score.is_score(config) else found


@cache
def families() -> tuple[str, ...]:
    """Returns the known values of `model_type`: the files of this folder that have a table of tensors."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(n for n in names if hasattr(importlib.import_module(f"{__name__}.{n}"), "tensors")))


def family(model_type: str) -> ModuleType:
    """Returns a family's module, with its `architecture(config)` and `tensors(architecture)`.

    Raises:
      UserError: there is none of this name.
    """
    for absent, why in ABSENT.items():
        if absent in str(model_type):
            raise UserError(f"config.json: model_type {model_type!r} is {why}, which is not supported")
    if model_type not in families():
        longer = [name for name in families() if name.startswith(f"{model_type}_")]
        close = longer or difflib.get_close_matches(str(model_type), families(), 1)
        hint = f"did you mean {close[0]}? " if close else ""
        how = "a new one is a file in dpo_jax/models/, see dpo-jax models"
        known = f"known are {', '.join(families())}; {how}"
        raise UserError(f"config.json: model_type {model_type!r} is not known; {hint}{known}")
    return importlib.import_module(f"{__name__}.{model_type}")
