"""Qwen2, Qwen2.5 (0.5B to 72B): Llama with biases of queries, keys and values, perhaps windows in the upper layers."""

from dpo_jax.models import architecture as arch
from dpo_jax.models import llama
from dpo_jax.models.architecture import Architecture, Config

CLASS = "Qwen2ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}


def architecture(config: Config) -> Architecture:
    """Returns what a Qwen2 config.json describes.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    arch.only(config, "attention_bias", True)
    arch.only(config, "mlp_bias", False)
    return llama.like(config, "qwen2", qkv_bias=True, out_bias=False, windows=windows(config))


def windows(config: Config) -> tuple[int, ...]:
    """Returns the window of each layer: none unless `use_sliding_window`, then from `max_window_layers` up.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    layers = arch.need(config, "num_hidden_layers")
    if not config.get("use_sliding_window") or config["sliding_window"] is None:
        return arch.windows({**config, "sliding_window": None}, layers, None)
    full = min(layers, arch.get(config, "max_window_layers", DEFAULTS["max_window_layers"]))
    kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    return arch.windows(config, layers, kinds)


tensors = llama.tensors
