"""Gemma 3's language model (270M, 1B): Gemma 2 with normalized queries and keys, and other angles in windows."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gemma2, llama
from dpo_jax.models.families import hf_config as hf

CLASS = "Gemma3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
DEFAULTS = {
    **gemma2.DEFAULTS,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Gemma 3 config.json of model_type gemma3_text; images are not supported.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "attn_logit_softcapping", None)
    new, dim = config.get("rope_parameters") or {}, config["head_dim"]
    # The new form has settings for each kind of layer. The scaling of the old form is for layers without a window.
    full = new.get("full_attention") or config.get("rope_scaling") or {}
    sliding = new.get("sliding_attention") or {}
    return gemma2.gemma2_like(
        config,
        "gemma3_text",
        every=hf.get_setting(config, "sliding_window_pattern", 6),
        qk_norm="head",
        rope=hf.rope_from_settings(full, dim, hf.get_setting(config, "rope_theta", 1e6)),
        window_rope=hf.rope_from_settings(sliding, dim, hf.get_setting(config, "rope_local_base_freq", 1e4)),
    )


tensors = gemma2.tensors
