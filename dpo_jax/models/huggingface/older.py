"""Keys of config.json that transformers before version 5 and tools of its time read, beside those of version 5."""

from typing import Any

from dpo_jax.models.families.hf_config import HfConfig

PARTS = ("full_attention", "sliding_attention")  # of rope_parameters in families with two rotary embeddings
NEWER = ("gemma4", "gemma4_text")  # version 4 has none of these, and version 5 would read older keys of them
KEYS = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}  # of the base and the rotated fraction, where not the usual ones


def with_older_keys(config: HfConfig) -> dict[str, Any]:
    """Returns config.json with `torch_dtype` beside `dtype`, and older rotary keys beside `rope_parameters`.

    Version 4.57 knows no `rope_parameters`: without the older keys it would take the family's default base. Keys that
    the config has already are kept.
    """
    older: dict[str, Any] = {"torch_dtype": config["dtype"]}
    if config["model_type"] in NEWER:
        return {**older, **config}
    rope = config.get("rope_parameters") or {}
    full, sliding = (rope.get(part, {}) for part in PARTS) if PARTS[0] in rope else (rope, {})
    theta, part = KEYS.get(config["model_type"], ("rope_theta", "partial_rotary_factor"))
    pairs = (full, "rope_theta", theta), (full, "partial_rotary_factor", part)
    if config["model_type"] == "gemma3_text":
        pairs += ((sliding, "rope_theta", "rope_local_base_freq"),)
    older |= {new: settings[key] for settings, key, new in pairs if settings.get(key) is not None}
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = _scaling(config, full)
    if config["model_type"] == "qwen3_moe" and config.get("num_local_experts"):
        older["num_experts"] = config["num_local_experts"]
    return {**older, **{key: value for key, value in config.items() if key not in older or value is not None}}


def _scaling(config: HfConfig, rope: HfConfig) -> dict[str, Any]:
    """Returns `rope_scaling` of the kind of scaling in `rope_parameters`."""
    if config["model_type"] == "phi3":  # allows these keys alone
        return {"type": rope["rope_type"], **{key: rope[key] for key in ("short_factor", "long_factor")}}
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
