"""GPT-NeoX, Pythia (2.8B is the paper's for dialogue): attention and MLP side by side, a rotated part of each head."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture, Rope
from dpo_jax.models.families import gpt2
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import (
    Tensor,
    TensorPart,
    layer_norms,
    linear,
    same_layout,
    untied_head,
    with_bias,
)

CLASS = "GPTNeoXForCausalLM"
PREFIX = "gpt_neox."
HEAD = "embed_out.weight"
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
READS = {"rotary_emb_base", "rotary_pct", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"}
READS |= {"attention_bias", "use_parallel_residual"}
LAYER = "gpt_neox.layers.{i}."
NORMS = {
    "gpt_neox.final_layer_norm.": ("final_norm",),
    LAYER + "input_layernorm.": ("layers", "attention_norm"),
    LAYER + "post_attention_layernorm.": ("layers", "mlp_norm"),
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GPT-NeoX config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    dim = hf.head_dim({}, width, heads)
    bias = hf.get_setting(config, "attention_bias", True)
    return gpt2.gpt_like(
        config,
        "gpt_neox",
        width=width,
        layers=hf.need_setting(config, "num_hidden_layers"),
        heads=heads,
        mlp=hf.need_setting(config, "intermediate_size"),
        eps=hf.get_setting(config, "layer_norm_eps", 1e-5),
        activation=hf.activation(config, "hidden_act", "gelu"),
        rope=_rope(config, dim),
        parallel=hf.get_setting(config, "use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        tied=hf.get_setting(config, "tie_word_embeddings", False),
        max_positions=hf.get_setting(config, "max_position_embeddings", 2048),
    )


def _rope(config: hf.HfConfig, dim: int) -> Rope:
    """Returns the rotary embedding, by `rotary_pct` and `rotary_emb_base`.

    Raises:
      UserError: a setting is not supported, or another family's name of the two contradicts them. transformers ignores
        these names, other programs may not.
    """
    rope = hf.rope_from_config(config, dim, theta="rotary_emb_base", part=("rotary_pct", 0.25))
    fraction = hf.rope_settings(config).get("partial_rotary_factor", hf.get_setting(config, "rotary_pct", 0.25))
    for key, own, value in (
        ("partial_rotary_factor", "rotary_pct", fraction),
        ("rope_theta", "rotary_emb_base", rope.theta),
    ):
        if hf.get_setting(config, key, value) != value:
            raise UserError(
                f"config.json: {key} = {config[key]!r}, but {own} is {value}; remove {key}, or make it equal"
            )
    return rope


def fused_by_head(leaf: str, a: Architecture, *inputs: int) -> Tensor:
    """Returns the entry of queries, keys and values in one tensor, interleaved by head."""
    parts = (TensorPart(("layers", name, leaf), len(inputs), (slice(None), i)) for i, name in enumerate("qkv"))
    return Tensor(((a.heads, 3, a.head_dim), *((size,) for size in inputs)), tuple(parts))


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    width = a.width
    table = {
        "gpt_neox.embed_in.weight": same_layout(("embedding",), a.vocab, width),
        LAYER + "attention.query_key_value.weight": fused_by_head("kernel", a, width),
        LAYER + "attention.dense.weight": linear(("layers", "o", "kernel"), (width,), (a.heads, a.head_dim)),
        **with_bias(LAYER + "mlp.dense_h_to_4h", linear(("layers", "up", "kernel"), (a.mlp,), (width,)), a.mlp),
        **with_bias(LAYER + "mlp.dense_4h_to_h", linear(("layers", "down", "kernel"), (width,), (a.mlp,)), width),
    }
    if a.qkv_bias:
        table[LAYER + "attention.query_key_value.bias"] = fused_by_head("bias", a)
        table[LAYER + "attention.dense.bias"] = same_layout(("layers", "o", "bias"), width)
    return {**table, **layer_norms(NORMS, width), **untied_head(HEAD, a)}
