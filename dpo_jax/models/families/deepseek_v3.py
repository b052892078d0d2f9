"""DeepSeek-V3, V3.1 and R1 in bfloat16 (671B-A37B), Moonlight (16B-A3B): GLM-4.5's mixtures and latent attention."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax.models.architecture import Architecture, Latent
from dpo_jax.models.families import glm4_moe, llama
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, linear, same_layout

CLASS = "DeepseekV3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {*glm4_moe.COUNTS, "q_lora_rank", "kv_lora_rank"}
DEFAULTS = {"max_position_embeddings": 4096, "intermediate_size": 18432, "moe_intermediate_size": 2048}
DEFAULTS |= {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3}
DEFAULTS |= {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
DEFAULTS |= {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
DEFAULTS |= {"v_head_dim": 128}
ONLY = {"mlp_bias": False, "rope_interleave": True}
WHERE = "model.layers.{i}.self_attn."


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a DeepSeek-V3 config.json. `q_lora_rank: null` means queries without a latent.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = glm4_moe.filled_config(config, DEFAULTS)
    plain, rotated = (hf.need_setting(config, f"qk_{part}_head_dim") for part in ("nope", "rope"))
    same = {"num_key_value_heads": config.get("num_attention_heads"), "head_dim": rotated}
    for key, value in {**ONLY, **same, "qk_head_dim": plain + rotated}.items():
        hf.only_setting(config, key, value)
    config |= same
    rope = hf.rope_from_config(config, rotated)
    fields: dict[str, Any] = {"rope": rope, "head_dim": plain + rotated, **glm4_moe.mixture_fields(config)}
    values = hf.need_setting(config, "v_head_dim")
    fields["latent"] = Latent(config["q_lora_rank"], hf.need_setting(config, "kv_lora_rank"), values)
    return llama.llama_like(config, "deepseek_v3", score_scale=_score_scale(config, plain + rotated), **fields)


def _score_scale(config: hf.HfConfig, head_dim: int) -> float | None:
    """Returns what multiplies scores, if YaRN's `mscale_all_dim` changes it (arXiv 2309.00071, section 3.4)."""
    settings = hf.rope_settings(config)
    part = hf.get_setting(settings, "mscale_all_dim", 0)
    if hf.get_setting(settings, "rope_type", "default") == "default" or not part:
        return None
    factor = float(hf.need_setting(settings, "factor"))
    return head_dim**-0.5 * (0.1 * part * math.log(factor) + 1 if factor > 1 else 1.0) ** 2


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer and `{e}` for the expert."""
    return with_latents(glm4_moe.tensors(a), a)


def fused_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the parameters of transformers 5's model by name: all experts of a layer in a tensor."""
    return with_latents(glm4_moe.fused_tensors(a), a)


def with_latents(table: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """Returns a table with latent attention. In a head of the file the rotated dimensions come last, neighbors
    together; here they come first, neighbors apart."""
    assert a.latent is not None
    assert a.rope is not None
    every: Any = slice(None)
    plain, keys, queries = a.head_dim - a.rope.dims, a.latent.keys, a.latent.queries
    rotated = np.concatenate([np.arange(0, a.rope.dims, 2), np.arange(1, a.rope.dims, 2)])
    take = (every, np.concatenate([plain + rotated, np.arange(plain)]))
    down = (("kv_down", (slice(0, keys),)), ("k_rotary", (keys + rotated,)))
    up = (("k", (every, slice(0, plain))), ("v", (every, slice(plain, plain + a.value_dim))))
    found = {
        "q_b_proj" if queries else "q_proj": linear(_path("q"), (a.heads, a.head_dim), (queries or a.width,), take),
        "kv_a_proj_with_mqa": Tensor(
            ((keys + a.rope.dims,), (a.width,)), tuple(TensorPart(_path(name), 1, part) for name, part in down)
        ),
        "kv_a_layernorm": same_layout(_path("kv_down_norm", "scale"), keys),
        "kv_b_proj": Tensor(
            ((a.heads, plain + a.value_dim), (keys,)), tuple(TensorPart(_path(name), 1, part) for name, part in up)
        ),
        "o_proj": linear(_path("o"), (a.width,), (a.heads, a.value_dim)),
    }
    if queries:
        found["q_a_proj"] = linear(_path("q_down"), (queries,), (a.width,))
        found["q_a_layernorm"] = same_layout(_path("q_down_norm", "scale"), queries)
    named = {f"{WHERE}{name}.weight": tensor for name, tensor in found.items()}
    if a.qkv_bias:
        parts = (TensorPart(_path(name, "bias"), 0, part) for name, part in down)
        named[WHERE + "kv_a_proj_with_mqa.bias"] = Tensor(((keys + a.rope.dims,),), tuple(parts))
    if a.qkv_bias and queries:
        named[WHERE + "q_a_proj.bias"] = same_layout(_path("q_down", "bias"), queries)
    rest = {name: tensor for name, tensor in table.items() if ".self_attn." not in name or name.endswith("o_proj.bias")}
    return {**rest, **named}


def _path(name: str, leaf: str = "kernel") -> tuple[str, ...]:
    return "layers", name, leaf
