"""The device mesh. Its axes are named in this folder only."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from dpo_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")  # neighbours along the last ones are the closest devices
ROWS = ("data", "fsdp", "expert")  # the rows of a microbatch are sharded over all of them
SPLIT = (*ROWS, "sequence")  # over which the tokens of a microbatch are sharded: by rows, then within a row
HEADS, SHARDS = ("tensor",), ("fsdp", "sequence")  # what shards heads and inner dimensions, and the model's width
EXPERTS = ("expert",)  # what shards the experts of a mixture
MAPPED = "devices"  # the one axis of pmap
log = logging.getLogger(__name__)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[Any] | None = None,
    groups: Sequence[int] | None = None,
) -> jax.sharding.Mesh:
    """Returns a mesh over all devices; one axis may be -1, which takes the remaining devices.

    Args:
      data, fsdp, tensor, sequence, expert: devices along each axis.
      devices: to use; by default all there are. Those of a compiler's topology need not exist.
      groups: of fast links, as `link_groups` returns, which is the default.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, expert, sequence, tensor], jax.devices() if devices is None else devices
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh: {dict(zip(AXES, sizes, strict=True))}: sizes are >= 1, and one may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(s for s in sizes if s > 0))
    if math.prod(sizes) != len(devices):
        raise UserError(f"mesh: {dict(zip(AXES, sizes, strict=True))} does not multiply to the {len(devices)} devices")
    laid = device_layout(sizes, devices, link_groups(devices) if groups is None else groups)
    return jax.sharding.Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def link_groups(devices: Sequence[Any]) -> list[int]:
    """Returns for each device the group whose members have fast links among them: a TPU slice, or a machine of GPUs.

    Where GPUs do not say, those of a process that drives several are a group.
    """
    slices = [getattr(d, "slice_index", None) or 0 for d in devices]
    processes = [d.process_index for d in devices]
    by_process = len(set(slices)) == 1 and devices[0].platform == "gpu" and len(set(processes)) < len(devices)
    return processes if by_process else slices


def axes_across(sizes: Sequence[int], groups: int) -> list[int]:
    """Returns how many groups of devices each axis of a mesh spans: the first axis as many as it can, then the next."""
    across = []
    for size in sizes:
        across.append(math.gcd(size, groups))
        groups //= across[-1]
    return across


def device_layout(sizes: Sequence[int], devices: Sequence[Any], groups: Sequence[int]) -> np.ndarray:
    """Returns the devices as an array of these sizes, in which only the first axis leaves a group of fast links.

    A later axis leaves it too if the number of groups does not divide the first one, which is logged.
    """
    members = [[d for d, g in zip(devices, groups, strict=True) if g == group] for group in sorted(set(groups))]
    if len({len(m) for m in members}) > 1:
        raise UserError(f"mesh: slices or machines have {[len(m) for m in members]} devices; use equal ones")
    across = axes_across(sizes, len(members))
    for name, n in zip(AXES[1:], across[1:], strict=True):
        if n > 1:
            log.info(f"mesh.{name} spans {n} slices or machines; make mesh.{AXES[0]} a multiple of {len(members)}")
    within = [size // n for size, n in zip(sizes, across, strict=True)]
    laid = np.empty(sizes, object)
    for group, where in zip(members, np.ndindex(*across), strict=True):
        block = tuple(slice(i * n, (i + 1) * n) for i, n in zip(where, within, strict=True))
        laid[block] = mesh_utils.create_device_mesh(within, group, allow_split_physical_axes=True)
    return laid


def row_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices that share the rows of a microbatch."""
    return math.prod(mesh.shape[a] for a in ROWS)


def token_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices that share the tokens of a row."""
    return mesh.shape["sequence"]


def expert_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices that shard the experts of a mixture."""
    return mesh.shape["expert"]


def head_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices that share the attention heads."""
    return mesh.shape["tensor"]


def independent_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices, or groups of them along `tensor`, with their own rows in `independent_rows`."""
    return math.prod(mesh.shape[a] for a in SPLIT)


def present_axes(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those axes that have more than one device."""
    return tuple(a for a in axes if mesh.shape[a] > 1)


def axis_names(entry: str | tuple[str, ...] | None) -> set[str]:
    """Returns the mesh axes in an entry of a PartitionSpec."""
    return {entry} if isinstance(entry, str) else set(entry or ())


def spans_processes(mesh: jax.sharding.Mesh) -> bool:
    """Returns whether several processes have devices of the mesh."""
    return len({device.process_index for device in mesh.devices.flat}) > 1
