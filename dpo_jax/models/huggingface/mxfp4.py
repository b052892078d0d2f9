"""MXFP4 weights, as GPT-OSS is released in: 4-bit floats of which 32 neighbors share a power of two.

The format is that of the Open Compute Project's microscaling specification 1.0 in transformers' layout. A tensor
[..., N] is two: `NAME_blocks` uint8[..., N / 32, 16], two numbers in a byte, the first in the lower bits; `NAME_scales`
uint8[..., N / 32], exponents plus 127.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

CODE = "MXFP4"  # beside safetensors' codes of dtypes
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # numbers that share an exponent
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=1)  # of a byte


def is_mxfp4(quantization: Any) -> bool:
    """Returns whether `quantization_config` of a config.json is that of this format."""
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def unpacked_shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of the tensor that blocks and scales of these shapes hold; None if they do not fit."""
    if len(blocks) < 2 or blocks[-1] * 2 != GROUP or blocks[:-1] != scales:
        return None
    return (*blocks[:-2], blocks[-2] * GROUP)


class Unpacked:
    """The numbers of an MXFP4 tensor [E, rows, N], read by one slice per axis as from a file; bfloat16."""

    def __init__(self, blocks: Any, scales: Any):
        """Takes the two tensors, or their slices in files: whatever is indexed by slices."""
        self.blocks, self.scales = blocks, scales

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        """Returns a block, in which no more than one expert is float32 at a time. bfloat16 has all numbers exactly."""
        experts, rows, columns = index
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        within = slice(columns.start - groups.start * GROUP, columns.stop - groups.start * GROUP)
        parts = [self._expert(e, rows, groups)[:, within] for e in range(experts.start, experts.stop)]
        return np.stack(parts) if parts else np.empty((0, rows.stop - rows.start, columns.stop - columns.start))

    def _expert(self, e: int, rows: slice, groups: slice) -> np.ndarray:
        bytes_, exponents = (x[e : e + 1, rows, groups][0] for x in (self.blocks, self.scales))
        numbers = _PAIRS[bytes_].reshape(*exponents.shape, GROUP)
        scaled = np.ldexp(numbers, exponents.astype(np.int32)[..., None] - 127)
        return scaled.reshape(len(scaled), -1).astype(ml_dtypes.bfloat16)
