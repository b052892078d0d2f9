"""Mistral (7B v0.1 to v0.3, Zephyr): Llama with a sliding window in every layer."""

from dpo_jax.models import architecture as arch
from dpo_jax.models import llama
from dpo_jax.models.architecture import Architecture, Config

CLASS = "MistralForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def architecture(config: Config) -> Architecture:
    """Returns what a Mistral config.json describes; `sliding_window: null` means none.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    arch.only(config, "attention_bias", False)
    arch.only(config, "mlp_bias", False)
    arch.only(config, "layer_types", None)
    window = config["sliding_window"]
    layers = arch.need(config, "num_hidden_layers")
    kinds = None if window is None else ["sliding_attention"] * layers
    return llama.like(config, "mistral", windows=arch.windows(config, layers, kinds))


tensors = llama.tensors
