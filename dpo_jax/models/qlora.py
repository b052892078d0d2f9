"""QLoRA (arXiv 2305.14314): a quantized base model under trained adapters.

A projection's `kernel` [L, *inputs, *outputs] (or [L, E, ...] of experts) becomes `quantized`, as many 4-bit or 8-bit
numbers, and `scale`. Each layer is dequantized just before its matmul, and again in the backward pass. All other
parameters keep their dtype.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.tensor_map import module_axes
from dpo_jax.models.lora import projections
from dpo_jax.models.quantized import Quantized, dequantize, quantize
from dpo_jax.records import Array


def quantize_base(
    params: Any, architecture: Architecture, kind: str, each: Callable[[Callable[[Array], Quantized], Array], Quantized]
) -> Any:
    """Returns parameters with the kernels of all projections quantized.

    Args:
      params: parameters of the model.
      architecture: its architecture.
      kind: "nf4" or "int8", see `quantize`.
      each: maps (function of one layer's kernel, kernels of all layers [L, ...]) to the stacked results; `map_layers`.
    """
    layers = dict(params["layers"])
    for tensor in projections(architecture).values():
        inputs, outputs = module_axes(tensor)
        one = partial(quantize, inputs=len(inputs), kind=kind)
        one = partial(jax.lax.map, one) if tensor.parts[0].lead else one  # expert by expert
        for part in tensor.parts if math.prod(outputs) > 1 else ():  # a gate of one number stays as it is
            name = part.path[1]
            rest = {key: value for key, value in layers[name].items() if key != "kernel"}
            made = each(one, layers[name]["kernel"])
            layers[name] = {**rest, "quantized": made.values, "scale": made.scale}
    return {**params, "layers": layers}


def quantized_axes(model_axes: Any, base: Any) -> Any:
    """Returns the logical axis names of a base, quantized or not, from the axis names of the plain model."""

    def one(name: str, leaves: Any) -> Any:
        axes = model_axes["layers"][name]
        # `quantized` and a projection's `scale` have the axes of the kernel; a norm has a `scale` of its own.
        return {key: axes["kernel" if key == "quantized" or key not in axes else key] for key in leaves}

    return {**model_axes, "layers": {name: one(name, leaves) for name, leaves in base["layers"].items()}}


class _DequantizedKernel:
    """A quantized kernel of which one layer, or one expert of it, is dequantized when that is indexed."""

    def __init__(self, leaves: Any):
        self.kernel = Quantized(leaves["quantized"], leaves["scale"])

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        values, scale = (jnp.asarray(x[place]) for x in self.kernel)
        return np.asarray(dequantize(Quantized(values, scale), jnp.float32))


def as_floats(base: Any) -> Any:
    """Returns a base with dequantized kernels, to be written to a model folder; layers are dequantized on access."""

    def one(leaves: Any) -> Any:
        if "quantized" not in leaves:
            return leaves
        rest = {key: value for key, value in leaves.items() if key not in ("quantized", "scale")}
        return {**rest, "kernel": _DequantizedKernel(leaves)}

    return {**base, "layers": {name: one(leaves) for name, leaves in base["layers"].items()}}
