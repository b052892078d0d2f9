"""What an architecture is, as plain values, and how a family's config.json is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_jax.errors import UserError

HfConfig = Mapping[str, Any]  # a Hugging Face config.json
# Hugging Face's names of an activation -> what it is here; "gelu_tanh" is the approximation.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings.

    Attributes:
      dims: how many leading dimensions of a head are rotated; even.
      theta: base of the wavelengths.
      scaling: how wavelengths are stretched for contexts longer than pretraining's: not, all by `factor`, Llama 3's
        way, the long ones only, or LongRoPE's (arXiv 2402.13753), each by a factor of its own.
      factor: by how much.
      low_freq_factor: Llama 3: wavelengths above `original_positions` / this are stretched by `factor`.
      high_freq_factor: Llama 3: wavelengths below `original_positions` / this are left alone.
      original_positions: the context length of pretraining. LongRoPE has other factors beyond it, which we have not.
      short: LongRoPE: the factors of the dims / 2 wavelengths.
      amplitude: LongRoPE: multiplies the cosine and the sine.
    """

    dims: int
    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    short: tuple[float, ...] = ()
    amplitude: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """One decoder-only transformer: all that the parameters' shapes and the forward pass depend on.

    Attributes:
      family: `model_type` in config.json.
      vocab: rows of the embedding; may exceed the tokenizer's size.
      width: D.
      layers: L.
      heads: H.
      kv_heads: K, which divides H.
      head_dim: d.
      mlp: inner width of the MLP.
      norm: root-mean-square norm, or layer norm with bias.
      eps: added to the variance in norms.
      activation: of the MLP; "gelu" is the exact one.
      gated: whether the MLP multiplies act(gate(x)) with up(x).
      rope: rotary positions; None means a learned embedding of `max_positions` positions.
      parallel: whether attention and MLP read the same residual, as in GPT-NeoX.
      qkv_bias: whether the query, key and value projections have biases.
      out_bias: whether the attention's output projection has one.
      mlp_bias: whether the MLP's projections have them.
      tied: whether the head is the embedding.
      max_positions: the context length in tokens.
      initializer_range: standard deviation of new weights.
      residual_scale: multiplies that for the two projections that write to the residual.
      head_bias: whether the head has a bias.
      pre_norm: whether attention and MLP read the normalised residual.
      post_norm: whether what they add to it is normalised.
      shared_norm: whether both read the same normalised residual, as in GPT-J.
      norm_offset: is added to the scale of a norm: 1 where the file has the scale less 1.
      qk_norm: whether queries and keys are normalised: each head by itself, or all heads together.
      windows: of each layer, how many tokens a query sees, itself included; 0 is all. Empty means all everywhere.
      window_rope: rotary positions in layers with a window, if they are others.
      score_scale: multiplies the scores of attention; None means d ** -0.5.
      score_cap: c in c * tanh(score / c); None means no cap.
      logit_cap: the same of the logits.
      embedding_scale: multiplies the embedding of a token.
      position_offset: the row of the learned embedding that the first position has.
      score: whether the head is that of a reward model: one number, not a logit for each token; it is then `tied`.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm: Literal["rms", "layer"]
    eps: float
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"]
    gated: bool
    rope: Rope | None
    parallel: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    max_positions: int
    initializer_range: float = 0.02
    residual_scale: float = 1.0
    head_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    shared_norm: bool = False
    norm_offset: float = 0.0
    qk_norm: Literal["head", "all"] | None = None
    windows: tuple[int, ...] = ()
    window_rope: Rope | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    position_offset: int = 0
    score: bool = False

    @property
    def score_std(self) -> float:
        """Of a new reward model's head, as in the first one's code (Ziegler et al. 2019, by arXiv 2403.17031)."""
        return (self.width + 1) ** -0.5


def need_setting(config: HfConfig, key: str) -> Any:
    """Returns the value of a key that has no default.

    Raises:
      UserError: it is missing.
    """
    if config.get(key) is None:
        raise UserError(f"config.json: {key} is missing; give the model's own value")
    return config[key]


def get_setting(config: HfConfig, key: str, default: Any) -> Any:
    """Returns the value of a key, the default if it is missing or null."""
    value = config.get(key)
    return default if value is None else value


def only_setting(config: HfConfig, key: str, value: Any) -> None:
    """Raises UserError unless a setting is missing or has the one value that is supported."""
    if get_setting(config, key, value) != value:
        raise UserError(f"config.json: {key} = {config[key]!r} is not supported, only {value!r} is")


def activation(config: HfConfig, key: str, default: str) -> Any:
    """Returns our name of an activation.

    Raises:
      UserError: it is not one of `ACTIVATIONS`.
    """
    name = get_setting(config, key, default)
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: {key} = {name!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_dim(config: HfConfig, width: int, heads: int) -> int:
    """Returns the explicit `head_dim`, or D / H.

    Raises:
      UserError: H does not divide D.
    """
    if config.get("head_dim") is None and width % heads:
        raise UserError(f"config.json: the width {width} is not a multiple of the {heads} heads; set head_dim")
    return get_setting(config, "head_dim", width // heads)


def kv_heads(config: HfConfig, heads: int) -> int:
    """Returns the number of key-value heads, H if it is not given.

    Raises:
      UserError: it does not divide H.
    """
    number = get_setting(config, "num_key_value_heads", heads)
    if heads % number:
        raise UserError(f"config.json: num_key_value_heads = {number} does not divide the {heads} query heads")
    return number


def rope_settings(config: HfConfig) -> dict[str, Any]:
    """Returns what a config.json says of rotary positions, in transformers 5's form (`rope_parameters`) or the older.

    Raises:
      UserError: it says both, and they differ.
    """
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            why = f"rope_scaling has {key} = {old[key]!r}, rope_parameters {new[key]!r}; keep one of the two"
            raise UserError(f"config.json: {why}")
    return {**old, **new}


def rope(config: HfConfig, dim: int, *, theta: str = "rope_theta", part: tuple[str, float] | None = None) -> Rope:
    """Returns the rotary embedding of a config.json.

    Args:
      config: the config.
      dim: head dimension.
      theta: the older form's key of the base.
      part: the older form's key of the rotated fraction of a head, and its default; None where all of it is rotated.

    Raises:
      UserError: a kind of scaling other than none, "linear" and "llama3"; a fraction where there can be none.
    """
    new = rope_settings(config)
    if part is None:
        only_setting(config, "partial_rotary_factor", 1.0)
        only_setting(new, "partial_rotary_factor", 1.0)
        part = ("", 1.0)
    fraction = get_setting(config, "partial_rotary_factor", get_setting(config, *part))
    return rope_of(
        new, dim, get_setting(config, theta, 10000.0), fraction, config.get("original_max_position_embeddings")
    )


def rope_of(
    new: HfConfig, dim: int, theta: float = 10000.0, fraction: float = 1.0, original: int | None = None
) -> Rope:
    """Returns the rotary embedding that `rope_parameters` describe; the other arguments are its defaults.

    Raises:
      UserError: a kind of scaling other than none, "linear" and "llama3".
    """
    kind = get_setting(new, "rope_type", get_setting(new, "type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"config.json: rope_type = {kind!r} is not supported; known are default, linear, llama3")
    theta = float(get_setting(new, "rope_theta", theta))
    dims = int(dim * get_setting(new, "partial_rotary_factor", fraction))
    if dims < 2 or dims % 2:
        raise UserError(f"config.json: {dims} rotary dimensions a head; it must be an even number above 0")
    if kind == "default":
        return Rope(dims, theta)
    factor = float(need_setting(new, "factor"))
    if kind == "linear":
        return Rope(dims, theta, kind, factor)
    low, high = float(need_setting(new, "low_freq_factor")), float(need_setting(new, "high_freq_factor"))
    original = original or int(need_setting(new, "original_max_position_embeddings"))
    return Rope(dims, theta, kind, factor, low, high, original)


def layer_windows(config: HfConfig, layers: int, kinds: Sequence[str] | None) -> tuple[int, ...]:
    """Returns the window of each layer, from `layer_types` (or `kinds`, its default) and `sliding_window`.

    Raises:
      UserError: a kind of layer that is not supported, too many or too few of them, or no size of the window.
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
