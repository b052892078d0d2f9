"""The shapes and options of a decoder, as plain values."""

from dataclasses import dataclass
from typing import Literal

GLOBAL = ("global", "global_reader")  # kinds of layers whose keys and values are those of `Architecture.global_heads`
OWNERS = {"reader": "attention", "global_reader": "global"}  # readers of keys and values -> kind of the layer they read


@dataclass(frozen=True)
class Mixture:
    """The MLP of a layer as many small ones, the experts, of which each token uses a few.

    Attributes:
      experts: E.
      chosen: k, the experts of a token, those with the largest router probabilities; at most E.
      renormalized: the weights of the chosen are their probabilities divided by the sum of these, not as they are.
      biased: the router and the projections of the experts have biases.
      shared: inner width of an MLP that every token uses beside them; None for none.
      gated_shared: that MLP's output is multiplied by the sigmoid of a projection.
      beside: that MLP and the experts have norms of their own, before the experts and after both; experts and router
        read the residual. The router normalizes it, and multiplies the weights by one number an expert (Gemma 4).
      sigmoid: probabilities are sigmoids, each of its own logit. Experts are chosen by the probability plus a
        correction, one number an expert, which is not trained and no part of the weights (arXiv 2408.15664).
      groups: G, which divides E, of as many adjacent experts; `sigmoid` only.
      chosen_groups: a token's experts are of so many groups, those whose two best experts have the largest sum.
      factor: multiplies the weights.
      dense: inner width of the MLP of layers of the kind "dense"; None without such layers.
    """

    experts: int
    chosen: int
    renormalized: bool
    biased: bool = False
    shared: int | None = None
    gated_shared: bool = True
    beside: bool = False
    sigmoid: bool = False
    groups: int = 1
    chosen_groups: int = 1
    factor: float = 1.0
    dense: int | None = None


@dataclass(frozen=True)
class Delta:
    """Linear attention with the gated delta rule (arXiv 2412.06464).

    Attributes:
      key_heads: heads of queries and keys; they divide `value_heads`.
      value_heads: H, heads of values.
      key_dim: d, of a query and a key.
      value_dim: e, of a value.
      taps: W, the tokens that the short convolution mixes: a token and those before it.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def key_channels(self) -> int:
        """Outputs of the projection of queries, and of that of keys."""
        return self.key_heads * self.key_dim

    @property
    def value_channels(self) -> int:
        """Outputs of the projection of values, and of that of the gate."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads from one short vector of a token.

    The first `Rope.dims` of a head are rotated; the keys of these dimensions are those of all heads.

    Attributes:
      queries: length of the vector that queries are made from; None where they are made from the residual.
      keys: length of the vector that keys and values are made from.
      values: e, dimension of a value.
    """

    queries: int | None
    keys: int
    values: int


@dataclass(frozen=True)
class HeadSizes:
    """Keys and values of attention.

    Attributes:
      kv_heads: K.
      head_dim: d, of a query, a key and a value.
      keys_as_values: values are the projection of the keys, before their norm and their rotation.
    """

    kv_heads: int
    head_dim: int
    keys_as_values: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings.

    Attributes:
      dims: number of leading dimensions of a head that are rotated; even.
      theta: base of the wavelengths.
      scaling: how wavelengths are stretched for contexts longer than pretraining's. "default": not at all; "linear":
        all by `factor`; "dynamic": not at all up to `original_positions`, and by the length of a longer text, which is
        not supported; "llama3": only the long ones by `factor`; "longrope" (arXiv 2402.13753) and "yarn" (arXiv
        2309.00071): each by its own entry of `short`, in YaRN times `factor`.
      factor: stretch of wavelengths.
      low_freq_factor: Llama 3: wavelengths above `original_positions` / low_freq_factor are stretched by `factor`.
      high_freq_factor: Llama 3: wavelengths below `original_positions` / high_freq_factor are kept.
      original_positions: context length of pretraining, in tokens. LongRoPE uses other factors beyond it, which are
        not supported.
      short: LongRoPE, YaRN: the stretch of each of the dims / 2 wavelengths.
      amplitude: LongRoPE, YaRN: multiplies the cosine and the sine.
      growth: g; queries at position p are multiplied by 1 + g * log(1 + floor(p / original_positions)).
      turned: how many of the dims / 2 pairs of dimensions are rotated, the first ones; None for all.
    """

    dims: int
    theta: float = 10000.0
    scaling: Literal["default", "linear", "dynamic", "llama3", "longrope", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    short: tuple[float, ...] = ()
    amplitude: float = 1.0
    growth: float = 0.0
    turned: int | None = None

    @property
    def end(self) -> int | None:
        """The number of positions beyond which other angles apply, which are not supported; None if there is none."""
        return self.original_positions if self.scaling in ("dynamic", "longrope") else None


@dataclass(frozen=True)
class Architecture:
    """One decoder-only transformer: everything that parameter shapes and the forward pass depend on.

    Attributes:
      family: `model_type` in config.json.
      vocab: V, rows of the embedding; may exceed the tokenizer's size.
      width: D.
      layers: L.
      heads: H.
      kv_heads: K, which divides H.
      head_dim: d, of a query and a key.
      mlp: inner width of the MLP.
      norm: "rms" for root-mean-square norm, "layer" for layer norm.
      eps: added to the variance in norms.
      activation: activation of the MLP; "gelu" is the exact one, "clamped" that of GPT-OSS (`layers.activate`).
      gated: the MLP computes act(gate(x)) * up(x) instead of act(up(x)).
      rope: rotary positions; None for a learned embedding of `max_positions` positions, or for `alibi`.
      parallel: attention and MLP read the same residual, as in GPT-NeoX.
      qkv_bias: the query, key and value projections have biases; of latent attention those to the short vectors.
      out_bias: the output projection of attention has a bias.
      mlp_bias: the projections of the MLP have biases.
      tied: the head is the embedding.
      max_positions: context length in tokens.
      initializer_range: standard deviation of new weights.
      residual_scale: multiplies `initializer_range` for the two projections that write to the residual.
      head_bias: the head has a bias.
      pre_norm: attention and MLP read the normalized residual.
      post_norm: the outputs of attention and MLP are normalized before they are added to the residual.
      shared_norm: attention and MLP read the same normalized residual, as in GPT-J.
      norm_bias: layer norms have a bias.
      norm_offset: added to the scale of a norm; 1 for families that store the scale minus 1.
      qk_norm: normalization of queries and keys: "head" by head, or "all" heads together; None for no normalization.
      windows: how many tokens a query of each layer attends to, itself included; 0 for all. Empty for all layers 0.
      window_rope: rotary positions of layers with a window, if they differ from `rope`.
      nope: which layers have no rotary positions, one entry per layer; empty for none.
      score_scale: multiplies attention scores; None for d ** -0.5.
      alibi: scores fall with the distance of a key, by a slope for each head (`models.alibi`): "added" to the scaled
        scores, or "scaled" with them and rounded to bfloat16, as in Falcon; None for neither. `kv_heads` is then H.
      layer_scaled: the scores of layer i, counted from 1, are divided by i.
      value_norm: values are normalized head by head, without a scale.
      sinks: every query of a head sees one more key, with a learned score and a value of 0 (arXiv 2309.17453).
      score_cap: c in c * tanh(score / c); None for no cap.
      logit_cap: the same for logits.
      logit_scale: multiplies logits, before the cap.
      embedding_scale: multiplies token embeddings.
      scale_rounded: `embedding_scale` is rounded to the compute dtype first: so Gemma was trained.
      residual_multiplier: multiplies the outputs of attention and MLP before they are added to the residual.
      embedding_norm: embeddings are normalized before the first layer.
      position_offset: row of the learned position embedding that belongs to position 0.
      gated_attention: the output of attention is multiplied by the sigmoid of a projection of its input.
      kinds: what each layer has, one entry per layer; empty for alike layers. "attention"; "delta", linear attention in
        its place; "mixture", attention and a mixture; "dense", attention and one MLP in place of the mixture;
        "global", attention with `global_heads`; "reader" and "global_reader", attention to the keys and values of the
        last layer of the kind "attention" or "global" before it, and an MLP of the inner width `reader_mlp`.
      global_heads: of layers of the kinds "global" and "global_reader", whose rotary positions are `rope`; those of
        the others are `window_rope` then. None without such layers.
      reader_mlp: see `kinds`; None without readers.
      layer_embedding: P, of an embedding of each token that each layer has for itself (Gemma 3n); None for none.
      layer_constant: the residual after a layer is multiplied by a number of that layer, which is not trained.
      delta: layers of the kind "delta"; None without one.
      latent: attention is latent attention; None for queries, keys and values that are projections of its input.
      mixture: experts of inner width `mlp` in place of one MLP; None for a dense model.
      score: the head is that of a reward model: one number instead of V logits. `tied` is then True.
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
    activation: Literal["silu", "relu", "gelu", "gelu_tanh", "clamped"]
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
    norm_bias: bool = True
    norm_offset: float = 0.0
    qk_norm: Literal["head", "all"] | None = None
    value_norm: bool = False
    windows: tuple[int, ...] = ()
    window_rope: Rope | None = None
    nope: tuple[bool, ...] = ()
    score_scale: float | None = None
    alibi: Literal["added", "scaled"] | None = None
    layer_scaled: bool = False
    sinks: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    scale_rounded: bool = False
    residual_multiplier: float = 1.0
    embedding_norm: bool = False
    position_offset: int = 0
    gated_attention: bool = False
    kinds: tuple[Literal["attention", "delta", "mixture", "dense", "global", "reader", "global_reader"], ...] = ()
    global_heads: HeadSizes | None = None
    reader_mlp: int | None = None
    layer_embedding: int | None = None
    layer_constant: bool = False
    delta: Delta | None = None
    latent: Latent | None = None
    mixture: Mixture | None = None
    score: bool = False

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a learned embedding, beyond which there is none."""
        return self.rope is None and self.alibi is None

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer, one entry per layer."""
        return self.kinds or ("attention",) * self.layers

    def heads_in(self, kind: str) -> HeadSizes:
        """Returns the keys and values of the layers of a kind."""
        if kind in GLOBAL and self.global_heads is not None:
            return self.global_heads
        return HeadSizes(self.kv_heads, self.head_dim)

    @property
    def all_heads(self) -> tuple[HeadSizes, ...]:
        """The keys and values of all layers, each once."""
        return tuple(dict.fromkeys(self.heads_in(kind) for kind in self.layer_kinds))

    @property
    def value_dim(self) -> int:
        """Dimension of a value, and of a head's output."""
        return self.head_dim if self.latent is None else self.latent.values

    @property
    def dense(self) -> int:
        """Inner width of the MLP of a layer without a mixture."""
        return self.mlp if self.mixture is None else self.mixture.dense or 0

    @property
    def score_std(self) -> float:
        """Standard deviation of a new reward head, as in Ziegler et al. 2019 (see arXiv 2403.17031)."""
        return (self.width + 1) ** -0.5
