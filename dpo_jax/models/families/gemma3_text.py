"""Gemma 3's language model (270M, 1B): Gemma 2 with normalized queries and keys, and other angles in windows."""

from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, HfConfig
from dpo_jax.models.families import gemma2, llama

CLASS = "Gemma3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
DEFAULTS = {
    **gemma2.DEFAULTS,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
}


def architecture(config: HfConfig) -> Architecture:
    """Returns the architecture of a Gemma 3 config.json of model_type gemma3_text; images are not supported.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    arch.only_setting(config, "attn_logit_softcapping", None)
    new, dim = config.get("rope_parameters") or {}, config["head_dim"]
    # The new form has settings for each kind of layer. The scaling of the old form is for layers without a window.
    full = new.get("full_attention") or config.get("rope_scaling") or {}
    sliding = new.get("sliding_attention") or {}
    return gemma2.gemma2_like(
        config,
        "gemma3_text",
        every=arch.get_setting(config, "sliding_window_pattern", 6),
        qk_norm="head",
        rope=arch.rope_from_settings(full, dim, arch.get_setting(config, "rope_theta", 1e6)),
        window_rope=arch.rope_from_settings(sliding, dim, arch.get_setting(config, "rope_local_base_freq", 1e4)),
    )


tensors = gemma2.tensors
