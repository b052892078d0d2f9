"""The mesh, and which axis of an array lies along which axis of it: the only file that names mesh axes."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.records import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # rows of a microbatch are split over both
# A model's logical axis -> the mesh axis that splits it; all others are whole on every device.
RULES = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "fsdp"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """Returns a mesh over all devices; one axis may be -1, which takes the devices that are left.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.device_count()
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh: {dict(zip(AXES, sizes, strict=True))}: sizes are >= 1, and one may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // math.prod(s for s in sizes if s > 0))
    if math.prod(sizes) != devices:
        raise UserError(f"mesh: {dict(zip(AXES, sizes, strict=True))} does not multiply to the {devices} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def row_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns over how many devices the rows of a microbatch are split."""
    return math.prod(mesh.shape[a] for a in ROWS)


def put(tree: Any, shardings: Any) -> Any:
    """Returns host arrays, or stored ones that every process can read, on the devices.

    Of a stored one each process reads the blocks of its devices only, one array after another.
    """

    def one(x: Any, where: NamedSharding) -> jax.Array:
        return jax.block_until_ready(jax.make_array_from_callback(x.shape, where, lambda index: x[index]))

    return jax.tree.map(one, tree, shardings)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of every field of a Batch [M, R, ...]: rows are split."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def of_params(mesh: jax.sharding.Mesh, axes: Any, shapes: Any) -> Any:
    """Returns a tree of shardings for parameters with named logical axes.

    An axis that its mesh axis does not divide is left whole.
    """

    def one(names: tuple[str | None, ...], shape: jax.ShapeDtypeStruct) -> NamedSharding:
        spec: list[str | None] = []
        for name, size in zip(names, shape.shape, strict=True):
            axis = RULES.get(name or "")
            fits = axis and axis not in spec and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def of_state(mesh: jax.sharding.Mesh, params: Any, state: Any) -> Any:
    """Returns a tree of shardings for a training state: optimiser arrays lie as the parameters they belong to.

    Args:
      mesh: from `make_mesh`.
      params: tree of the parameters' shardings.
      state: the state, or its shapes.
    """
    where = {jax.tree_util.keystr(path): s for path, s in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: Any, leaf: Any) -> NamedSharding:
        # A leaf that mirrors a parameter ends in that parameter's path (in the state itself, or the optimiser's).
        for i in range(len(path)):
            sharding = where.get(jax.tree_util.keystr(path[i:]))
            if sharding is not None and len(sharding.spec) == len(leaf.shape):
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, state)
