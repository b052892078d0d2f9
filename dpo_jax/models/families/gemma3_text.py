"""Gemma 3's language model (270M, 1B): Gemma 2 with normalised queries and keys, and other angles where a window is."""

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
    """Returns what a Gemma 3 config.json of model_type gemma3_text describes; pictures are not supported.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    arch.only_setting(config, "attn_logit_softcapping", None)
    new, dim = config.get("rope_parameters") or {}, config["head_dim"]
    # Either one for each kind of layer, or the older form, whose scaling is that of the layers without a window.
    whole = new.get("full_attention") or config.get("rope_scaling") or {}
    near = new.get("sliding_attention") or {}
    return gemma2.gemma2_like(
        config,
        "gemma3_text",
        every=arch.get_setting(config, "sliding_window_pattern", 6),
        qk_norm="head",
        rope=arch.rope_of(whole, dim, arch.get_setting(config, "rope_theta", 1e6)),
        window_rope=arch.rope_of(near, dim, arch.get_setting(config, "rope_local_base_freq", 1e4)),
    )


tensors = gemma2.tensors
