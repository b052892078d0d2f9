"""Kernels in few bits, as qwix makes them: numbers of 4 or 8 bits, and scales that several of them share."""

import importlib
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from dpo_jax.records import Array, UserError

TILE = 64  # inputs that share a scale in nf4, as in the paper


class Quantised(NamedTuple):
    """A kernel in few bits.

    Attributes:
      values: uint4, places in the table of nf4, or int8; [*inputs, *outputs].
      scale: float32, of as many axes, each of which divides that of `values`.
    """

    values: Array
    scale: Array

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim


def qwix() -> Any:
    """Returns the library.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("qwix")  # here, since it is an extra, and takes seconds to import
    except ModuleNotFoundError as error:
        raise UserError(f"lora.base: needs a package that is missing ({error}): pip install dpo_jax[qlora]") from None


def quantise(kernel: Array, inputs: int, kind: str) -> Quantised:
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
    made = qwix().quantize(kernel.astype(jnp.float32), **how)
    return Quantised(made.qvalue, made.scale)


def whole(kernel: Array | Quantised, dtype: Any) -> Array:
    """Returns a kernel as floats of a dtype."""
    if not isinstance(kernel, Quantised):
        return kernel.astype(dtype)
    kind = "nf4" if kernel.values.dtype == jnp.uint4 else kernel.values.dtype
    return qwix().dequantize(qwix().QArray(*kernel, None, kind)).astype(dtype)
