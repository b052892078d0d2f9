"""Gemma 3's language model (270M, 1B): Gemma 2 with normalized queries and keys, and other angles in windows."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gemma2, llama
from dpo_jax.models.families import hf_config as hf

CLASS = "Gemma3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = gemma2.READS | {"rope_local_base_freq", "sliding_window_pattern"}
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
    dim, (full, sliding) = config["head_dim"], hf.rope_settings_of_kinds(config)
    return gemma2.gemma2_like(
        config,
        "gemma3_text",
        every=hf.get_setting(config, "sliding_window_pattern", 6),
        qk_norm="head",
        rope=hf.rope_from_config({"rope_theta": 1e6, **config, **_only(full)}, dim),
        window_rope=hf.rope_from_config(
            {"rope_local_base_freq": 1e4, **config, **_only(sliding)}, dim, theta="rope_local_base_freq"
        ),
    )


def _only(settings: hf.HfConfig) -> dict[str, hf.HfConfig | None]:
    return {"rope_scaling": None, "rope_parameters": settings}


tensors = gemma2.tensors
