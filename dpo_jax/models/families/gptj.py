"""GPT-J (6B is the paper's for summaries): attention and MLP side by side after one norm, a head with a bias."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gpt2
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import (
    Tensor,
    layer_norms,
    linear,
    neighbors_apart,
    same_layout,
    untied_head,
    with_bias,
)

CLASS = "GPTJForCausalLM"
PREFIX, HEAD, LAYER = gpt2.PREFIX, gpt2.HEAD, gpt2.LAYER
BUFFERS = ("attn.bias", "attn.masked_bias", "attn.embed_positions")
READS = {"rotary_dim"}
NORMS = {"transformer.ln_f.": ("final_norm",), LAYER + "ln_1.": ("layers", "attention_norm")}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GPT-J config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    width, heads, layers = (hf.either_setting(config, *names) for names in gpt2.SIZES)
    dim = hf.head_dim({}, width, heads)
    rotated = hf.need_setting({"rotary_dim": 64, **config}, "rotary_dim")
    if rotated > dim:
        raise UserError(f"config.json: rotary_dim = {rotated} is more than a head's {dim} dimensions")
    return gpt2.gpt_like(
        config,
        "gptj",
        width=width,
        layers=layers,
        heads=heads,
        mlp=hf.get_setting(config, "n_inner", 4 * width),
        rope=hf.rope_from_settings({}, dim, fraction=rotated / dim),
        parallel=True,
        shared_norm=True,
        qkv_bias=False,
        out_bias=False,
        tied=hf.get_setting(config, "tie_word_embeddings", False),
        head_bias=True,
        max_positions=hf.either_setting(config, *gpt2.POSITIONS, default=2048),
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    heads, width, reordered = (a.heads, a.head_dim), a.width, neighbors_apart(a.rope, a.head_dim)
    table = {
        "transformer.wte.weight": same_layout(("embedding",), a.vocab, width),
        LAYER + "attn.q_proj.weight": linear(("layers", "q", "kernel"), heads, (width,), reordered),
        LAYER + "attn.k_proj.weight": linear(("layers", "k", "kernel"), heads, (width,), reordered),
        LAYER + "attn.v_proj.weight": linear(("layers", "v", "kernel"), heads, (width,)),
        LAYER + "attn.out_proj.weight": linear(("layers", "o", "kernel"), (width,), heads),
        **with_bias(LAYER + "mlp.fc_in", linear(("layers", "up", "kernel"), (a.mlp,), (width,)), a.mlp),
        **with_bias(LAYER + "mlp.fc_out", linear(("layers", "down", "kernel"), (width,), (a.mlp,)), width),
        **layer_norms(NORMS, width),
    }
    if a.head_bias:
        table["lm_head.bias"] = same_layout(("head_bias",), a.vocab)
    return {**table, **untied_head(HEAD, a)}
