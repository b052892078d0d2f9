"""GPT-2 (large is the paper's for film reviews), DistilGPT-2: learned positions, projections stored as ours are.

GPT-Neo, GPT-J, GPT-NeoX and OPT are defined by their differences: they use `gpt_like` too.
"""

from typing import Any

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, layer_norms, same_layout, untied_head, with_bias

CLASS = "GPT2LMHeadModel"
PREFIX = "transformer."
HEAD = "lm_head.weight"
BUFFERS = ("attn.bias", "attn.masked_bias")
READS = {"scale_attn_by_inverse_layer_idx"}
POSITIONS = ("n_positions", "max_position_embeddings")
SIZES = (("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers"))
LAYER = "transformer.h.{i}."
NORMS = {
    "transformer.ln_f.": ("final_norm",),
    LAYER + "ln_1.": ("layers", "attention_norm"),
    LAYER + "ln_2.": ("layers", "mlp_norm"),
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GPT-2 config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    hf.only_setting(config, "scale_attn_weights", True)
    hf.only_setting(config, "add_cross_attention", False)
    width, heads, layers = (hf.either_setting(config, *names) for names in SIZES)
    return gpt_like(
        config,
        "gpt2",
        width=width,
        layers=layers,
        heads=heads,
        mlp=hf.get_setting(config, "n_inner", 4 * width),
        qkv_bias=True,
        out_bias=True,
        max_positions=hf.either_setting(config, *POSITIONS, default=1024),
        residual_scale=(2 * layers) ** -0.5,
        layer_scaled=hf.get_setting(config, "scale_attn_by_inverse_layer_idx", False),
    )


def gpt_like(config: hf.HfConfig, family: str, *, width: int, heads: int, **fields: Any) -> Architecture:
    """Returns the architecture of a GPT: layer norms with biases, an MLP without gate, no grouped key-value heads.

    Args:
      config: the contents of config.json.
      family: its `model_type`.
      width: D.
      heads: H.
      **fields: other fields of `Architecture`; they replace the defaults below.

    Raises:
      UserError: a setting is missing or not supported.
    """
    values: dict[str, Any] = {
        "vocab": hf.need_setting(config, "vocab_size"),
        "kv_heads": heads,
        "head_dim": hf.head_dim({}, width, heads),
        "norm": "layer",
        "eps": hf.get_setting(config, "layer_norm_epsilon", 1e-5),
        "gated": False,
        "rope": None,
        "parallel": False,
        "mlp_bias": True,
        "tied": hf.get_setting(config, "tie_word_embeddings", True),
        "initializer_range": hf.get_setting(config, "initializer_range", 0.02),
    }
    if "activation" not in fields:
        values["activation"] = hf.activation(config, "activation_function", "gelu_new")
    return Architecture(family=family, width=width, heads=heads, **{**values, **fields})


def _fused(leaf: str, a: Architecture, *lead: int) -> Tensor:
    """Returns the entry of queries, keys and values in one tensor, side by side on its last axis."""
    parts = (TensorPart(("layers", name, leaf), take=(slice(None),) * len(lead) + (i,)) for i, name in enumerate("qkv"))
    return Tensor((*((size,) for size in lead), (3, a.heads, a.head_dim)), tuple(parts))


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    width = a.width
    out = Tensor(((a.heads, a.head_dim), (width,)), (TensorPart(("layers", "o", "kernel")),))
    return {
        "transformer.wte.weight": same_layout(("embedding",), a.vocab, width),
        "transformer.wpe.weight": same_layout(("positions",), a.max_positions, width),
        LAYER + "attn.c_attn.weight": _fused("kernel", a, width),
        LAYER + "attn.c_attn.bias": _fused("bias", a),
        **with_bias(LAYER + "attn.c_proj", out, width),
        **with_bias(LAYER + "mlp.c_fc", same_layout(("layers", "up", "kernel"), width, a.mlp), a.mlp),
        **with_bias(LAYER + "mlp.c_proj", same_layout(("layers", "down", "kernel"), a.mlp, width), width),
        **layer_norms(NORMS, width),
        **untied_head(HEAD, a),
    }
