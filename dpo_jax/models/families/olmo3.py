"""OLMo 3 (7B, 32B): OLMo 2 with windows in three of four layers, whose angles are not scaled."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, olmo2

CLASS = "Olmo3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"sliding_window", "layer_types"}
DEFAULTS = {**olmo2.DEFAULTS, "sliding_window": 4096, "rope_theta": 5e5}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of an OLMo 3 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "mlp_bias", False)
    layers = hf.need_setting(config, "num_hidden_layers")
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)]
    windows = hf.layer_windows(config, layers, kinds)
    dim = hf.head_dim(config, *(hf.need_setting(config, key) for key in ("hidden_size", "num_attention_heads")))
    full, sliding = (
        hf.rope_from_config({**config, "rope_scaling": None, "rope_parameters": settings}, dim)
        for settings in hf.rope_settings_of_kinds(config)
    )
    window_rope = sliding if windows and sliding != full else None
    fields = {"rope": full, "window_rope": window_rope, "windows": windows}
    return llama.llama_like(config, "olmo3", qk_norm="all", pre_norm=False, post_norm=True, **fields)


tensors = olmo2.tensors
