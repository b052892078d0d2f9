"""Llama (and what shares its shape, SmolLM2 or TinyLlama for example): its config and its tensor names."""

from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, Config, Tensor, plain, reshaped, transposed

CLASS = "LlamaForCausalLM"
PREFIX = "model."
HEAD = "lm_head.weight"
BUFFERS = ("rotary_emb.inv_freq",)


def architecture(config: Config) -> Architecture:
    """Returns what a Llama config.json describes. Dropout is always off.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    width, heads = arch.need(config, "hidden_size"), arch.need(config, "num_attention_heads")
    dim = arch.head_dim(config, width, heads)
    attention_bias, mlp_bias = arch.get(config, "attention_bias", False), arch.get(config, "mlp_bias", False)
    return Architecture(
        family="llama",
        vocab=arch.need(config, "vocab_size"),
        width=width,
        layers=arch.need(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=arch.kv_heads(config, heads),
        head_dim=dim,
        mlp=arch.need(config, "intermediate_size"),
        norm="rms",
        eps=arch.get(config, "rms_norm_eps", 1e-6),
        activation=arch.activation(config, "hidden_act", "silu"),
        gated=True,
        rope=arch.rope(config, dim, theta_key="rope_theta", part_key="partial_rotary_factor", part=1.0),
        parallel=False,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied=arch.get(config, "tie_word_embeddings", False),
        max_positions=arch.get(config, "max_position_embeddings", 2048),
        initializer_range=arch.get(config, "initializer_range", 0.02),
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer."""
    width, query, key = a.width, a.heads * a.head_dim, a.kv_heads * a.head_dim
    layer = "model.layers.{i}."
    table = {
        "model.embed_tokens.weight": plain(("embedding",), a.vocab, width),
        "model.norm.weight": plain(("final_norm", "scale"), width),
        layer + "input_layernorm.weight": plain(("layers", "attention_norm", "scale"), width),
        layer + "post_attention_layernorm.weight": plain(("layers", "mlp_norm", "scale"), width),
        layer + "self_attn.o_proj.weight": transposed(
            ("layers", "o", "kernel"), (width, query), (a.heads, a.head_dim, width)
        ),
        layer + "mlp.gate_proj.weight": transposed(("layers", "gate", "kernel"), (a.mlp, width), (width, a.mlp)),
        layer + "mlp.up_proj.weight": transposed(("layers", "up", "kernel"), (a.mlp, width), (width, a.mlp)),
        layer + "mlp.down_proj.weight": transposed(("layers", "down", "kernel"), (width, a.mlp), (a.mlp, width)),
    }
    for name, size, heads in (("q", query, a.heads), ("k", key, a.kv_heads), ("v", key, a.kv_heads)):
        where, shape = f"{layer}self_attn.{name}_proj.", (heads, a.head_dim)
        table[where + "weight"] = transposed(("layers", name, "kernel"), (size, width), (width, *shape))
        if a.qkv_bias:
            table[where + "bias"] = reshaped(("layers", name, "bias"), (size,), shape)
    if a.out_bias:
        table[layer + "self_attn.o_proj.bias"] = plain(("layers", "o", "bias"), width)
    if a.mlp_bias:
        for name, size in (("gate", a.mlp), ("up", a.mlp), ("down", width)):
            table[f"{layer}mlp.{name}_proj.bias"] = plain(("layers", name, "bias"), size)
    if not a.tied:
        table[HEAD] = plain(("head",), a.vocab, width)
    return table
