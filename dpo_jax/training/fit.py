"""The memory of a device: what a plan may take of it, and what a run needs of it at the least."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import sharding
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.training.abstract import abstract_run, plan_layout, planned_mesh
from dpo_jax.training.load import compute_dtype
from dpo_jax.training.roofline import inner_widths, mixed_numbers, token_copies
from dpo_jax.training.targets import Target

GB = 2**30
SHARE = 0.9  # of a device's memory that a plan may take: the batches of a run differ from the plan's
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes, unless one of these variables says otherwise
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class Room(NamedTuple):
    """The memory of a device.

    Attributes:
      memory: bytes of it.
      fraction: of it that JAX takes.
    """

    memory: float
    fraction: float = 1.0

    @property
    def taken(self) -> float:
        """Bytes that JAX takes."""
        return self.fraction * self.memory

    @property
    def usable(self) -> float:
        """Bytes that a plan may take."""
        return SHARE * self.taken

    def __str__(self) -> str:
        whole = f"{self.memory / GB:.3g} GB"
        jaxs = "" if self.fraction == 1 else f"the {self.fraction:.0%} that JAX takes ({FRACTIONS[0]}) of "
        return f"{self.usable / GB:.3g} GB, which is {SHARE:.0%} of {jaxs}{whole}"


def device_room(target: Target | None, memory: float | None = None, emulated: bool = False) -> Room:
    """Returns the memory of a target's device, or of a device of this machine.

    Args:
      target: None for the devices of this machine.
      memory: bytes of a device; None for what the target's data sheet, or the device, says, else 80 GB.
      emulated: the devices stand for GPUs.
    """
    if target is not None:
        return Room(memory or target.chip.memory, jax_fraction(target.platform))
    if emulated:
        return Room(memory or 80 * GB, jax_fraction("gpu"))
    if jax.default_backend() == "cpu":
        return Room(memory or 80 * GB)
    if memory:
        return Room(memory, jax_fraction(jax.default_backend()))
    return Room(device_memory() or 80 * GB)  # a device says what JAX may take


def jax_fraction(platform: str) -> float:
    """Returns the fraction of a device's memory that JAX takes on a platform.

    Raises:
      UserError: the variable that sets it is no positive number, or both are set, which JAX refuses.
    """
    if platform != "gpu":
        return 1.0
    names = [name for name in FRACTIONS if os.environ.get(name)]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are both set; unset one")
    name = "".join(names)
    text = os.environ.get(name, str(GPU_SHARE))
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(f"{name}={text} is not a fraction of a GPU's memory; set a number above 0, at most 1")
    return fraction


def least_activations(config: Config, target: Target | None) -> int:
    """Returns bytes on each device that the backward pass needs from the forward pass unless remat is full.

    They are the inputs and outputs of attention, and what goes into the MLP and its activation, of each layer. Where
    devices shard experts, each has room for the tokens of all of them; the MLP beside the experts has its own tokens'.
    """
    a, (mesh, _) = abstract_run(config).model.architecture, planned_mesh(config, target)
    shape = plan_layout(config, sharding.row_devices(mesh), sharding.token_devices(mesh))
    itemsize = jnp.dtype(compute_dtype(config.model)).itemsize
    inner = (2 if a.gated else 1) * inner_widths(a, token_copies(a, sharding.expert_devices(mesh)))
    split = mixed_numbers(a) + inner
    tokens = shape.rows * shape.length // (sharding.row_devices(mesh) * sharding.token_devices(mesh))
    return itemsize * tokens * (a.layers * a.width + split // sharding.head_devices(mesh))


def device_memory() -> int:
    """Returns the bytes that JAX may take on each device of this process, 0 if it does not say (on a CPU)."""
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())
