"""Gemma 3's language model (270M, 1B): Gemma 2 with normalized queries and keys, and other angles in windows."""

from collections.abc import Mapping

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gemma2, llama
from dpo_jax.models.families import hf_config as hf

CLASS = "Gemma3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = gemma2.READS | {"rope_local_base_freq", "sliding_window_pattern"}
# Names in the folders of models that read images too (4B to 27B), of which the language model is a part.
WRAPPED = ("model.language_model.", "language_model.model.", "language_model.")
ELSEWHERE = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# What the config.json of such a folder leaves out.
WRAPPED_DEFAULTS = {"vocab_size": 262208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8}
WRAPPED_DEFAULTS |= {"intermediate_size": 9216, "tie_word_embeddings": True}
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
    dim, (full, sliding) = config["head_dim"], _rope_of_kinds(config)
    return gemma2.gemma2_like(
        config,
        "gemma3_text",
        every=hf.get_setting(config, "sliding_window_pattern", 6),
        qk_norm="head",
        rope=hf.rope_from_settings(full, dim, hf.get_setting(config, "rope_theta", 1e6)),
        window_rope=hf.rope_from_settings(sliding, dim, hf.get_setting(config, "rope_local_base_freq", 1e4)),
    )


def _rope_of_kinds(config: hf.HfConfig) -> tuple[hf.HfConfig, hf.HfConfig]:
    """Returns the rotary settings of layers without, and with a window.

    `rope_parameters`, the newer form, has an object for each. `rope_scaling`, the older one, is for the former.

    Raises:
      UserError: `rope_parameters` has anything else, or contradicts `rope_scaling`.
    """
    new, kinds = hf.get_setting(config, "rope_parameters", {}), ("full_attention", "sliding_attention")
    if not isinstance(new, Mapping) or new.keys() - set(kinds):
        raise UserError(f"config.json: rope_parameters must have {' and '.join(kinds)} only, got {new!r}")
    full, sliding = (new.get(kind) for kind in kinds)
    return hf.rope_settings({**config, "rope_parameters": full}), hf.rope_settings({"rope_parameters": sliding})


tensors = gemma2.tensors
