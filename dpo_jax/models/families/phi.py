"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side after one norm, part of a head rotated, with biases."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gpt2, llama
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, renamed, same_layout

CLASS = "PhiForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"qk_layernorm"}
NAMES = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2", "self_attn.o_proj": "self_attn.dense"}
NAMES |= {"model.norm": "model.final_layernorm"}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Phi config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    hf.only_setting(config, "qk_layernorm", False)
    for key in ("attention_bias", "mlp_bias"):
        hf.only_setting(config, key, True)
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    dim = hf.head_dim(config, width, heads)
    return gpt2.gpt_like(
        config,
        "phi",
        width=width,
        layers=hf.need_setting(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=hf.kv_heads(config, heads),
        head_dim=dim,
        mlp=hf.need_setting(config, "intermediate_size"),
        eps=hf.get_setting(config, "layer_norm_eps", 1e-5),
        activation=hf.activation(config, "hidden_act", "gelu_new"),
        rope=hf.rope_from_config(config, dim, part=("partial_rotary_factor", 0.5)),
        parallel=True,
        shared_norm=True,
        qkv_bias=True,
        out_bias=True,
        tied=hf.get_setting(config, "tie_word_embeddings", False),
        head_bias=True,
        max_positions=hf.get_setting(config, "max_position_embeddings", 2048),
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    table = renamed(llama.llama_tensors(a, {"attention_norm": "input_layernorm"}), NAMES)
    return {**table, "lm_head.bias": same_layout(("head_bias",), a.vocab)} if a.head_bias else table
