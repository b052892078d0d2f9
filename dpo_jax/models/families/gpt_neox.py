"""GPT-NeoX, Pythia (2.8B is the paper's for dialogue): attention and MLP side by side, a rotated part of each head."""

from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, HfConfig
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, linear, plain

CLASS = "GPTNeoXForCausalLM"
PREFIX = "gpt_neox."
HEAD = "embed_out.weight"
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


def architecture(config: HfConfig) -> Architecture:
    """Returns what a GPT-NeoX config.json describes. Dropout is always off.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    width, heads = arch.need_setting(config, "hidden_size"), arch.need_setting(config, "num_attention_heads")
    dim = arch.head_dim({}, width, heads)
    bias = arch.get_setting(config, "attention_bias", True)
    return Architecture(
        family="gpt_neox",
        vocab=arch.need_setting(config, "vocab_size"),
        width=width,
        layers=arch.need_setting(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=dim,
        mlp=arch.need_setting(config, "intermediate_size"),
        norm="layer",
        eps=arch.get_setting(config, "layer_norm_eps", 1e-5),
        activation=arch.activation(config, "hidden_act", "gelu"),
        gated=False,
        rope=arch.rope(config, dim, theta="rotary_emb_base", part=("rotary_pct", 0.25)),
        parallel=arch.get_setting(config, "use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied=arch.get_setting(config, "tie_word_embeddings", False),
        max_positions=arch.get_setting(config, "max_position_embeddings", 2048),
        initializer_range=arch.get_setting(config, "initializer_range", 0.02),
    )


def _fused(leaf: str, a: Architecture, *inputs: int) -> Tensor:
    """Queries, keys and values in one tensor, interleaved by head."""
    parts = (TensorPart(("layers", name, leaf), len(inputs), (slice(None), i)) for i, name in enumerate("qkv"))
    return Tensor(((a.heads, 3, a.head_dim), *((size,) for size in inputs)), tuple(parts))


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer."""
    width, layer = a.width, "gpt_neox.layers.{i}."
    out, up, down = ("layers", "o", "kernel"), ("layers", "up", "kernel"), ("layers", "down", "kernel")
    table = {
        "gpt_neox.embed_in.weight": plain(("embedding",), a.vocab, width),
        layer + "attention.query_key_value.weight": _fused("kernel", a, width),
        layer + "attention.dense.weight": linear(out, (width,), (a.heads, a.head_dim)),
        layer + "mlp.dense_h_to_4h.weight": linear(up, (a.mlp,), (width,)),
        layer + "mlp.dense_h_to_4h.bias": plain(("layers", "up", "bias"), a.mlp),
        layer + "mlp.dense_4h_to_h.weight": linear(down, (width,), (a.mlp,)),
        layer + "mlp.dense_4h_to_h.bias": plain(("layers", "down", "bias"), width),
    }
    if a.qkv_bias:
        table[layer + "attention.query_key_value.bias"] = _fused("bias", a)
        table[layer + "attention.dense.bias"] = plain(("layers", "o", "bias"), width)
    norms = {"gpt_neox.final_layer_norm.": ("final_norm",), layer + "input_layernorm.": ("layers", "attention_norm")}
    for where, path in {**norms, layer + "post_attention_layernorm.": ("layers", "mlp_norm")}.items():
        table[where + "weight"] = plain((*path, "scale"), width)
        table[where + "bias"] = plain((*path, "bias"), width)
    if not a.tied:
        table[HEAD] = plain(("head",), a.vocab, width)
    return table
