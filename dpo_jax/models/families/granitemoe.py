"""Granite, mixtures of experts (3.0 and 3.1, 1B-A400M and 3B-A800M): Granite with eight of 32 or 40 experts."""

import dataclasses

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import granite
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor

CLASS = "GraniteMoeForCausalLM"
PREFIX, HEAD, BUFFERS = granite.PREFIX, granite.HEAD, granite.BUFFERS
READS = granite.READS | {"num_experts", "num_local_experts"}
# Name in `fused_expert_tensors` -> name in a layer of the file, and of the model in memory.
NAMES = {
    "gate.weight": ("router.layer.weight", "router.weight"),
    "experts.gate_up_proj": ("input_linear.weight", "experts.gate_up_proj"),
    "experts.down_proj": ("output_linear.weight", "experts.down_proj"),
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a GraniteMoe config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    hf.only_setting(config, "mlp_bias", False)
    mixture = experts.mixture_settings({"num_experts_per_tok": 2, **config}, 8, True)
    return dataclasses.replace(granite.architecture(config), family="granitemoe", mixture=mixture)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer: all experts of a layer in one."""
    return _named(a, 0)


def fused_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the parameters of transformers 5's model by name."""
    return _named(a, 1)


def _named(a: Architecture, form: int) -> dict[str, Tensor]:
    table = experts.fused_expert_tensors(a)
    names = {
        f"model.layers.{{i}}.mlp.{old}": f"model.layers.{{i}}.block_sparse_moe.{NAMES[old][form]}" for old in NAMES
    }
    return {names.get(name, name): tensor for name, tensor in table.items()}
