"""A base in few bits for adapters to be trained over (QLoRA, arXiv 2305.14314).

A projection's `kernel` [L, *inputs, *outputs] becomes `quantised`, as many numbers of 4 or 8 bits, and `scale`, which
has as many axes. It is made whole where it is multiplied, a layer at a time, and again in the backward pass. The rest
of the model stays as it is in its files.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.tensor_map import sides
from dpo_jax.models.lora import ALL, adapted_modules
from dpo_jax.models.quantized import Quantized, dequantize, quantize
from dpo_jax.records import Array


def quantize_base(
    params: Any, architecture: Architecture, kind: str, each: Callable[[Callable[[Array], Quantized], Array], Quantized]
) -> Any:
    """Returns a model's parameters with the kernels of all projections in few bits.

    Args:
      params: the parameters.
      architecture: theirs.
      kind: as in `quantise`.
      each: (function of a layer's kernel, kernels of all layers [L, ...]) -> its results, stacked.
    """
    layers = dict(params["layers"])
    for tensor in adapted_modules(architecture, (ALL,)).values():
        for part in tensor.parts:
            name = part.path[1]
            rest = {key: value for key, value in layers[name].items() if key != "kernel"}
            made = each(partial(quantize, inputs=len(sides(tensor)[0]), kind=kind), layers[name]["kernel"])
            layers[name] = {**rest, "quantised": made.values, "scale": made.scale}
    return {**params, "layers": layers}


def quantized_axes(of_base: Any, base: Any) -> Any:
    """Returns the logical names of the axes of a base, in few bits or not, from those of the model."""

    def one(name: str, leaves: Any) -> Any:
        named = of_base["layers"][name]
        return {key: named["kernel" if key == "quantised" or key not in named else key] for key in leaves}

    return {**of_base, "layers": {name: one(name, leaves) for name, leaves in base["layers"].items()}}


class _Whole:
    """A kernel in few bits as floats, made a layer at a time."""

    def __init__(self, leaves: Any):
        self.kernel = Quantized(leaves["quantised"], leaves["scale"])

    def __getitem__(self, layer: int) -> np.ndarray:
        values, scale = (jnp.asarray(x[layer]) for x in self.kernel)
        return np.asarray(dequantize(Quantized(values, scale), jnp.float32))


def as_floats(base: Any) -> Any:
    """Returns a base as the parameters of a plain model, for a folder; layers of what is in few bits one by one."""

    def one(leaves: Any) -> Any:
        if "quantised" not in leaves:
            return leaves
        rest = {key: value for key, value in leaves.items() if key not in ("quantised", "scale")}
        return {**rest, "kernel": _Whole(leaves)}

    return {**base, "layers": {name: one(leaves) for name, leaves in base["layers"].items()}}
