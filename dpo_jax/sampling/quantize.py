"""Kernels in 8 bits for sampling: of each projection's outputs one scale, made when sampling starts."""

from typing import Any

import jax.numpy as jnp

from dpo_jax.records import Array

INPUTS = {"o": 2, "global_o": 2}  # input axes of a projection's kernel: heads and their dimensions; all others have one
LARGEST = 127


def quantize_layer(layer: Any) -> Any:
    """Returns one layer's parameters with each `kernel` as int8, and its float32 `kernel_scale` [1, ..., *outputs]."""
    return {name: _quantize(leaves, INPUTS.get(name, 1)) for name, leaves in layer.items()}


def _quantize(leaves: Any, inputs: int) -> Any:
    if "kernel" not in leaves:
        return leaves
    kernel: Array = leaves["kernel"].astype(jnp.float32)
    largest = jnp.abs(kernel).max(tuple(range(inputs)), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return {**leaves, "kernel": jnp.round(kernel / scale).astype(jnp.int8), "kernel_scale": scale}


def dequantize_layer(layer: Any, dtype: Any) -> Any:
    """Returns a layer of `quantize_layer` with kernels of a dtype, for use with its neighbors' left as they are."""
    return {name: _dequantize(leaves, dtype) for name, leaves in layer.items()}


def _dequantize(leaves: Any, dtype: Any) -> Any:
    if "kernel_scale" not in leaves:
        return leaves
    rest = {key: leaf for key, leaf in leaves.items() if key != "kernel_scale"}
    return {**rest, "kernel": (leaves["kernel"] * leaves["kernel_scale"]).astype(dtype)}
