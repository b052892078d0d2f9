"""Mistral (7B v0.1 to v0.3, Zephyr): Llama with a sliding window in every layer."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "MistralForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"sliding_window", "layer_types"}
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Mistral config.json; `sliding_window: null` means none.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "attention_bias", False)
    hf.only_setting(config, "mlp_bias", False)
    hf.only_setting(config, "layer_types", None)
    window = config["sliding_window"]
    layers = hf.need_setting(config, "num_hidden_layers")
    kinds = None if window is None else ["sliding_attention"] * layers
    return llama.llama_like(config, "mistral", windows=hf.layer_windows(config, layers, kinds))


tensors = llama.tensors
