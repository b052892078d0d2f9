"""EXAONE 4 (1.2B, 32B): norms after attention and MLP and of queries and keys; with windows, positions only there."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, olmo2

CLASS = "Exaone4ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"sliding_window", "sliding_window_pattern", "layer_types"}
DEFAULTS = {"rms_norm_eps": 1e-5, "sliding_window": 4096, "num_key_value_heads": 32}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of an EXAONE 4 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    for key in ("attention_bias", "mlp_bias"):
        hf.only_setting(config, key, False)
    layers, hybrid = hf.need_setting(config, "num_hidden_layers"), config["sliding_window"] is not None
    windows = hf.layer_windows(config, layers, _layer_kinds(config, layers) if hybrid else None)
    nope = tuple(not window for window in windows or (0,) * layers) if hybrid else ()
    fields = {"windows": windows, "nope": nope if any(nope) else ()}
    return llama.llama_like(config, "exaone4", qk_norm="head", pre_norm=False, post_norm=True, **fields)


def _layer_kinds(config: hf.HfConfig, layers: int) -> list[str]:
    """Returns `layer_types`; without them every `sliding_window_pattern`-th layer has full attention.

    Raises:
      UserError: the pattern is no number and there are no `layer_types`.
    """
    if config.get("layer_types") is not None:
        return config["layer_types"]
    every = hf.get_setting(config, "sliding_window_pattern", 4)
    if type(every) is not int or every < 1:
        raise UserError(f"config.json: sliding_window_pattern = {every!r} is no number above 0; give layer_types")
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]


tensors = olmo2.tensors
