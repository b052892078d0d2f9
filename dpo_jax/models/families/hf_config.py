"""Readers of config.json that families share: settings, activations, heads, rotary positions and windows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")  # kinds of rotary scaling that every family can have
PROPORTIONAL = "proportional"  # a part of the pairs of dimensions of a whole head are rotated, at that head's angles


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


def either_setting(config: HfConfig, first: str, second: str, default: Any = None) -> Any:
    """Returns the value of a key that has two names; the default if both are missing or null.

    Raises:
      UserError: both have values, which differ; or neither has one, and there is no default.
    """
    found = [config[key] for key in (first, second) if config.get(key) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise UserError(f"config.json: {first} = {found[0]}, but {second} = {found[1]}; keep one of them")
    return found[0] if found else need_setting({**config, first: default}, first)


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

    Beside the older form, `rope_theta` and `partial_rotary_factor` are keys of config.json itself.

    Raises:
      UserError: both are given and differ, or one is no object of plain values.
    """
    old, new = (_plain_settings(config, key) for key in ("rope_scaling", "rope_parameters"))
    every = sorted(old.keys() | new.keys(), key=lambda key: (-(key in old) - (key in new), key))
    for key in every if old and new else ():
        first, second = (found.get(key, config.get(key)) for found in (old, new))
        if first != second:
            why = f"rope_scaling has {key} = {first!r}, rope_parameters {second!r}; keep one of the two"
            raise UserError(f"config.json: {why}")
    return {**old, **new}


def rope_settings_of_kinds(config: HfConfig) -> tuple[HfConfig, HfConfig]:
    """Returns the rotary settings of layers without, and with a window.

    `rope_parameters`, the newer form, has an object for each. `rope_scaling`, the older one, is for the former.

    Raises:
      UserError: `rope_parameters` has anything else, or contradicts `rope_scaling`.
    """
    new, kinds = get_setting(config, "rope_parameters", {}), ("full_attention", "sliding_attention")
    if not isinstance(new, Mapping) or new.keys() - set(kinds):
        raise UserError(f"config.json: rope_parameters must have {' and '.join(kinds)} only, got {new!r}")
    full, sliding = (new.get(kind) for kind in kinds)
    return rope_settings({**config, "rope_parameters": full}), rope_settings({"rope_parameters": sliding})


def _plain_settings(config: HfConfig, key: str) -> dict[str, Any]:
    """Returns an object of config.json, {} if it is missing; the old key `type` is renamed to `rope_type`."""
    found = get_setting(config, key, {})
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise UserError(f"config.json: {key} must be an object of plain values, got {found!r}")
    kind = found.get("rope_type", found.get("type"))
    rest = {name: value for name, value in found.items() if name != "type"}
    return rest if kind is None else {**rest, "rope_type": kind}


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
      UserError: a kind of scaling that is not in `SCALINGS`; a fraction where `part` is None.
    """
    settings = rope_settings(config)
    if part is None:
        only_setting(config, "partial_rotary_factor", 1.0)
        only_setting(settings, "partial_rotary_factor", 1.0)
        part = ("", 1.0)
    original = get_setting(config, "original_max_position_embeddings", settings.get("original_max_position_embeddings"))
    if settings.get("rope_type") == "yarn":  # as in transformers
        original = original or need_setting(config, "max_position_embeddings")
    if settings.get("rope_type") == "dynamic":
        original = get_setting(config, "max_position_embeddings", 2048)
    given = {**settings, "original_max_position_embeddings": original}
    return rope_from_settings(given, dim, get_setting(config, theta, 10000.0), get_setting(config, *part))


def rope_from_settings(settings: HfConfig, dim: int, theta: float = 10000.0, fraction: float = 1.0) -> Rope:
    """Returns the rotary embedding of `rope_parameters`.

    Args:
      settings: the object `rope_parameters`.
      dim: head dimension.
      theta: base, if `rope_theta` is missing.
      fraction: fraction of a head that is rotated, if `partial_rotary_factor` is missing.

    Raises:
      UserError: a kind of scaling that is not in `SCALINGS`.
    """
    kind = get_setting(settings, "rope_type", "default")
    if kind not in SCALINGS:
        raise UserError(f"config.json: rope_type = {kind!r} is not supported; known are {', '.join(SCALINGS)}")
    theta = float(get_setting(settings, "rope_theta", theta))
    dims = int(dim * get_setting(settings, "partial_rotary_factor", fraction))
    if dims < 2 or dims % 2:
        raise UserError(f"config.json: {dims} rotary dimensions a head; it must be an even number above 0")
    if kind == "default":
        return Rope(dims, theta)
    factor = float(need_setting(settings, "factor"))
    if kind == "linear":
        return Rope(dims, theta, kind, factor)
    original = int(need_setting(settings, "original_max_position_embeddings"))
    if kind == "dynamic":
        return Rope(dims, theta, kind, original_positions=original)
    if kind == "yarn":
        return _yarn(Rope(dims, theta, kind, factor, original_positions=original), settings)
    low, high = (float(need_setting(settings, key)) for key in ("low_freq_factor", "high_freq_factor"))
    return Rope(dims, theta, kind, factor, low, high, original)


def proportional_rope(settings: HfConfig, dim: int) -> Rope:
    """Returns the rotary embedding of `rope_parameters` of the type `PROPORTIONAL`.

    Raises:
      UserError: no pair is rotated, or more than there are.
    """
    part, theta = (get_setting(settings, *key) for key in (("partial_rotary_factor", 1.0), ("rope_theta", 10000.0)))
    turned = int(part * dim // 2)
    if dim % 2 or not 1 <= turned <= dim // 2:
        raise UserError(f"config.json: partial_rotary_factor = {part}: {turned} of {dim // 2} pairs would be rotated")
    return Rope(dim, float(theta), factor=float(get_setting(settings, "factor", 1.0)), turned=turned)


def _yarn(rope: Rope, settings: HfConfig) -> Rope:
    """Returns YaRN's rotary embedding (arXiv 2309.00071) with its stretches and its amplitude, as in transformers.

    Wavelengths that fit into the original context more than `beta_fast` times are kept, those that fit less than
    `beta_slow` times are stretched by `factor`, and those between by an interpolation over the dimension.
    """
    pairs, original, factor = np.arange(rope.dims // 2), rope.original_positions, rope.factor
    turns = [float(get_setting(settings, *key) or key[1]) for key in (("beta_fast", 32), ("beta_slow", 1))]
    if rope.theta <= 1 or min(turns) <= 0 or factor <= 0 or original < 1:
        raise UserError("config.json: yarn: rope_theta must be above 1, beta_fast, beta_slow and factor above 0")
    low, high = (rope.dims * math.log(original / (turn * 2 * math.pi)) / (2 * math.log(rope.theta)) for turn in turns)
    if get_setting(settings, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    stretched = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    kept = 1 - stretched
    # `frequencies` divides by `factor` too
    stretches = 1 / (stretched / factor + kept) / factor
    scales = [get_setting(settings, key, 0) for key in ("mscale", "mscale_all_dim")]
    first, second = scales if all(scales) else (1, 0)
    grown = 0.1 * math.log(factor) if factor > 1 else 0.0
    amplitude = float(get_setting(settings, "attention_factor", (first * grown + 1) / (second * grown + 1)))
    return dataclasses.replace(rope, short=tuple(stretches.tolist()), amplitude=amplitude)


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
