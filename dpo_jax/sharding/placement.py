"""Where arrays lie on a mesh: parameters by the names of their axes, batches by rows, states like their parameters."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.sharding.mesh import AXES, EXPERTS, HEADS, ROWS, SHARDS, row_devices

# Logical axis of a parameter -> the mesh axes that shard it together; all others are replicated.
RULES = {"vocab": HEADS, "heads": HEADS, "kv_heads": HEADS, "mlp": HEADS, "embed": SHARDS, "experts": EXPERTS}
RULES["latent"] = SHARDS


def local_row_blocks(mesh: jax.sharding.Mesh) -> range:
    """Returns the blocks of rows on this process's devices; a microbatch has `row_devices` equal blocks."""
    count = row_devices(mesh)
    where: Any = batch_sharding(mesh).addressable_devices_indices_map((1, count))
    parts = [index[1].indices(count)[0] for index in where.values()]
    return range(min(parts), max(parts) + 1)


def put_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Returns a Batch sharded over all processes, from the rows of this process (its `local_row_blocks`)."""
    parts = local_row_blocks(mesh)

    def one(x: Any) -> jax.Array:
        size = x.shape[1] // len(parts)
        shape, start = (x.shape[0], size * row_devices(mesh), *x.shape[2:]), size * parts.start

        def piece(index: Any) -> Any:
            low, high, _ = index[1].indices(shape[1])
            return x[:, low - start : high - start]

        return jax.make_array_from_callback(shape, batch_sharding(mesh), piece)

    return jax.tree.map(one, batch)


def put_params(tree: Any, shardings: Any) -> Any:
    """Returns host or on-disk arrays on the devices.

    Host arrays are replicated over processes; every process can read on-disk ones, and reads only the blocks of its own
    devices, one after another.
    """

    def one(x: Any, where: NamedSharding) -> jax.Array:
        made: dict[str, jax.Array] = {}  # block -> array, so that devices with the same block copy it from the first
        parts = []
        for device, index in where.addressable_devices_indices_map(x.shape).items():
            name = str(index)
            made[name] = jax.block_until_ready(jax.device_put(made[name] if name in made else x[index], device))
            parts.append(made[name])
        return jax.make_array_from_single_device_arrays(x.shape, where, parts)

    return jax.tree.map(one, tree, shardings)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of every field of a Batch [M, R, ...]: rows are sharded."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def param_shardings(mesh: jax.sharding.Mesh, axes: Any, shapes: Any) -> Any:
    """Returns a tree of shardings for parameters with named logical axes.

    An axis whose size its mesh axes do not divide is replicated.
    """

    def one(names: tuple[str | None, ...], shape: jax.ShapeDtypeStruct) -> NamedSharding:
        spec: list[str | tuple[str, ...] | None] = []
        for name, size in zip(names, shape.shape, strict=True):
            rule = RULES.get(name or "", ())
            axes = tuple(a for a in rule if mesh.shape[a] > 1) or rule[:1]
            entry = axes[0] if len(axes) == 1 else axes or None
            fits = entry not in spec and size % math.prod(mesh.shape[a] for a in axes) == 0
            spec.append(entry if fits else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def state_shardings_like(mesh: jax.sharding.Mesh, params: Any, state: Any) -> Any:
    """Returns a tree of shardings for a training state; optimizer arrays are sharded as their parameters.

    Args:
      mesh: from `make_mesh`.
      params: tree of the parameters' shardings.
      state: the state, or its shapes.
    """
    where = {jax.tree_util.keystr(path): s for path, s in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: Any, leaf: Any) -> NamedSharding:
        # The path of a leaf that mirrors a parameter ends in that parameter's path.
        for i in range(len(path)):
            sharding = where.get(jax.tree_util.keystr(path[i:]))
            if sharding is not None and len(sharding.spec) == len(leaf.shape) and _divides(sharding, leaf.shape):
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, state)


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Returns whether a shape can be sharded so: optimizers such as Adafactor have smaller arrays for a parameter."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def mesh_and_params(params: Any) -> tuple[jax.sharding.Mesh, Any]:
    """Returns the mesh of parameters, and the parameters; without one, replicated on this process's devices."""
    for leaf in jax.tree.leaves(params):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh.axis_names == AXES:
            return where.mesh, params  # type: ignore[return-value]
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices), 1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    return mesh, jax.device_put(params, replicated(mesh))
