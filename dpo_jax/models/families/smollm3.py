"""SmolLM3 (3B): Llama without rotary positions in every fourth layer."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "SmolLM3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"no_rope_layers", "no_rope_layer_interval", "sliding_window", "layer_types"}
DEFAULTS = {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 2e6, "max_position_embeddings": 32768}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a SmolLM3 config.json. Windows, if used, are those of layers without positions.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    layers, every = hf.need_setting(config, "num_hidden_layers"), hf.get_setting(config, "no_rope_layer_interval", 4)
    if every < 1:
        raise UserError(f"config.json: no_rope_layer_interval = {every}: it must be at least 1")
    rotated = hf.get_setting(config, "no_rope_layers", [(i + 1) % every for i in range(layers)])[:layers]
    if len(rotated) != layers:
        raise UserError(f"config.json: no_rope_layers has {len(rotated)} entries for {layers} layers")
    windowed = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    kinds = ["sliding_attention" if windowed and not one else "full_attention" for one in rotated]
    windows = hf.layer_windows(config, layers, kinds)
    if windows and not windowed:
        why = "layer_types has sliding_attention, but use_sliding_window is false"
        raise UserError(f"config.json: {why}; set it to true, or make all layers full_attention")
    nope = () if all(rotated) else tuple(not one for one in rotated)
    return llama.llama_like(config, "smollm3", windows=windows, nope=nope)


tensors = llama.tensors
