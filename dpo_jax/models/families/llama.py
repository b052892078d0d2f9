"""Llama 2 to 3.2, TinyLlama, SmolLM2 and many more: rotary positions, gated MLP, shared key-value heads.

Mistral, Qwen, Phi-3, Gemma and OLMo 2 are defined by their differences: they use `llama_like` and `llama_tensors` too.
"""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, linear, same_layout, untied_head

CLASS = "LlamaForCausalLM"
PREFIX = "model."
HEAD = "lm_head.weight"
BUFFERS = ("rotary_emb.inv_freq",)
READS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias", "mlp_bias"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}  # ours -> name in the file


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Llama config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    return llama_like(config, "llama")


def llama_like(config: hf.HfConfig, family: str, **fields: Any) -> Architecture:
    """Returns the architecture of a config.json with Llama's keys.

    Args:
      config: the contents of config.json.
      family: its `model_type`.
      **fields: other fields of `Architecture`; they replace what the config says.

    Raises:
      UserError: a setting is missing or not supported.
    """
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    dim = hf.head_dim(config, width, heads)
    attention_bias = hf.get_setting(config, "attention_bias", False)
    values: dict[str, Any] = {
        "family": family,
        "vocab": hf.need_setting(config, "vocab_size"),
        "width": width,
        "layers": hf.need_setting(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": hf.kv_heads(config, heads),
        "head_dim": dim,
        "mlp": hf.need_setting(config, "intermediate_size"),
        "norm": "rms",
        "eps": hf.get_setting(config, "rms_norm_eps", 1e-6),
        "gated": True,
        "parallel": False,
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": hf.get_setting(config, "mlp_bias", False),
        "tied": hf.get_setting(config, "tie_word_embeddings", False),
        "max_positions": hf.get_setting(config, "max_position_embeddings", 2048),
        "initializer_range": hf.get_setting(config, "initializer_range", 0.02),
    }
    if "activation" not in fields:
        values["activation"] = hf.activation(config, "hidden_act", "silu")
    if "rope" not in fields:
        values["rope"] = hf.rope_from_config(config, dim)
    rope = fields.get("rope") or values["rope"]
    if rope.scaling == "yarn":  # a config.json often has the positions of pretraining still
        values["max_positions"] = max(values["max_positions"], int(rope.factor * rope.original_positions))
    return Architecture(**{**values, **fields})


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    return llama_tensors(a, NORMS)


def llama_tensors(a: Architecture, norms: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the tensors of a model that names them as Llama does.

    Args:
      a: the architecture.
      norms: the norms of a layer, our name -> name in the file.
    """
    width, layer = a.width, "model.layers.{i}."
    found = {
        "model.embed_tokens.weight": same_layout(("embedding",), a.vocab, width),
        "model.norm.weight": same_layout(("final_norm", "scale"), width),
        layer + "self_attn.o_proj.weight": linear(("layers", "o", "kernel"), (width,), (a.heads, a.head_dim)),
        layer + "mlp.up_proj.weight": linear(("layers", "up", "kernel"), (a.mlp,), (width,)),
        layer + "mlp.down_proj.weight": linear(("layers", "down", "kernel"), (width,), (a.mlp,)),
    }
    if a.gated:
        found[layer + "mlp.gate_proj.weight"] = linear(("layers", "gate", "kernel"), (a.mlp,), (width,))
    for ours, name in norms.items():
        found[f"{layer}{name}.weight"] = same_layout(("layers", ours, "scale"), width)
    if a.norm == "layer" and a.norm_bias:
        found["model.norm.bias"] = same_layout(("final_norm", "bias"), width)
        found |= {f"{layer}{name}.bias": same_layout(("layers", ours, "bias"), width) for ours, name in norms.items()}
    for name, heads in (("q", a.heads), ("k", a.kv_heads), ("v", a.kv_heads)):
        where, shape = f"{layer}self_attn.{name}_proj.", (heads, a.head_dim)
        found[where + "weight"] = linear(("layers", name, "kernel"), shape, (width,))
        if a.qkv_bias:
            found[where + "bias"] = Tensor((shape,), (TensorPart(("layers", name, "bias")),))
        if a.qk_norm and name != "v":
            norm = TensorPart(("layers", f"{name}_norm", "scale"))
            found[f"{layer}self_attn.{name}_norm.weight"] = Tensor((shape[a.qk_norm == "head" :],), (norm,))
    if a.out_bias:
        found[layer + "self_attn.o_proj.bias"] = same_layout(("layers", "o", "bias"), width)
    if a.mlp_bias:
        for name, size in (("gate", a.mlp), ("up", a.mlp), ("down", width))[not a.gated :]:
            found[f"{layer}mlp.{name}_proj.bias"] = same_layout(("layers", name, "bias"), size)
    return {**found, **untied_head(HEAD, a)}
