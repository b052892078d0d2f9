"""Falcon (7B to 180B, RW, Falcon 2 11B): attention and MLP side by side, few key-value heads in one fused projection.

The RW models (1B, 7B) have ALiBi, the MLP after attention, and as many key-value heads as heads.
"""

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gpt2
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import (
    Tensor,
    TensorPart,
    layer_norms,
    linear,
    same_layout,
    untied_head,
    with_bias,
)

CLASS = "FalconForCausalLM"
PREFIX, HEAD = "transformer.", "lm_head.weight"
BUFFERS = ("rotary_emb.inv_freq",)
READS = {"alibi", "apply_residual_connection_post_layernorm", "parallel_attn", "rope_theta", "rope_scaling"}
READS |= {"rope_parameters", "partial_rotary_factor"}
LAYER = "transformer.h.{i}."


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Falcon config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    hf.only_setting(config, "apply_residual_connection_post_layernorm", False)
    new = hf.get_setting(config, "new_decoder_architecture", False)
    parallel = hf.get_setting(config, "parallel_attn", True)
    norms = hf.get_setting(config, "num_ln_in_parallel_attn", 2 if new else 1)
    if norms not in ((1, 2) if new else (1,)) or (new and not parallel):
        why = f"num_ln_in_parallel_attn = {norms}, parallel_attn = {parallel}, new_decoder_architecture = {new}"
        raise UserError(f"config.json: {why} is no Falcon that was released, and is not supported")
    width, heads = hf.either_setting(config, "hidden_size", "n_embed"), hf.need_setting(config, "num_attention_heads")
    dim, bias = hf.head_dim({}, width, heads), hf.get_setting(config, "bias", False)
    grouped = new or not hf.get_setting(config, "multi_query", True)
    kv_heads = hf.kv_heads({"num_key_value_heads": config.get("num_kv_heads")}, heads) if grouped else 1
    alibi = hf.get_setting(config, "alibi", False)
    if alibi and kv_heads != heads:
        raise UserError(f"config.json: alibi = True with {kv_heads} key-value heads for {heads} heads is not supported")
    return gpt2.gpt_like(
        config,
        "falcon",
        width=width,
        layers=hf.need_setting(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        mlp=hf.get_setting(config, "ffn_hidden_size", 4 * width),
        activation=hf.activation(config, "activation", "gelu"),
        rope=None if alibi else hf.rope_from_config(config, dim),
        alibi="scaled" if alibi else None,
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        max_positions=hf.get_setting(config, "max_position_embeddings", 2048),
    )


def _fused(leaf: str, a: Architecture, *inputs: int) -> Tensor:
    """Returns the entry of the fused projection: for each key-value head its queries, its key and its value."""
    group = a.heads // a.kv_heads + 2
    places = np.arange(a.kv_heads * group).reshape(a.kv_heads, group)
    take = {"q": places[:, :-2].ravel(), "k": places[:, -2], "v": places[:, -1]}
    parts = (TensorPart(("layers", name, leaf), len(inputs), (index,)) for name, index in take.items())
    return Tensor(((places.size, a.head_dim), *((size,) for size in inputs)), tuple(parts))


def _norms(a: Architecture) -> dict[str, tuple[str, ...]]:
    """Returns the layer norms: prefix of the name -> path of the parameters."""
    names = {"input_layernorm": "attention_norm"}
    if not a.shared_norm:
        names = {"ln_attn" if a.parallel else "input_layernorm": "attention_norm"}
        names["ln_mlp" if a.parallel else "post_attention_layernorm"] = "mlp_norm"
    return {"transformer.ln_f.": ("final_norm",), **{f"{LAYER}{k}.": ("layers", v) for k, v in names.items()}}


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    width, attention, mlp = a.width, LAYER + "self_attention.", LAYER + "mlp."
    table = {
        "transformer.word_embeddings.weight": same_layout(("embedding",), a.vocab, width),
        attention + "query_key_value.weight": _fused("kernel", a, width),
        **with_bias(attention + "dense", linear(("layers", "o", "kernel"), (width,), (a.heads, a.head_dim)), width),
        **with_bias(mlp + "dense_h_to_4h", linear(("layers", "up", "kernel"), (a.mlp,), (width,)), a.mlp),
        **with_bias(mlp + "dense_4h_to_h", linear(("layers", "down", "kernel"), (width,), (a.mlp,)), width),
    }
    if a.qkv_bias:
        table[attention + "query_key_value.bias"] = _fused("bias", a)
    else:
        table = {name: tensor for name, tensor in table.items() if not name.endswith(".bias")}
    return {**table, **layer_norms(_norms(a), width), **untied_head(HEAD, a)}
