"""BLOOM (560M to 176B) and BLOOMZ: ALiBi, normalized embeddings, fused projections interleaved by head."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gpt2, gpt_neox
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, layer_norms, linear, same_layout, untied_head, with_bias

CLASS = "BloomForCausalLM"
PREFIX, HEAD = "transformer.", "lm_head.weight"
BUFFERS = ()
READS = {"apply_residual_connection_post_layernorm"}
LAYER = "transformer.h.{i}."
NORMS = {
    "transformer.word_embeddings_layernorm.": ("embedding_norm",),
    "transformer.ln_f.": ("final_norm",),
    LAYER + "input_layernorm.": ("layers", "attention_norm"),
    LAYER + "post_attention_layernorm.": ("layers", "mlp_norm"),
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a BLOOM config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    hf.only_setting(config, "apply_residual_connection_post_layernorm", False)
    if hf.get_setting(config, "pretraining_tp", 1) > 1:  # which then leaves out biases
        hf.only_setting(config, "slow_but_exact", False)
    width = hf.either_setting(config, "n_embed", "hidden_size")
    return gpt2.gpt_like(
        config,
        "bloom",
        width=width,
        layers=hf.either_setting(config, "n_layer", "num_hidden_layers"),
        heads=hf.either_setting(config, "n_head", "num_attention_heads"),
        mlp=4 * width,
        activation="gelu_tanh",
        alibi="added",
        embedding_norm=True,
        qkv_bias=True,
        out_bias=True,
        max_positions=hf.get_setting(config, "seq_length", 2048),
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    width, attention, mlp = a.width, LAYER + "self_attention.", LAYER + "mlp."
    return {
        "transformer.word_embeddings.weight": same_layout(("embedding",), a.vocab, width),
        attention + "query_key_value.weight": gpt_neox.fused_by_head("kernel", a, width),
        attention + "query_key_value.bias": gpt_neox.fused_by_head("bias", a),
        **with_bias(attention + "dense", linear(("layers", "o", "kernel"), (width,), (a.heads, a.head_dim)), width),
        **with_bias(mlp + "dense_h_to_4h", linear(("layers", "up", "kernel"), (a.mlp,), (width,)), a.mlp),
        **with_bias(mlp + "dense_4h_to_h", linear(("layers", "down", "kernel"), (width,), (a.mlp,)), width),
        **layer_norms(NORMS, width),
        **untied_head(HEAD, a),
    }
