"""Phi-3 and Phi-4, up to the context of pretraining: Llama with fused projections, part of a head rotated."""

import dataclasses
import math

from dpo_jax.errors import UserError
from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, HfConfig, Rope
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor, TensorPart

CLASS = "Phi3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None}
DEFAULTS |= {"original_max_position_embeddings": 4096}


def architecture(config: HfConfig) -> Architecture:
    """Returns what a Phi-3 config.json describes. One of 128k tokens has the 4096 positions of pretraining, since the
    angles of all positions are others as soon as a text is longer.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    for key in ("attention_bias", "mlp_bias"):
        arch.only_setting(config, key, False)
    arch.only_setting(config, "layer_types", None)
    layers = arch.need_setting(config, "num_hidden_layers")
    kinds = None if config["sliding_window"] is None else ["sliding_attention"] * layers
    dim = arch.head_dim(
        config, arch.need_setting(config, "hidden_size"), arch.need_setting(config, "num_attention_heads")
    )
    rope = _rope(config, dim)
    fields = {"max_positions": rope.original_positions} if rope.scaling == "longrope" else {}
    return llama.llama_like(config, "phi3", rope=rope, windows=arch.layer_windows(config, layers, kinds), **fields)


def _rope(config: HfConfig, dim: int) -> Rope:
    """Returns the rotary embedding; the factors that "longrope" has for longer texts are not looked at.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    new, part = arch.rope_settings(config), ("partial_rotary_factor", 1.0)
    if arch.get_setting(new, "rope_type", new.get("type")) not in ("longrope", "su"):  # its first name
        return arch.rope(config, dim, part=part)
    plain = {key: new[key] for key in ("rope_theta", part[0]) if key in new}
    rope = arch.rope({**config, "rope_scaling": None, "rope_parameters": plain}, dim, part=part)
    short = tuple(float(x) for x in arch.need_setting(new, "short_factor"))
    if 2 * len(short) != rope.dims:
        why = f"short_factor has {len(short)} numbers; the {rope.dims} rotary dimensions need half as many as they are"
        raise UserError(f"config.json: {why}")
    original = int(arch.need_setting(config, "original_max_position_embeddings"))
    factor = arch.get_setting(new, "factor", config["max_position_embeddings"] / original)
    usual = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    amplitude = float(arch.get_setting(new, "attention_factor", usual))
    return dataclasses.replace(rope, scaling="longrope", original_positions=original, short=short, amplitude=amplitude)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer."""
    apart = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    table = {k: v for k, v in llama.tensors(a).items() if not any(name in k for name in apart)}
    ends = (0, a.heads, a.heads + a.kv_heads, a.heads + 2 * a.kv_heads)
    qkv = (TensorPart(("layers", name, "kernel"), 1, (slice(*ends[i : i + 2]),)) for i, name in enumerate("qkv"))
    up = (TensorPart(("layers", name, "kernel"), 1, (i,)) for i, name in enumerate(("gate", "up")))
    table["model.layers.{i}.self_attn.qkv_proj.weight"] = Tensor(((ends[-1], a.head_dim), (a.width,)), tuple(qkv))
    table["model.layers.{i}.mlp.gate_up_proj.weight"] = Tensor(((2, a.mlp), (a.width,)), tuple(up))
    return table
