"""GLM-4.5, 4.6 and 4.7 (106B-A12B, 355B-A32B): dense layers, then mixtures whose routers have a correction."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture, Mixture
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, qwen3_next
from dpo_jax.models.families.tensor_map import Tensor, of_kind, same_layout

CLASS = "Glm4MoeForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
COUNTS = ("n_routed_experts", "num_local_experts")  # keys of the number of experts
READS = llama.READS | {*COUNTS, "use_qk_norm"}
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
DEFAULTS |= {"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128}
DEFAULTS |= {"num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True}
DEFAULTS |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
ONLY = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}  # of the mixtures


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GLM-4.5 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = filled_config(config, DEFAULTS)
    hf.only_setting(config, "mlp_bias", False)
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    rope = hf.rope_from_config(config, hf.head_dim(config, width, heads), part=("partial_rotary_factor", 0.5))
    norm = "head" if hf.get_setting(config, "use_qk_norm", False) else None
    return llama.llama_like(config, "glm4_moe", rope=rope, qk_norm=norm, out_bias=False, **mixture_fields(config))


def filled_config(config: hf.HfConfig, defaults: hf.HfConfig) -> dict[str, Any]:
    """Returns a config.json with defaults for missing keys; either key of the number of experts is enough."""
    rest = {key: value for key, value in defaults.items() if key != COUNTS[0] or config.get(COUNTS[1]) is None}
    return {**rest, **config}


def mixture_fields(config: hf.HfConfig) -> dict[str, Any]:
    """Returns `mixture`, `kinds` and `mlp` of an architecture whose first layers are dense.

    Raises:
      UserError: a setting is missing or not supported.
    """
    for key, value in ONLY.items():
        hf.only_setting(config, key, value)
    layers, dense = hf.need_setting(config, "num_hidden_layers"), hf.need_setting(config, "first_k_dense_replace")
    if not 0 <= dense < layers:
        raise UserError(f"config.json: first_k_dense_replace = {dense} of {layers} layers; leave one with experts")
    count = hf.need_setting(config, "n_shared_experts")
    if count < 1:
        raise UserError(f"config.json: n_shared_experts = {count} is not supported, only 1 or more is")
    found = experts.mixture_settings(config, 0, bool(hf.need_setting(config, "norm_topk_prob")), COUNTS)
    groups, chosen = hf.need_setting(config, "n_group"), hf.need_setting(config, "topk_group")
    mlp = hf.need_setting(config, "moe_intermediate_size")
    mixture = dataclasses.replace(
        found,
        shared=mlp * count,
        gated_shared=False,
        sigmoid=True,
        groups=groups,
        chosen_groups=chosen,
        factor=float(hf.need_setting(config, "routed_scaling_factor")),
        dense=hf.need_setting(config, "intermediate_size") if dense else None,
    )
    _check_groups(mixture)
    kinds = ("dense",) * dense + ("mixture",) * (layers - dense) if dense else ()
    return {"mixture": mixture, "kinds": kinds, "mlp": mlp}


def _check_groups(m: Mixture) -> None:
    """Refuses groups of experts of which a token could not choose its own.

    Raises:
      UserError: the message names the key.
    """
    if m.groups < 1 or m.experts % m.groups or m.experts // m.groups < 2:
        why = f"n_group = {m.groups} of {m.experts} experts"
        raise UserError(f"config.json: {why}; set a divisor, of two or more each")
    if not 1 <= m.chosen_groups <= m.groups or m.chosen > m.chosen_groups * (m.experts // m.groups):
        why = f"topk_group = {m.chosen_groups} of {m.groups} groups, of which {m.chosen} experts are chosen"
        raise UserError(f"config.json: {why}; correct one of n_group, topk_group and num_experts_per_tok")


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer and `{e}` for the expert."""
    return with_dense_layers(experts.per_expert_tensors(a), a)


def fused_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the parameters of transformers 5's model by name: all experts of a layer in a tensor."""
    return with_dense_layers(experts.fused_expert_tensors(a), a)


def with_dense_layers(table: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """Returns the table of a mixture with shared experts, the router's correction, and the MLPs of dense layers."""
    assert a.mixture is not None
    gate = "model.layers.{i}.mlp.gate."
    correction = same_layout(("layers", "router", "correction"), a.mixture.experts)
    found = {**qwen3_next.with_shared(table, a, "shared_experts"), gate + "e_score_correction_bias": correction}
    mixtures = {name: tensor for name, tensor in found.items() if ".mlp." in name}
    mixtures |= {name: mixtures[name]._replace(wide=True) for name in mixtures if name.startswith(gate)}
    dense = llama.llama_tensors(dataclasses.replace(a, mlp=a.dense), llama.NORMS) if a.kinds else {}
    dense = {name: tensor for name, tensor in dense.items() if ".mlp." in name}
    return {**found, **of_kind(mixtures, a, "mixture"), **of_kind(dense, a, "dense")}
