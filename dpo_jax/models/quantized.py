"""Kernels in few bits, as qwix makes them: numbers of 4 or 8 bits, and scales that several of them share."""

import importlib
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from dpo_jax.errors import UserError
from dpo_jax.records import Array

TILE = 64  # inputs that share a scale in nf4, as in the paper


class Quantized(NamedTuple):
    """A kernel in few bits.

    Attributes:
      values: int8[*inputs, *outputs]; or uint8, of which the last axis is half as long: two neighbours' places in the
        table of nf4, the first in the lower bits, since a device may give a number of four bits a byte of its own.
      scale: float32, of as many axes, each of which divides that of the kernel.
    """

    values: Array
    scale: Array

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim


def qwix_quantize() -> Any:
    """Returns the library.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("qwix")  # here, since it is an extra, and takes seconds to import
    except ModuleNotFoundError as error:
        raise UserError(f"lora.base: needs a package that is missing ({error}): pip install dpo_jax[qlora]") from None


def quantize(kernel: Array, inputs: int, kind: str) -> Quantized:
    """Returns a kernel [*inputs, *outputs] in few bits, scaled by the largest of the numbers that share a scale.

    Args:
      kernel: floats.
      inputs: the number of input axes.
      kind: "nf4", where 64 inputs of an output share a scale, fewer where 64 does not divide their axis; or "int8",
        where all inputs of an output do.
    """
    rest = [axis for axis in range(kernel.ndim) if axis != inputs - 1]
    how: dict[str, Any] = {"qtype": jnp.int8, "channelwise_axes": range(inputs, kernel.ndim)}
    if kind == "nf4":
        tile = math.gcd(TILE, kernel.shape[inputs - 1])
        how = {"qtype": "nf4", "channelwise_axes": rest, "tiled_axes": {inputs - 1: tile}}
    made = qwix_quantize().quantize(kernel.astype(jnp.float32), **how)
    return Quantized(_packed(made.qvalue) if kind == "nf4" else made.qvalue, made.scale)


def _packed(places: Array) -> Array:
    """Returns numbers below 16 as uint8, two neighbours of the last axis in each."""
    if places.shape[-1] % 2:
        raise UserError(f"lora.base: nf4 takes two numbers together, a projection has {places.shape[-1]}; take int8")
    pairs = places.astype(jnp.uint8).reshape(*places.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def dequantize(kernel: Array | Quantized, dtype: Any) -> Array:
    """Returns a kernel as floats of a dtype."""
    if not isinstance(kernel, Quantized):
        return kernel.astype(dtype)
    values, kind = kernel.values, "int8"
    if values.dtype == jnp.uint8:
        values = jnp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
        kind = "nf4"
    return qwix_quantize().dequantize(qwix_quantize().QArray(values, kernel.scale, None, kind)).astype(dtype)
