"""Ministral 3 (3B to 14B): Mistral with YaRN's angles, and queries that grow with their position."""

import dataclasses

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "Ministral3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"sliding_window"}
DEFAULTS = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144}
ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Ministral 3 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    if config.get("rope_scaling") is None and config.get("rope_parameters") is None:
        config["rope_parameters"] = ROPE
    for key in ("attention_bias", "mlp_bias"):
        hf.only_setting(config, key, False)
    layers, windowed = hf.need_setting(config, "num_hidden_layers"), config.get("sliding_window") is not None
    windows = hf.layer_windows(config, layers, ["sliding_attention"] * layers if windowed else None)
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    rope, settings = hf.rope_from_config(config, hf.head_dim(config, width, heads)), hf.rope_settings(config)
    if beta := hf.get_setting(settings, "llama_4_scaling_beta", 0.0):
        original = int(hf.need_setting(settings, "original_max_position_embeddings"))
        rope = dataclasses.replace(rope, growth=float(beta), original_positions=original)
    return llama.llama_like(config, "ministral3", rope=rope, windows=windows)


tensors = llama.tensors
