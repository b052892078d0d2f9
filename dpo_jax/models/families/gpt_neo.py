"""GPT-Neo (125M to 2.7B): learned positions, unscaled scores, and a window in the layers that are local."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gpt2
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, layer_norms, linear, same_layout, untied_head, with_bias

CLASS = "GPTNeoForCausalLM"
PREFIX, HEAD = gpt2.PREFIX, gpt2.HEAD
BUFFERS = ("attn.attention.bias", "attn.attention.masked_bias")
READS = {"attention_types", "window_size"}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GPT-Neo config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    width, heads = hf.need_setting(config, "hidden_size"), hf.either_setting(config, "num_heads", "num_attention_heads")
    layers = hf.either_setting(config, "num_layers", "num_hidden_layers")
    return gpt2.gpt_like(
        config,
        "gpt_neo",
        width=width,
        layers=layers,
        heads=heads,
        mlp=hf.get_setting(config, "intermediate_size", 4 * width),
        qkv_bias=False,
        out_bias=True,
        max_positions=hf.get_setting(config, "max_position_embeddings", 2048),
        score_scale=1.0,
        windows=_windows(config, layers),
    )


def _windows(config: hf.HfConfig, layers: int) -> tuple[int, ...]:
    """Returns the window of each layer, from `attention_types`: [[["global", "local"], 12]] repeats the pair 12 times.

    Raises:
      UserError: the kinds are not L or not supported.
    """
    kinds = [kind for group, count in hf.get_setting(config, "attention_types", [[["global", "local"], 12]])
             for kind in group * count]  # fmt: skip
    if len(kinds) != layers:
        raise UserError(f"config.json: attention_types names {len(kinds)} layers, num_layers is {layers}")
    named = {"global": "full_attention", "local": "sliding_attention"}
    size = hf.get_setting(config, "window_size", 256)
    return hf.layer_windows({"sliding_window": size}, layers, [str(named.get(kind, kind)) for kind in kinds])


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    heads, width, attention, mlp = (a.heads, a.head_dim), a.width, gpt2.LAYER + "attn.attention.", gpt2.LAYER + "mlp."
    qkv = {f"{attention}{name}_proj.weight": linear(("layers", name, "kernel"), heads, (width,)) for name in "qkv"}
    return {
        "transformer.wte.weight": same_layout(("embedding",), a.vocab, width),
        "transformer.wpe.weight": same_layout(("positions",), a.max_positions, width),
        **with_bias(attention + "out_proj", linear(("layers", "o", "kernel"), (width,), heads), width),
        **with_bias(mlp + "c_fc", linear(("layers", "up", "kernel"), (a.mlp,), (width,)), a.mlp),
        **with_bias(mlp + "c_proj", linear(("layers", "down", "kernel"), (width,), (a.mlp,)), width),
        **qkv,
        **layer_norms(gpt2.NORMS, width),
        **untied_head(HEAD, a),
    }
