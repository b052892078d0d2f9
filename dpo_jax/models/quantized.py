"""Kernels quantized to 4 or 8 bits by qwix, with scales shared by several numbers."""

import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.errors import UserError

TILE = 64  # inputs that share a scale in nf4 (QLoRA, arXiv 2305.14314)


class Quantized(NamedTuple):
    """A quantized kernel.

    Attributes:
      values: int8[*inputs, *outputs]; or, for nf4, uint8 whose last axis is half as long, because a device may store a
        4-bit number in a byte: each byte holds two adjacent indices into the nf4 table, the first in the lower bits.
      scale: float32 with as many axes; each size divides that of the kernel.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim


def import_qwix() -> Any:
    """Imports and returns qwix.

    Raises:
      UserError: qwix is not installed.
    """
    try:
        return importlib.import_module("qwix")  # imported late: it is an optional package and slow to import
    except ModuleNotFoundError as error:
        raise UserError(f"lora.base: needs a package that is missing ({error}): pip install dpo_jax[qlora]") from None


def quantize(kernel: jax.Array, inputs: int, kind: str) -> Quantized:
    """Returns a quantized kernel, scaled by the largest magnitude among the numbers that share a scale.

    Args:
      kernel: floats [*inputs, *outputs].
      inputs: number of input axes.
      kind: "nf4": 64 inputs of an output share a scale, fewer if 64 does not divide the last input axis; "int8": all
        inputs of an output share a scale.

    Raises:
      UserError: qwix is not installed; nf4 of an odd number of outputs.
    """
    rest = [axis for axis in range(kernel.ndim) if axis != inputs - 1]
    how: dict[str, Any] = {"qtype": jnp.int8, "channelwise_axes": range(inputs, kernel.ndim)}
    if kind == "nf4":
        tile = math.gcd(TILE, kernel.shape[inputs - 1])
        how = {"qtype": "nf4", "channelwise_axes": rest, "tiled_axes": {inputs - 1: tile}}
    made = import_qwix().quantize(kernel.astype(jnp.float32), **how)
    return Quantized(_pack_nibbles(made.qvalue) if kind == "nf4" else made.qvalue, made.scale)


def _pack_nibbles(indices: jax.Array) -> jax.Array:
    """Returns numbers below 16 as uint8, two neighbors of the last axis per byte."""
    if indices.shape[-1] % 2:
        count = indices.shape[-1]
        raise UserError(f"lora.base: nf4 packs numbers in pairs, and a projection has {count} outputs; set it to int8")
    pairs = indices.astype(jnp.uint8).reshape(*indices.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def dequantize(kernel: jax.Array | Quantized, dtype: Any) -> jax.Array:
    """Returns a kernel, quantized or not, as floats of a dtype."""
    if not isinstance(kernel, Quantized):
        return kernel.astype(dtype)
    values, kind = kernel.values, "int8"
    if values.dtype == jnp.uint8:
        values = jnp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
        kind = "nf4"
    return import_qwix().dequantize(import_qwix().QArray(values, kernel.scale, None, kind)).astype(dtype)
