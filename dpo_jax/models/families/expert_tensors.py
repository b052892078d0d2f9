"""Mixtures of experts with Llama's attention: their settings, and their tensors in both forms.

Files have one tensor for each projection of each expert, as transformers 4 has in memory and transformers 5 still
writes. transformers 5 has one for all experts of a layer in memory, gate and up fused. Both are read; the first, which
all programs read, is written.
"""

from collections.abc import Mapping
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture, Mixture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.llama import NORMS, llama_tensors
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, linear, same_layout

NAMES = {"expert_gate": "gate_proj", "expert_up": "up_proj", "expert_down": "down_proj"}  # ours -> name in the file


def mixture_settings(
    config: hf.HfConfig, experts: int, renormalized: bool, names: tuple[str, str] = ("num_experts", "num_local_experts")
) -> Mixture:
    """Returns the mixture of a config.json.

    Args:
      config: the contents of config.json, which may name the number of experts in two ways.
      experts: their number if it does in neither.
      renormalized: see `Mixture`.
      names: the two ways.

    Raises:
      UserError: the two names have different numbers, or more experts are chosen than there are.
    """
    count = hf.either_setting(config, *names, default=experts)
    found = Mixture(count, hf.need_setting(config, "num_experts_per_tok"), renormalized)
    if found.chosen > found.experts:
        raise UserError(f"config.json: num_experts_per_tok = {found.chosen} of {found.experts} experts; correct one")
    return found


def per_expert_tensors(a: Architecture, where: str = "mlp", names: Mapping[str, str] = NAMES) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, with `{i}` for the layer and `{e}` for the expert.

    Args:
      a: the architecture.
      where: name of the mixture in a layer.
      names: the projections of an expert, our name -> name in the file.
    """
    layer = f"model.layers.{{i}}.{where}."
    found = {**_without_mlp(a), layer + "gate.weight": _router(a)}
    for ours, name in names.items():
        outputs, inputs = (a.width, a.mlp) if ours == "expert_down" else (a.mlp, a.width)
        found[f"{layer}experts.{{e}}.{name}.weight"] = linear(("layers", ours, "kernel"), (outputs,), (inputs,))
    return found


def fused_expert_tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns the parameters of transformers 5's model by name: all experts of a layer in a tensor, [E, out, in]."""
    layer, count = "model.layers.{i}.mlp.", (a.mixture.experts if a.mixture else 0,)
    gate, up, down = (("layers", name, "kernel") for name in NAMES)
    every: Any = slice(None)
    fused = (TensorPart(gate, 1, (every, 0), 1), TensorPart(up, 1, (every, 1), 1))
    return {
        **_without_mlp(a),
        layer + "gate.weight": _router(a),
        layer + "experts.gate_up_proj": Tensor((count, (2, a.mlp), (a.width,)), fused),
        layer + "experts.down_proj": Tensor((count, (a.width,), (a.mlp,)), (TensorPart(down, 1, (), 1),)),
    }


def _without_mlp(a: Architecture) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in llama_tensors(a, NORMS).items() if ".mlp." not in name}


def _router(a: Architecture) -> Tensor:
    return same_layout(("layers", "router", "weight"), a.mixture.experts if a.mixture else 0, a.width)
