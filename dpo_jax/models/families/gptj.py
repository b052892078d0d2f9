"""GPT-J (6B is the paper's for summaries): attention and MLP side by side after one norm, a head with a bias."""

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models import architecture as arch
from dpo_jax.models.architecture import Architecture, HfConfig
from dpo_jax.models.families.tensor_map import Tensor, linear, plain

CLASS = "GPTJForCausalLM"
PREFIX = "transformer."
HEAD = "lm_head.weight"
BUFFERS = ("attn.bias", "attn.masked_bias", "attn.embed_positions")


def architecture(config: HfConfig) -> Architecture:
    """Returns what a GPT-J config.json describes. Dropout is always off.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    width, heads = arch.need_setting(config, "n_embd"), arch.need_setting(config, "n_head")
    dim = arch.head_dim({}, width, heads)
    rotated = arch.need_setting({"rotary_dim": 64, **config}, "rotary_dim")
    if rotated > dim:
        raise UserError(f"config.json: rotary_dim = {rotated} is more than a head's {dim} dimensions")
    return Architecture(
        family="gptj",
        vocab=arch.need_setting(config, "vocab_size"),
        width=width,
        layers=arch.need_setting(config, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=dim,
        mlp=arch.get_setting(config, "n_inner", 4 * width),
        norm="layer",
        eps=arch.get_setting(config, "layer_norm_epsilon", 1e-5),
        activation=arch.activation(config, "activation_function", "gelu_new"),
        gated=False,
        rope=arch.rope_of({}, dim, fraction=rotated / dim),
        parallel=True,
        shared_norm=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=True,
        tied=arch.get_setting(config, "tie_word_embeddings", False),
        head_bias=True,
        max_positions=arch.get_setting(config, "n_positions", 2048),
        initializer_range=arch.get_setting(config, "initializer_range", 0.02),
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer.

    GPT-J rotates neighbouring dimensions, we the first half with the second: queries and keys are reordered, which
    changes no score.
    """
    assert a.rope is not None
    heads, pairs = (a.heads, a.head_dim), np.arange(a.rope.dims).reshape(-1, 2)
    reordered = (slice(None), np.concatenate([pairs[:, 0], pairs[:, 1], np.arange(a.rope.dims, a.head_dim)]))
    width, layer = a.width, "transformer.h.{i}."
    table = {
        "transformer.wte.weight": plain(("embedding",), a.vocab, width),
        layer + "attn.q_proj.weight": linear(("layers", "q", "kernel"), heads, (width,), reordered),
        layer + "attn.k_proj.weight": linear(("layers", "k", "kernel"), heads, (width,), reordered),
        layer + "attn.v_proj.weight": linear(("layers", "v", "kernel"), heads, (width,)),
        layer + "attn.out_proj.weight": linear(("layers", "o", "kernel"), (width,), heads),
        layer + "mlp.fc_in.weight": linear(("layers", "up", "kernel"), (a.mlp,), (width,)),
        layer + "mlp.fc_in.bias": plain(("layers", "up", "bias"), a.mlp),
        layer + "mlp.fc_out.weight": linear(("layers", "down", "kernel"), (width,), (a.mlp,)),
        layer + "mlp.fc_out.bias": plain(("layers", "down", "bias"), width),
    }
    for where, path in {"transformer.ln_f.": ("final_norm",), layer + "ln_1.": ("layers", "attention_norm")}.items():
        table[where + "weight"] = plain((*path, "scale"), width)
        table[where + "bias"] = plain((*path, "bias"), width)
    if a.head_bias:
        table["lm_head.bias"] = plain(("head_bias",), a.vocab)
    if not a.tied:
        table[HEAD] = plain(("head",), a.vocab, width)
    return table
