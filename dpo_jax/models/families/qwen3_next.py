"""Qwen3-Next (80B-A3B): three of four layers with linear attention, the others with gates, and 10 of 512 experts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture, Delta
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, linear, of_kind, same_layout

CLASS = "Qwen3NextForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"num_experts", "num_local_experts", "layer_types"}
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 2, "head_dim": 256, "num_experts_per_tok": 10}
DEFAULTS |= {"intermediate_size": 5632, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
KINDS = {"full_attention": "attention", "linear_attention": "delta"}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Qwen3-Next config.json, whose `intermediate_size` is of no layer.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "decoder_sparse_step", 1)
    hf.only_setting(config, "mlp_only_layers", [])
    return mixture_like(config, "qwen3_next", 512, hf.get_setting(config, "norm_topk_prob", True))


def mixture_like(config: hf.HfConfig, family: str, count: int, renormalized: bool) -> Architecture:
    """Returns what `delta_like` does, of a mixture of experts; `count` of them if the config does not say.

    Raises:
      UserError: a setting is missing or not supported.
    """
    found = experts.mixture_settings(config, count, renormalized)
    mixture = dataclasses.replace(found, shared=hf.need_setting(config, "shared_expert_intermediate_size"))
    return delta_like(config, family, mlp=hf.need_setting(config, "moe_intermediate_size"), mixture=mixture)


def delta_like(config: hf.HfConfig, family: str, **fields: Any) -> Architecture:
    """Returns the architecture of a config.json with linear attention in some layers.

    Args:
      config: the contents of config.json.
      family: its `model_type`.
      **fields: as for `llama_like`.

    Raises:
      UserError: a setting is missing or not supported.
    """
    for key, value in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        hf.only_setting(config, key, value)
    kinds = layer_kinds(config)
    delta = delta_settings(config) if "delta" in kinds else None
    rope = hf.rope_from_config(config, config["head_dim"], part=("partial_rotary_factor", 0.25))
    fields = {"kinds": kinds if delta else (), "delta": delta, "rope": rope, **fields}
    return llama.llama_like(config, family, qk_norm="head", norm_offset=1.0, gated_attention=True, **fields)


def layer_kinds(config: hf.HfConfig) -> tuple[Any, ...]:
    """Returns the kind of each layer, from `layer_types` or `full_attention_interval`.

    Raises:
      UserError: a kind is unknown, none is full attention, or there are not as many as layers.
    """
    layers, every = hf.need_setting(config, "num_hidden_layers"), hf.get_setting(config, "full_attention_interval", 4)
    if every < 1:
        raise UserError(f"config.json: full_attention_interval = {every}: it must be at least 1")
    usual = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    kinds = hf.get_setting(config, "layer_types", usual)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(
            f"config.json: layer_types has {unknown[0]!r}, which is not supported; known: {', '.join(KINDS)}"
        )
    if len(kinds) != layers:
        raise UserError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    if "full_attention" not in kinds:
        raise UserError("config.json: layer_types has no full_attention, which is not supported; make one layer so")
    return tuple(KINDS[kind] for kind in kinds)


def delta_settings(config: hf.HfConfig) -> Delta:
    """Returns the sizes of linear attention.

    Raises:
      UserError: the heads of keys do not divide those of values, or the convolution has less than two taps.
    """
    keys, values = (hf.get_setting(config, f"linear_num_{of}_heads", n) for of, n in (("key", 16), ("value", 32)))
    key_dim, value_dim = (hf.get_setting(config, f"linear_{of}_head_dim", 128) for of in ("key", "value"))
    taps = hf.get_setting(config, "linear_conv_kernel_dim", 4)
    if values % keys:
        raise UserError(
            f"config.json: linear_num_key_heads = {keys} does not divide linear_num_value_heads = {values}; correct one"
        )
    if taps < 2:
        raise UserError(f"config.json: linear_conv_kernel_dim = {taps}: it must be at least 2")
    return Delta(keys, values, key_dim, value_dim, taps)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer and `{e}` for the expert."""
    return with_delta(with_shared(experts.per_expert_tensors(a), a), a, _interleaved)


def fused_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the parameters of transformers 5's model by name: all experts of a layer in a tensor."""
    return with_delta(with_shared(experts.fused_expert_tensors(a), a), a, _interleaved)


def with_shared(table: Mapping[str, Tensor], a: Architecture, name: str = "shared_expert") -> dict[str, Tensor]:
    """Returns the table of a mixture with the shared expert, of a name in the file."""
    assert a.mixture is not None
    assert a.mixture.shared is not None
    where, size = f"model.layers.{{i}}.mlp.{name}", a.mixture.shared
    found = {f"{where}_gate.weight": linear(("layers", "shared_weight", "kernel"), (1,), (a.width,))}
    found = found if a.mixture.gated_shared else {}
    for name in ("gate", "up", "down"):
        outputs, inputs = (a.width, size) if name == "down" else (size, a.width)
        path = ("layers", f"shared_{name}", "kernel")
        found[f"{where}.{name}_proj.weight"] = linear(path, (outputs,), (inputs,))
    return {**table, **found}


def with_delta(
    table: Mapping[str, Tensor], a: Architecture, projections: Callable[[Delta, int], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Returns a table whose attention has gates, beside layers of linear attention.

    Args:
      table: of a model with attention.
      a: its architecture.
      projections: (sizes of linear attention, D) -> the first projections of such a layer.
    """
    every: Any = slice(None)
    gated = (TensorPart(("layers", name, "kernel"), 1, (every, i)) for i, name in enumerate(("q", "q_gate")))
    attention = {name: tensor for name, tensor in table.items() if ".self_attn." in name}
    q = "model.layers.{i}.self_attn.q_proj.weight"
    attention[q] = Tensor(((a.heads, 2, a.head_dim), (a.width,)), tuple(gated))
    layers = {**_other_delta(a.delta, a.width), **projections(a.delta, a.width)} if a.delta else {}
    return {**table, **of_kind(attention, a, "attention"), **of_kind(layers, a, "delta")}


WHERE = "model.layers.{i}.linear_attn."


def delta_parts(d: Delta) -> tuple[tuple[str, slice], ...]:
    """Returns the channels of queries, keys and values, by the name of their parameters."""
    keys, values = d.key_channels, d.value_channels
    return ("q", slice(0, keys)), ("k", slice(keys, 2 * keys)), ("v", slice(2 * keys, 2 * keys + values))


def _other_delta(d: Delta, width: int) -> dict[str, Tensor]:
    """Returns the tensors of linear attention but its first projections."""
    parts = delta_parts(d)
    convolved = (TensorPart(("layers", f"delta_conv_{name}", "weight"), 0, (part, 0)) for name, part in parts)
    return {
        WHERE + "conv1d.weight": Tensor(((parts[-1][1].stop,), (1,), (d.taps,)), tuple(convolved)),
        WHERE + "A_log": same_layout(("layers", "delta_rates", "log"), d.value_heads),
        WHERE + "dt_bias": same_layout(("layers", "delta_rates", "shift"), d.value_heads),
        WHERE + "norm.weight": same_layout(("layers", "delta_norm", "scale"), d.value_dim),
        WHERE + "out_proj.weight": linear(("layers", "delta_o", "kernel"), (width,), (d.value_channels,)),
    }


def _interleaved(d: Delta, width: int) -> dict[str, Tensor]:
    """Returns the projections of linear attention in two tensors, each of them key head after key head."""
    ratio = d.value_heads // d.key_heads
    wide = (d.key_dim, d.key_dim, ratio * d.value_dim, ratio * d.value_dim)
    return {
        WHERE + "in_proj_qkvz.weight": _by_head(d, width, ("q", "k", "v", "gate"), wide),
        WHERE + "in_proj_ba.weight": _by_head(d, width, ("rate", "decay"), (ratio, ratio)),
    }


def _by_head(d: Delta, width: int, names: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor:
    """Returns a tensor that has, for each head of keys, outputs of several projections."""
    outputs = d.key_heads * sum(sizes)
    places = np.split(np.arange(outputs).reshape(-1, sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
    parts = zip(names, places, strict=True)
    made = (TensorPart(("layers", f"delta_{name}", "kernel"), 1, (place.ravel(),)) for name, place in parts)
    return Tensor(((outputs,), (width,)), tuple(made))
