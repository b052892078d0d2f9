"""Gemma 4's language model (E2B, E4B, 31B, 26B-A4B): unlike heads, shared keys, embeddings of layers, mixtures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import OWNERS, Architecture, HeadSizes, Rope
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import gemma2, llama
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, in_layer, linear, of_kind, same_layout

CLASS = "Gemma4ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = {
    "rope_parameters",
    "attention_bias",
    "layer_types",
    "sliding_window",
    "final_logit_softcapping",
    "use_bidirectional_attention",
}
READS |= {"attention_k_eq_v", "enable_moe_block", "hidden_size_per_layer_input", "num_experts", "num_kv_shared_layers"}
READS |= {"per_layer_config"}
DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072, "sliding_window": 512}
DEFAULTS |= {"tie_word_embeddings": True, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
SLIDING, FULL = "sliding_attention", "full_attention"
# Of layers with each kind of attention: that of layers with keys and values of their own, and of those without.
KINDS = {SLIDING: ("attention", "reader"), FULL: ("global", "global_reader")}
ROPES = {SLIDING: {"rope_type": "default", "rope_theta": 10000.0}}
ROPES[FULL] = {"rope_type": hf.PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
LAYER = "model.layers.{i}."


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Gemma 4 config.json of model_type gemma4_text; images and audio are not supported.

    Raises:
      UserError: a setting is missing or not supported.
    """
    given = {key: value for key, value in config.items() if value is not None}
    if "per_layer_config" in config:  # null: no layer has its own, nor has one by other keys
        given.setdefault("per_layer_config", {})
    config = {**DEFAULTS, **given}
    if hf.get_setting(config, "use_bidirectional_attention", "vision") != "vision":
        why = f"use_bidirectional_attention = {config['use_bidirectional_attention']!r} is not supported"
        raise UserError(f"config.json: {why}, only 'vision' and null are")
    types, width = layer_types(config), hf.need_setting(config, "hidden_size")
    heads, kinds = global_heads(config, types), kinds_of_layers(config, types)
    return llama.llama_like(
        config,
        "gemma4_text",
        activation=hf.activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=width**0.5,
        scale_rounded=True,
        post_norm=True,
        qk_norm="head",
        value_norm=True,
        score_scale=1.0,
        logit_cap=config.get("final_logit_softcapping"),
        windows=hf.layer_windows({**config, "layer_types": types}, len(types), None),
        rope=rope_of(config, FULL, heads.head_dim),
        window_rope=rope_of(config, SLIDING, config["head_dim"]) if SLIDING in types else None,
        kinds=kinds,
        global_heads=heads,
        layer_embedding=layer_embedding(config),
        layer_constant=True,
        **mlp_fields(config, kinds),
    )


def mlp_fields(config: hf.HfConfig, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Returns `mlp`, `reader_mlp` and `mixture` of an architecture.

    Raises:
      UserError: a setting is missing; layers with a mixture read keys and values of others.
    """
    size, readers = hf.need_setting(config, "intermediate_size"), "global_reader" in kinds
    if hf.get_setting(config, "enable_moe_block", False):
        if readers:
            why = f"num_kv_shared_layers = {config['num_kv_shared_layers']} with enable_moe_block is not supported"
            raise UserError(f"config.json: {why}; set it to 0")
        chosen = {"num_experts_per_tok": hf.need_setting(config, "top_k_experts")}
        found = experts.mixture_settings({"num_experts": hf.need_setting(config, "num_experts"), **chosen}, 0, True)
        mixture = dataclasses.replace(found, shared=size, gated_shared=False, beside=True)
        return {"mlp": hf.need_setting(config, "moe_intermediate_size"), "mixture": mixture}
    wide = 2 if hf.get_setting(config, "use_double_wide_mlp", False) else 1
    return {"mlp": size, "reader_mlp": size * wide if readers else None}


def layer_types(config: hf.HfConfig) -> list[str]:
    """Returns the kind of attention of each layer. That of the last one is full, whatever the file says.

    Raises:
      UserError: there are not as many as layers.
    """
    layers = hf.need_setting(config, "num_hidden_layers")
    types = [*hf.get_setting(config, "layer_types", [FULL if i % 6 == 5 else SLIDING for i in range(layers)])]
    if len(types) != layers:
        raise UserError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    return [*types[:-1], FULL]


def kinds_of_layers(config: hf.HfConfig, types: list[str]) -> tuple[Any, ...]:
    """Returns the kind of each layer: the last `num_kv_shared_layers` read keys and values of others.

    Raises:
      UserError: some of them have no layer to read.
    """
    layers, shared = len(types), hf.get_setting(config, "num_kv_shared_layers", 0)
    own = types[: max(0, layers - shared)]
    if shared < 0 or set(own) != set(types):
        why = f"num_kv_shared_layers = {shared} of {layers} layers"
        raise UserError(f"config.json: {why}: no layer of some type has keys of its own; correct it or layer_types")
    return tuple(KINDS.get(kind, (kind, kind))[i >= len(own)] for i, kind in enumerate(types))


def global_heads(config: hf.HfConfig, types: list[str]) -> HeadSizes:
    """Returns the keys and values of full attention: by `per_layer_config`, which transformers writes, or by the keys
    of released files.

    Raises:
      UserError: they are not the same in all such layers, or do not divide the query heads.
    """
    equal, heads = hf.get_setting(config, "attention_k_eq_v", False), hf.need_setting(config, "num_attention_heads")
    found = {"head_dim": hf.get_setting(config, "global_head_dim", 512)}
    if equal and config.get("num_global_key_value_heads") is not None:
        found["num_key_value_heads"] = config["num_global_key_value_heads"]
    if "per_layer_config" in config:
        found = uniform_settings(config, types)
    sizes = {"head_dim": config["head_dim"], "num_key_value_heads": config["num_key_value_heads"], **found}
    return HeadSizes(hf.kv_heads(sizes, heads), sizes["head_dim"], equal)


def uniform_settings(config: hf.HfConfig, types: list[str]) -> dict[str, Any]:
    """Returns the settings of the layers with full attention, from those of each layer that are not the model's.

    Raises:
      UserError: they differ, are of other things than heads, or are those of other layers.
    """
    own = {
        int(layer): {key: value for key, value in (settings or {}).items() if value != config.get(key)}
        for layer, settings in config["per_layer_config"].items()
    }
    given = {layer: settings for layer, settings in own.items() if settings}
    found = given.get(len(types) - 1, {})
    wanted = {i: found for i, kind in enumerate(types) if kind == FULL and found}
    if given != wanted or found.keys() - {"head_dim", "num_key_value_heads"}:
        what = "head_dim and num_key_value_heads, the same in all layers with full_attention and in no others"
        raise UserError(f"config.json: per_layer_config must have {what}")
    return found


def rope_of(config: hf.HfConfig, kind: str, dim: int) -> Rope:
    """Returns the rotary positions of a kind of attention.

    Raises:
      UserError: a setting is not supported.
    """
    given = {"rope_parameters": config.get("rope_parameters")}
    settings = hf.rope_settings_of_kinds(given)[kind == SLIDING] or ROPES[kind]
    if settings.get("rope_type") == hf.PROPORTIONAL:
        return hf.proportional_rope(settings, dim)
    plain = {key: config[key] for key in ("max_position_embeddings",) if key in config}
    return hf.rope_from_config({**plain, "rope_parameters": settings}, dim)


def layer_embedding(config: hf.HfConfig) -> int | None:
    """Returns the width of the embeddings that each layer has for itself.

    Raises:
      UserError: they have other tokens than the model.
    """
    if not config["hidden_size_per_layer_input"]:
        return None
    hf.only_setting(config, "vocab_size_per_layer_input", hf.need_setting(config, "vocab_size"))
    return config["hidden_size_per_layer_input"]


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` or `{i:kind}` for the layer."""
    plain = llama.llama_tensors(a, gemma2.NORMS)
    found = {name: tensor for name, tensor in plain.items() if ".self_attn." not in name and ".mlp." not in name}
    found[LAYER + "layer_scalar"] = same_layout(("layers", "layer_constant", "constant"), 1)
    for own, reader in KINDS.values():
        found |= attention_tensors(a, own, reader)
    if a.mixture is not None:
        return {**found, **mixture_tensors(a), **embedding_tensors(a)}
    found |= of_kind(mlp_tensors(a, a.mlp), a, "attention", "global")
    if a.reader_mlp is not None:
        found |= of_kind(renamed_params(mlp_tensors(a, a.reader_mlp), "reader", "{i:reader}"), a, *OWNERS)
    return {**found, **embedding_tensors(a)}


fused_tensors = tensors  # all experts of a layer in one, in files too


def mlp_tensors(a: Architecture, size: int) -> dict[str, Tensor]:
    """Returns the tensors of an MLP of an inner width."""
    table = llama.llama_tensors(dataclasses.replace(a, mlp=size), {})
    return {name: tensor for name, tensor in table.items() if ".mlp." in name}


def mixture_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the tensors of a mixture and of the MLP beside it."""
    assert a.mixture is not None
    router, count, every = ("layers", "router"), a.mixture.experts, slice(None)
    gate, up, down = (("layers", f"expert_{name}", "kernel") for name in ("gate", "up", "down"))
    fused = (TensorPart(gate, 1, (every, 0), 1), TensorPart(up, 1, (every, 1), 1))
    norms = {"1": "shared_post_norm", "2": "expert_post_norm"}
    return {
        **renamed_params(mlp_tensors(a, a.mixture.shared or 0), "shared", "{i}"),
        LAYER + "router.proj.weight": same_layout((*router, "weight"), count, a.width),
        LAYER + "router.scale": same_layout((*router, "scale"), a.width),
        LAYER + "router.per_expert_scale": same_layout((*router, "expert_scale"), count),
        LAYER + "experts.gate_up_proj": Tensor(((count,), (2, a.mlp), (a.width,)), fused),
        LAYER + "experts.down_proj": Tensor(((count,), (a.width,), (a.mlp,)), (TensorPart(down, 1, (), 1),)),
        LAYER + "pre_feedforward_layernorm_2.weight": same_layout(("layers", "expert_norm", "scale"), a.width),
        **{
            f"{LAYER}post_feedforward_layernorm_{i}.weight": same_layout(("layers", name, "scale"), a.width)
            for i, name in norms.items()
        },
    }


def attention_tensors(a: Architecture, own: str, reader: str) -> dict[str, Tensor]:
    """Returns the tensors of attention in layers of two kinds: `own` has keys and values, `reader` has not."""
    if own not in a.kinds:
        return {}
    heads = a.heads_in(own)
    sized = dataclasses.replace(a, kv_heads=heads.kv_heads, head_dim=heads.head_dim)
    table = {name: t for name, t in llama.llama_tensors(sized, {}).items() if ".self_attn." in name}
    if heads.keys_as_values:
        table = {name: tensor for name, tensor in table.items() if ".v_proj." not in name}
    table = table if own == "attention" else renamed_params(table, own, f"{{i:{own}}}")
    keys = {name: tensor for name, tensor in table.items() if any(f".{k}_" in name for k in "kv")}
    return {**of_kind(table, a, own, reader), **of_kind(keys, a, own)}


def renamed_params(table: Mapping[str, Tensor], before: str, layer: str) -> dict[str, Tensor]:
    """Returns a table of parameters whose names begin otherwise, with another placeholder for the layer."""

    def one(tensor: Tensor) -> Tensor:
        (layers, name, leaf), *_ = (part.path for part in tensor.parts)
        return tensor._replace(parts=(tensor.parts[0]._replace(path=(layers, f"{before}_{name}", leaf)),))

    return {name.replace("{i}", layer): one(tensor) for name, tensor in table.items()}


def embedding_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the tensors of the embeddings that each layer has for itself; nothing without them."""
    if a.layer_embedding is None:
        return {}
    width, size = a.width, a.layer_embedding
    return {
        "model.embed_tokens_per_layer.weight": same_layout(("layer_embedding",), a.vocab, a.layers * size),
        "model.per_layer_model_projection.weight": linear(
            ("layer_embedding_projection", "kernel"), (a.layers, size), (width,)
        ),
        "model.per_layer_projection_norm.weight": same_layout(("layer_embedding_norm", "scale"), size),
        LAYER + "per_layer_input_gate.weight": linear(("layers", "embedding_gate", "kernel"), (size,), (width,)),
        LAYER + "per_layer_projection.weight": linear(("layers", "embedding_out", "kernel"), (width,), (size,)),
        LAYER + "post_per_layer_input_norm.weight": same_layout(("layers", "embedding_post_norm", "scale"), width),
    }


def unread_tensors(a: Architecture) -> set[str]:
    """Returns the names of tensors that released files have, and that no layer uses: keys and values of readers."""
    numbers = [i for i, kind in enumerate(a.kinds) if kind in OWNERS]
    names = ("k_proj", "v_proj", "k_norm")
    return {in_layer(f"{LAYER}self_attn.{name}.weight", i) for i in numbers for name in names}
