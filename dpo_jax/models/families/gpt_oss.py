"""GPT-OSS (20B, 120B): mixtures of experts with biases, attention sinks, and windows in every other layer.

Released in MXFP4 (`huggingface/mxfp4.py`), which is read; written are plain tensors, as transformers writes the model
that it has dequantized.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, same_layout

CLASS = "GptOssForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"num_experts", "num_local_experts", "layer_types", "sliding_window"}
DEFAULTS = {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_experts_per_tok": 4}
DEFAULTS |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": True, "rope_theta": 150000.0}
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 4096}
EXPERTS = "model.layers.{i}.mlp.experts."


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GPT-OSS config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    if not config.get("rope_scaling") and not config.get("rope_parameters"):
        config["rope_parameters"] = YARN
    for key, value in (("hidden_act", "silu"), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0), ("mlp_bias", False)):
        hf.only_setting(config, key, value)
    layers = hf.need_setting(config, "num_hidden_layers")
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    mixture = dataclasses.replace(experts.mixture_settings(config, 128, True), biased=True)
    windows = hf.layer_windows(config, layers, kinds)
    return llama.llama_like(config, "gpt_oss", activation="clamped", mixture=mixture, windows=windows, sinks=True)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer: all experts of a layer in one."""
    every: Any = slice(None)
    inner = tuple(TensorPart(path, 0, (every, every, every, k), 1) for k, path in enumerate(_paths("gate", "up")))
    (down,) = _paths("down")
    return _with_experts(
        a,
        {
            "gate_up_proj": Tensor((_count(a), (a.width,), (a.mlp, 2)), inner),
            "down_proj": Tensor((_count(a), (a.mlp,), (a.width,)), (TensorPart(down, 0, (), 1),)),
        },
    )


fused_tensors = tensors


def mxfp4_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the tensors of a file in MXFP4: the kernels of experts are [E, outputs, inputs] there."""
    every: Any = slice(None)
    inner = tuple(TensorPart(path, 1, (every, every, k), 1) for k, path in enumerate(_paths("gate", "up")))
    (down,) = _paths("down")
    return _with_experts(
        a,
        {
            "gate_up_proj_blocks": Tensor((_count(a), (a.mlp, 2), (a.width,)), inner),
            "down_proj_blocks": Tensor((_count(a), (a.width,), (a.mlp,)), (TensorPart(down, 1, (), 1),)),
        },
    )


def _count(a: Architecture) -> tuple[int]:
    return (a.mixture.experts if a.mixture else 0,)


def _paths(*names: str, leaf: str = "kernel") -> list[tuple[str, ...]]:
    return [("layers", f"expert_{name}", leaf) for name in names]


def _with_experts(a: Architecture, kernels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns all tensors, given the kernels of the experts. Gate and up alternate in the last axis of the first."""
    every: Any = slice(None)
    layer, (count,) = "model.layers.{i}.", _count(a)
    gate_up = tuple(TensorPart(path, 0, (every, every, k)) for k, path in enumerate(_paths("gate", "up", leaf="bias")))
    found = {name: tensor for name, tensor in llama.llama_tensors(a, llama.NORMS).items() if ".mlp." not in name}
    return {
        **found,
        layer + "self_attn.sinks": same_layout(("layers", "sinks", "score"), a.heads),
        layer + "mlp.router.weight": same_layout(("layers", "router", "weight"), count, a.width),
        layer + "mlp.router.bias": same_layout(("layers", "router", "bias"), count),
        **{EXPERTS + name: tensor for name, tensor in kernels.items()},
        EXPERTS + "gate_up_proj_bias": Tensor((_count(a), (a.mlp, 2)), gate_up),
        EXPERTS + "down_proj_bias": same_layout(_paths("down", leaf="bias")[0], count, a.width),
    }
