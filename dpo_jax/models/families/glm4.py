"""GLM-4 (9B and 32B of 0414): norms on both sides, a fused MLP, neighboring dimensions rotated in half of a head."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, with_neighbors_apart

CLASS = "Glm4ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS
DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072}
DEFAULTS |= {"attention_bias": True}
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GLM-4 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "mlp_bias", False)
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    rope = hf.rope_from_config(config, hf.head_dim(config, width, heads), part=("partial_rotary_factor", 0.5))
    return llama.llama_like(config, "glm4", rope=rope, post_norm=True, out_bias=False)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    separate = llama.llama_tensors(a, NORMS)
    table = {name: t for name, t in separate.items() if not name.endswith(("gate_proj.weight", "up_proj.weight"))}
    up = (TensorPart(("layers", name, "kernel"), 1, (i,)) for i, name in enumerate(("gate", "up")))
    table["model.layers.{i}.mlp.gate_up_proj.weight"] = Tensor(((2, a.mlp), (a.width,)), tuple(up))
    return with_neighbors_apart(table, a)
