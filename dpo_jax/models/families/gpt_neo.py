"""GPT-Neo (125M to 2.7B): learned positions, unscaled scores, and a window in the layers that are local."""

from dpo_jax.errors import UserError
from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, HfConfig
from dpo_jax.models.families.tensor_map import Tensor, linear, plain

CLASS = "GPTNeoForCausalLM"
PREFIX = "transformer."
HEAD = "lm_head.weight"
BUFFERS = ("attn.attention.bias", "attn.attention.masked_bias")


def architecture(config: HfConfig) -> Architecture:
    """Returns what a GPT-Neo config.json describes. Dropout is always off.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    width, heads = arch.need_setting(config, "hidden_size"), arch.need_setting(config, "num_heads")
    layers = arch.need_setting(config, "num_layers")
    return Architecture(
        family="gpt_neo",
        vocab=arch.need_setting(config, "vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=arch.head_dim({}, width, heads),
        mlp=arch.get_setting(config, "intermediate_size", 4 * width),
        norm="layer",
        eps=arch.get_setting(config, "layer_norm_epsilon", 1e-5),
        activation=arch.activation(config, "activation_function", "gelu_new"),
        gated=False,
        rope=None,
        parallel=False,
        qkv_bias=False,
        out_bias=True,
        mlp_bias=True,
        tied=arch.get_setting(config, "tie_word_embeddings", True),
        max_positions=arch.get_setting(config, "max_position_embeddings", 2048),
        initializer_range=arch.get_setting(config, "initializer_range", 0.02),
        score_scale=1.0,
        windows=_windows(config, layers),
    )


def _windows(config: HfConfig, layers: int) -> tuple[int, ...]:
    """Returns the window of each layer, from `attention_types`: [[["global", "local"], 12]] is 12 times both."""
    kinds = [kind for group, count in arch.get_setting(config, "attention_types", [[["global", "local"], 12]])
             for kind in group * count]  # fmt: skip
    if len(kinds) != layers:
        raise UserError(f"config.json: attention_types names {len(kinds)} layers, num_layers is {layers}")
    named = {"global": "full_attention", "local": "sliding_attention"}
    size = arch.get_setting(config, "window_size", 256)
    return arch.layer_windows({"sliding_window": size}, layers, [str(named.get(kind, kind)) for kind in kinds])


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer."""
    heads, width, layer = (a.heads, a.head_dim), a.width, "transformer.h.{i}."
    table = {
        "transformer.wte.weight": plain(("embedding",), a.vocab, width),
        "transformer.wpe.weight": plain(("positions",), a.max_positions, width),
        layer + "attn.attention.out_proj.weight": linear(("layers", "o", "kernel"), (width,), heads),
        layer + "attn.attention.out_proj.bias": plain(("layers", "o", "bias"), width),
        layer + "mlp.c_fc.weight": linear(("layers", "up", "kernel"), (a.mlp,), (width,)),
        layer + "mlp.c_fc.bias": plain(("layers", "up", "bias"), a.mlp),
        layer + "mlp.c_proj.weight": linear(("layers", "down", "kernel"), (width,), (a.mlp,)),
        layer + "mlp.c_proj.bias": plain(("layers", "down", "bias"), width),
    }
    for name in "qkv":
        table[f"{layer}attn.attention.{name}_proj.weight"] = linear(("layers", name, "kernel"), heads, (width,))
    norms = {"transformer.ln_f.": ("final_norm",), layer + "ln_1.": ("layers", "attention_norm")}
    for where, path in {**norms, layer + "ln_2.": ("layers", "mlp_norm")}.items():
        table[where + "weight"] = plain((*path, "scale"), width)
        table[where + "bias"] = plain((*path, "bias"), width)
    if not a.tied:
        table[HEAD] = plain(("head",), a.vocab, width)
    return table
