"""Settings of config.json that change what some model computes; one that its own family does not read is refused.

transformers ignores a key that a family does not know. A folder whose `model_type` was changed to a similar family, to
be read at all, would so be trained as another model than it is.
"""

from collections.abc import Callable, Collection
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.families.hf_config import HfConfig

# Any value but null and false changes something.
CHANGING = {"alibi", "attention_chunk_size", "attention_types", "attn_logit_softcapping", "attn_temperature_tuning"}
CHANGING |= {"apply_residual_connection_post_layernorm", "attention_bias", "clip_qkv", "dim_model_base"}
CHANGING |= {"final_logit_softcapping", "global_rope_theta", "kv_lora_rank", "local_rope_theta", "mlp_bias"}
CHANGING |= {"no_rope_layer_interval", "parallel_attn", "parallel_residual", "q_lora_rank", "qk_layernorm", "qkv_bias"}
CHANGING |= {"query_pre_attn_scalar", "rope_interleaved", "rope_local_base_freq", "rope_parameters", "rope_scaling"}
CHANGING |= {"rope_theta", "rotary_dim", "rotary_emb_base", "rotary_pct", "scale_attn_by_inverse_layer_idx"}
CHANGING |= {"sliding_window_pattern", "use_bidirectional_attention", "use_parallel_residual", "use_qk_norm"}
CHANGING |= {"use_qkv_bias", "window_size", "attention_k_eq_v", "enable_moe_block", "per_layer_config"}
# Multipliers: 1 changes nothing.
FACTORS = {"attention_multiplier", "embedding_multiplier", "lm_head_multiplier", "logit_scale", "logits_scaling"}
FACTORS |= {"partial_rotary_factor", "residual_multiplier", "scale_depth", "scale_emb"}
# 0 changes nothing.
COUNTS = {"hidden_size_per_layer_input", "num_kv_shared_layers"}
# Numbers of experts: 0 and 1 change nothing.
EXPERTS = {"n_routed_experts", "num_experts", "num_local_experts"}
NEUTRAL: dict[str, Callable[[Any, HfConfig], bool]] = {
    **dict.fromkeys(CHANGING, lambda value, config: False),
    **dict.fromkeys(FACTORS, lambda value, config: value == 1),
    **dict.fromkeys(COUNTS, lambda value, config: value == 0),
    **dict.fromkeys(EXPERTS, lambda value, config: value in (0, 1)),
    "layer_types": lambda value, config: isinstance(value, list) and set(value) <= {"full_attention"},
    "no_rope_layers": lambda value, config: isinstance(value, list) and set(value) <= {1},
    "sliding_window": lambda value, config: not config.get("use_sliding_window", True) or _covers(value, config),
}
"""Setting -> whether a value of it, neither null nor false, changes nothing in a model with that config.json."""


def refuse_foreign(config: HfConfig, reads: Collection[str]) -> None:
    """Refuses a setting of `NEUTRAL` that changes what a model computes, unless its family reads it.

    Args:
      config: the contents of config.json.
      reads: the settings of `NEUTRAL` that the family reads or refuses itself.

    Raises:
      UserError: there is such a setting.
    """
    for key in sorted(NEUTRAL.keys() & config.keys() - set(reads)):
        value = config[key]
        if value is not None and value is not False and not NEUTRAL[key](value, config):
            kind = config["model_type"]
            why = f"is no setting of a {kind}, and changes what the models compute that have it"
            raise UserError(f"config.json: {key} = {value!r} {why}; check model_type, or remove the key")


def _covers(window: Any, config: HfConfig) -> bool:
    """Returns whether a window reaches over all positions of the model."""
    longest = config.get("max_position_embeddings")
    return isinstance(window, int) and isinstance(longest, int) and window >= longest
