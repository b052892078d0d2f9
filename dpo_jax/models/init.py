"""Random parameters, and functions mapped over layers. Results are host arrays."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpo_jax.models.interface import Model


def init_params(model: Model, seed: int) -> Any:
    """Returns random parameters as host arrays."""
    return jax.device_get(jax.jit(model.init)(jax.random.key(seed)))


def map_layers(function: Callable, kernel: Any) -> Any:
    """Returns a function's results for each layer of a kernel [L, ...], stacked, as host arrays.

    Only one layer is on the device at a time.
    """
    compiled = jax.jit(function)
    return jax.tree.map(lambda *x: np.stack(x), *(jax.device_get(compiled(kernel[i])) for i in range(kernel.shape[0])))
