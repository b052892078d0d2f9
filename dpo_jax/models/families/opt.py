"""OPT (125M to 66B, all but 350M): learned positions, the first of which has row 2 of their embedding."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gpt2
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, layer_norms, linear, same_layout, untied_head

CLASS = "OPTForCausalLM"
PREFIX = "model."
HEAD = "lm_head.weight"
BUFFERS = ()
READS = frozenset[str]()
OFFSET = 2
LAYER = "model.decoder.layers.{i}."
NORMS = {
    "model.decoder.final_layer_norm.": ("final_norm",),
    LAYER + "final_layer_norm.": ("layers", "mlp_norm"),
    LAYER + "self_attn_layer_norm.": ("layers", "attention_norm"),
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of an OPT config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    for key, value in {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": width,
    }.items():
        hf.only_setting(config, key, value)
    bias = hf.get_setting(config, "enable_bias", True)
    return gpt2.gpt_like(
        config,
        "opt",
        width=width,
        layers=hf.need_setting(config, "num_hidden_layers"),
        heads=heads,
        mlp=hf.need_setting(config, "ffn_dim"),
        eps=1e-5,
        activation=hf.activation(config, "activation_function", "relu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        max_positions=hf.get_setting(config, "max_position_embeddings", 2048),
        initializer_range=hf.get_setting(config, "init_std", 0.02),
        position_offset=OFFSET,
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    heads, width = (a.heads, a.head_dim), a.width
    table = {
        "model.decoder.embed_tokens.weight": same_layout(("embedding",), a.vocab, width),
        "model.decoder.embed_positions.weight": same_layout(("positions",), a.max_positions + OFFSET, width),
        LAYER + "self_attn.out_proj.weight": linear(("layers", "o", "kernel"), (width,), heads),
        LAYER + "fc1.weight": linear(("layers", "up", "kernel"), (a.mlp,), (width,)),
        LAYER + "fc2.weight": linear(("layers", "down", "kernel"), (width,), (a.mlp,)),
    }
    for name in "qkv":
        table[f"{LAYER}self_attn.{name}_proj.weight"] = linear(("layers", name, "kernel"), heads, (width,))
    if a.qkv_bias:
        for name in "qkv":
            table[f"{LAYER}self_attn.{name}_proj.bias"] = Tensor((heads,), (TensorPart(("layers", name, "bias")),))
        for their, ours, size in (("self_attn.out_proj", "o", width), ("fc1", "up", a.mlp), ("fc2", "down", width)):
            table[f"{LAYER}{their}.bias"] = same_layout(("layers", ours, "bias"), size)
    return {**table, **layer_norms(NORMS, width), **untied_head(HEAD, a)}
