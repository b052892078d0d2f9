"""OPT (125M to 66B, all but 350M): learned positions, the first of which has row 2 of their embedding."""

from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, HfConfig
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, linear, plain

CLASS = "OPTForCausalLM"
PREFIX = "model."
HEAD = "lm_head.weight"
BUFFERS = ()
OFFSET = 2


def architecture(config: HfConfig) -> Architecture:
    """Returns what an OPT config.json describes. Dropout is always off.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    width, heads = arch.need_setting(config, "hidden_size"), arch.need_setting(config, "num_attention_heads")
    for key, value in {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": width,
    }.items():
        arch.only_setting(config, key, value)
    bias = arch.get_setting(config, "enable_bias", True)
    return Architecture(
        family="opt",
        vocab=arch.need_setting(config, "vocab_size"),
        width=width,
        layers=arch.need_setting(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=arch.head_dim({}, width, heads),
        mlp=arch.need_setting(config, "ffn_dim"),
        norm="layer",
        eps=1e-5,
        activation=arch.activation(config, "activation_function", "relu"),
        gated=False,
        rope=None,
        parallel=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=arch.get_setting(config, "tie_word_embeddings", True),
        max_positions=arch.get_setting(config, "max_position_embeddings", 2048),
        initializer_range=arch.get_setting(config, "init_std", 0.02),
        position_offset=OFFSET,
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer."""
    heads, width, layer = (a.heads, a.head_dim), a.width, "model.decoder.layers.{i}."
    table = {
        "model.decoder.embed_tokens.weight": plain(("embedding",), a.vocab, width),
        "model.decoder.embed_positions.weight": plain(("positions",), a.max_positions + OFFSET, width),
        layer + "self_attn.out_proj.weight": linear(("layers", "o", "kernel"), (width,), heads),
        layer + "fc1.weight": linear(("layers", "up", "kernel"), (a.mlp,), (width,)),
        layer + "fc2.weight": linear(("layers", "down", "kernel"), (width,), (a.mlp,)),
    }
    for name in "qkv":
        table[f"{layer}self_attn.{name}_proj.weight"] = linear(("layers", name, "kernel"), heads, (width,))
    if a.qkv_bias:
        for name in "qkv":
            table[f"{layer}self_attn.{name}_proj.bias"] = Tensor((heads,), (TensorPart(("layers", name, "bias")),))
        for their, ours, size in (("self_attn.out_proj", "o", width), ("fc1", "up", a.mlp), ("fc2", "down", width)):
            table[f"{layer}{their}.bias"] = plain(("layers", ours, "bias"), size)
    norms = {"model.decoder.final_layer_norm.": ("final_norm",), layer + "final_layer_norm.": ("layers", "mlp_norm")}
    for where, path in {**norms, layer + "self_attn_layer_norm.": ("layers", "attention_norm")}.items():
        table[where + "weight"] = plain((*path, "scale"), width)
        table[where + "bias"] = plain((*path, "bias"), width)
    if not a.tied:
        table[HEAD] = plain(("head",), a.vocab, width)
    return table
