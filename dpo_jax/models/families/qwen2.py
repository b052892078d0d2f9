"""Qwen2, Qwen2.5 (0.5B to 72B): Llama with biases of queries, keys and values, perhaps windows in the upper layers."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "Qwen2ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"sliding_window", "layer_types"}
DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Qwen2 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "attention_bias", True)
    hf.only_setting(config, "mlp_bias", False)
    return llama.llama_like(config, "qwen2", qkv_bias=True, out_bias=False, windows=qwen_windows(config))


def qwen_windows(config: hf.HfConfig) -> tuple[int, ...]:
    """Returns the window of each layer: none unless `use_sliding_window`, then from `max_window_layers` up.

    Raises:
      UserError: a setting is missing or not supported.
    """
    layers = hf.need_setting(config, "num_hidden_layers")
    if not config.get("use_sliding_window") and "sliding_attention" in (config.get("layer_types") or ()):
        why = "layer_types has sliding_attention, but use_sliding_window is false"
        raise UserError(f"config.json: {why}; set it to true, or make all layers full_attention")
    if not config.get("use_sliding_window") or config["sliding_window"] is None:
        return hf.layer_windows({**config, "sliding_window": None}, layers, None)
    full = min(layers, hf.get_setting(config, "max_window_layers", DEFAULTS["max_window_layers"]))
    kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    return hf.layer_windows(config, layers, kinds)


tensors = llama.tensors
