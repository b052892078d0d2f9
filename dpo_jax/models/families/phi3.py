"""Phi-3 and Phi-4, up to the context of pretraining: Llama with fused projections, part of a head rotated."""

import dataclasses
import math

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture, Rope
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor, TensorPart

CLASS = "Phi3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"sliding_window", "layer_types"}
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None}
DEFAULTS |= {"original_max_position_embeddings": 4096}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Phi-3 config.json.

    A 128k model gets the 4096 positions of pretraining: in a longer text LongRoPE changes the angles of all positions.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    for key in ("attention_bias", "mlp_bias"):
        hf.only_setting(config, key, False)
    hf.only_setting(config, "layer_types", None)
    layers = hf.need_setting(config, "num_hidden_layers")
    kinds = None if config["sliding_window"] is None else ["sliding_attention"] * layers
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    rope = _rope(config, hf.head_dim(config, width, heads))
    fields = {"max_positions": rope.original_positions} if rope.scaling == "longrope" else {}
    return llama.llama_like(config, "phi3", rope=rope, windows=hf.layer_windows(config, layers, kinds), **fields)


def _rope(config: hf.HfConfig, dim: int) -> Rope:
    """Returns the rotary embedding; LongRoPE's `long_factor`, for longer texts, is ignored.

    Raises:
      UserError: a setting is missing or not supported.
    """
    new, part = hf.rope_settings(config), ("partial_rotary_factor", 1.0)
    if new.get("rope_type") not in ("longrope", "su"):  # "su" is its old name
        if new.get("rope_type") in ("yarn", "dynamic"):  # transformers reads yarn as longrope
            why = f"rope_type = {new['rope_type']!r} is not supported in phi3; set longrope, with its factors"
            raise UserError(f"config.json: {why}")
        return hf.rope_from_config(config, dim, part=part)
    plain = {key: new[key] for key in ("rope_theta", part[0]) if key in new}
    rope = hf.rope_from_config({**config, "rope_scaling": None, "rope_parameters": plain}, dim, part=part)
    short = tuple(float(x) for x in hf.need_setting(new, "short_factor"))
    if 2 * len(short) != rope.dims:
        why = f"short_factor has {len(short)} numbers; the {rope.dims} rotary dimensions need {rope.dims // 2}"
        raise UserError(f"config.json: {why}")
    original = int(hf.need_setting(config, "original_max_position_embeddings"))
    factor = hf.get_setting(new, "factor", config["max_position_embeddings"] / original)
    default = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    amplitude = float(hf.get_setting(new, "attention_factor", default))
    return dataclasses.replace(rope, scaling="longrope", original_positions=original, short=short, amplitude=amplitude)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    table = {k: v for k, v in llama.tensors(a).items() if not any(name in k for name in fused)}
    ends = (0, a.heads, a.heads + a.kv_heads, a.heads + 2 * a.kv_heads)
    qkv = (TensorPart(("layers", name, "kernel"), 1, (slice(*ends[i : i + 2]),)) for i, name in enumerate("qkv"))
    up = (TensorPart(("layers", name, "kernel"), 1, (i,)) for i, name in enumerate(("gate", "up")))
    table["model.layers.{i}.self_attn.qkv_proj.weight"] = Tensor(((ends[-1], a.head_dim), (a.width,)), tuple(qkv))
    table["model.layers.{i}.mlp.gate_up_proj.weight"] = Tensor(((2, a.mlp), (a.width,)), tuple(up))
    return table
