"""GPT-2 (large is the paper's for film reviews), DistilGPT-2: learned positions, projections stored as ours are."""

from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, HfConfig
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, plain

CLASS = "GPT2LMHeadModel"
PREFIX = "transformer."
HEAD = "lm_head.weight"
BUFFERS = ("attn.bias", "attn.masked_bias")


def architecture(config: HfConfig) -> Architecture:
    """Returns what a GPT-2 config.json describes. Dropout is always off.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    arch.only_setting(config, "scale_attn_weights", True)
    arch.only_setting(config, "scale_attn_by_inverse_layer_idx", False)
    arch.only_setting(config, "add_cross_attention", False)
    width, heads, layers = (arch.need_setting(config, key) for key in ("n_embd", "n_head", "n_layer"))
    return Architecture(
        family="gpt2",
        vocab=arch.need_setting(config, "vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=arch.head_dim({}, width, heads),
        mlp=arch.get_setting(config, "n_inner", 4 * width),
        norm="layer",
        eps=arch.get_setting(config, "layer_norm_epsilon", 1e-5),
        activation=arch.activation(config, "activation_function", "gelu_new"),
        gated=False,
        rope=None,
        parallel=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=arch.get_setting(config, "tie_word_embeddings", True),
        max_positions=arch.get_setting(config, "n_positions", 1024),
        initializer_range=arch.get_setting(config, "initializer_range", 0.02),
        residual_scale=(2 * layers) ** -0.5,
    )


def _fused(leaf: str, a: Architecture, *lead: int) -> Tensor:
    """Queries, keys and values in one tensor, side by side on its last axis."""
    parts = (TensorPart(("layers", name, leaf), take=(slice(None),) * len(lead) + (i,)) for i, name in enumerate("qkv"))
    return Tensor((*((size,) for size in lead), (3, a.heads, a.head_dim)), tuple(parts))


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer."""
    width, layer = a.width, "transformer.h.{i}."
    out = TensorPart(("layers", "o", "kernel"))
    table = {
        "transformer.wte.weight": plain(("embedding",), a.vocab, width),
        "transformer.wpe.weight": plain(("positions",), a.max_positions, width),
        layer + "attn.c_attn.weight": _fused("kernel", a, width),
        layer + "attn.c_attn.bias": _fused("bias", a),
        layer + "attn.c_proj.weight": Tensor(((a.heads, a.head_dim), (width,)), (out,)),
        layer + "attn.c_proj.bias": plain(("layers", "o", "bias"), width),
        layer + "mlp.c_fc.weight": plain(("layers", "up", "kernel"), width, a.mlp),
        layer + "mlp.c_fc.bias": plain(("layers", "up", "bias"), a.mlp),
        layer + "mlp.c_proj.weight": plain(("layers", "down", "kernel"), a.mlp, width),
        layer + "mlp.c_proj.bias": plain(("layers", "down", "bias"), width),
    }
    norms = {"transformer.ln_f.": ("final_norm",), layer + "ln_1.": ("layers", "attention_norm")}
    for where, path in {**norms, layer + "ln_2.": ("layers", "mlp_norm")}.items():
        table[where + "weight"] = plain((*path, "scale"), width)
        table[where + "bias"] = plain((*path, "bias"), width)
    if not a.tied:
        table[HEAD] = plain(("head",), a.vocab, width)
    return table
