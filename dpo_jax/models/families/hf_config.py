"""Readers of config.json that families share: settings, activations, heads, rotary positions and windows."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Rope

HfConfig = Mapping[str, Any]  # a Hugging Face config.json
# Hugging Face's name of an activation -> ours. "gelu" is exact, "gelu_tanh" its tanh approximation.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def need_setting(config: HfConfig, key: str) -> Any:
    """Returns the value of a required key.

    Raises:
      UserError: the key is missing.
    """
    if config.get(key) is None:
        raise UserError(f"config.json: {key} is missing; give the model's own value")
    return config[key]


def get_setting(config: HfConfig, key: str, default: Any) -> Any:
    """Returns the value of a key, or the default if the key is missing or null."""
    value = config.get(key)
    return default if value is None else value


def only_setting(config: HfConfig, key: str, value: Any) -> None:
    """Raises UserError unless a key is missing or has its only supported value."""
    if get_setting(config, key, value) != value:
        raise UserError(f"config.json: {key} = {config[key]!r} is not supported, only {value!r} is")


def activation(config: HfConfig, key: str, default: str) -> Any:
    """Returns our name of an activation.

    Raises:
      UserError: the activation is not in `ACTIVATIONS`.
    """
    name = get_setting(config, key, default)
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: {key} = {name!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_dim(config: HfConfig, width: int, heads: int) -> int:
    """Returns `head_dim` if it is set, else D / H.

    Raises:
      UserError: H does not divide D.
    """
    if config.get("head_dim") is None and width % heads:
        raise UserError(f"config.json: the width {width} is not a multiple of the {heads} heads; set head_dim")
    return get_setting(config, "head_dim", width // heads)


def kv_heads(config: HfConfig, heads: int) -> int:
    """Returns the number of key-value heads, by default H.

    Raises:
      UserError: the number does not divide H.
    """
    count = get_setting(config, "num_key_value_heads", heads)
    if heads % count:
        raise UserError(f"config.json: num_key_value_heads = {count} does not divide the {heads} query heads")
    return count


def rope_settings(config: HfConfig) -> dict[str, Any]:
    """Returns the rotary settings of a config.json: `rope_parameters` (transformers 5) or `rope_scaling` (older).

    Raises:
      UserError: both are given and contradict each other.
    """
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            why = f"rope_scaling has {key} = {old[key]!r}, rope_parameters {new[key]!r}; keep one of the two"
            raise UserError(f"config.json: {why}")
    return {**old, **new}


def rope_from_config(
    config: HfConfig, dim: int, *, theta: str = "rope_theta", part: tuple[str, float] | None = None
) -> Rope:
    """Returns the rotary embedding of a config.json.

    Args:
      config: the contents of the file.
      dim: head dimension.
      theta: key of the base in the older form.
      part: key in the older form, and default, of the fraction of a head that is rotated; None if a head is always
        rotated completely.

    Raises:
      UserError: a kind of scaling other than none, "linear" and "llama3"; a fraction where `part` is None.
    """
    settings = rope_settings(config)
    if part is None:
        only_setting(config, "partial_rotary_factor", 1.0)
        only_setting(settings, "partial_rotary_factor", 1.0)
        part = ("", 1.0)
    fraction = get_setting(config, "partial_rotary_factor", get_setting(config, *part))
    original = config.get("original_max_position_embeddings")
    return rope_from_settings(settings, dim, get_setting(config, theta, 10000.0), fraction, original)


def rope_from_settings(
    settings: HfConfig, dim: int, theta: float = 10000.0, fraction: float = 1.0, original: int | None = None
) -> Rope:
    """Returns the rotary embedding of `rope_parameters`.

    Args:
      settings: the object `rope_parameters`.
      dim: head dimension.
      theta: base, if `rope_theta` is missing.
      fraction: fraction of a head that is rotated, if `partial_rotary_factor` is missing.
      original: context length of pretraining, in place of `original_max_position_embeddings`.

    Raises:
      UserError: a kind of scaling other than none, "linear" and "llama3".
    """
    kind = get_setting(settings, "rope_type", get_setting(settings, "type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"config.json: rope_type = {kind!r} is not supported; known are default, linear, llama3")
    theta = float(get_setting(settings, "rope_theta", theta))
    dims = int(dim * get_setting(settings, "partial_rotary_factor", fraction))
    if dims < 2 or dims % 2:
        raise UserError(f"config.json: {dims} rotary dimensions a head; it must be an even number above 0")
    if kind == "default":
        return Rope(dims, theta)
    factor = float(need_setting(settings, "factor"))
    if kind == "linear":
        return Rope(dims, theta, kind, factor)
    low, high = (float(need_setting(settings, key)) for key in ("low_freq_factor", "high_freq_factor"))
    original = original or int(need_setting(settings, "original_max_position_embeddings"))
    return Rope(dims, theta, kind, factor, low, high, original)


def layer_windows(config: HfConfig, layers: int, kinds: Sequence[str] | None) -> tuple[int, ...]:
    """Returns the window of each layer, from `layer_types` and `sliding_window`; () if no layer has one.

    Args:
      config: the contents of config.json.
      layers: L.
      kinds: `layer_types` if the file has none; None for full attention everywhere.

    Raises:
      UserError: a kind of layer is not supported, there are not L of them, or the window's size is missing.
    """
    kinds = [*(get_setting(config, "layer_types", kinds) or ["full_attention"] * layers)]
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            known = "full_attention, sliding_attention"
            raise UserError(f"config.json: layer_types has {kind!r}, which is not supported; known are {known}")
    if len(kinds) != layers:
        raise UserError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    if "sliding_attention" not in kinds:
        return ()
    size = need_setting(config, "sliding_window")
    if size < 1:
        raise UserError(f"config.json: sliding_window = {size}: it must be at least 1")
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
