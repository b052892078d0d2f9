"""The mesh, and which axis of an array lies along which axis of it: the only file that names mesh axes."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # rows of a microbatch are split over both
MAPPED = "devices"  # the one axis of pmap
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


def head_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns over how many devices heads are split."""
    return mesh.shape["tensor"]


def local_row_blocks(mesh: jax.sharding.Mesh) -> range:
    """Returns which of the `row_devices` equal parts of a microbatch's rows lie on this process's devices."""
    count = row_devices(mesh)
    where: Any = batch_sharding(mesh).addressable_devices_indices_map((1, count))
    parts = [index[1].indices(count)[0] for index in where.values()]
    return range(min(parts), max(parts) + 1)


def put_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Returns a Batch on the devices of all processes, from the rows that this process has built, its `own_parts`."""
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
    """Returns host arrays, which every process holds whole, or stored ones, which every process can read, on the
    devices. Of a stored one each process reads the blocks of its devices only, one after another.
    """

    def one(x: Any, where: NamedSharding) -> jax.Array:
        made: dict[str, jax.Array] = {}  # by the block, so that devices with the same one get it from the first
        parts = []
        for device, index in where.addressable_devices_indices_map(x.shape).items():
            name = str(index)
            made[name] = jax.block_until_ready(jax.device_put(made[name] if name in made else x[index], device))
            parts.append(made[name])
        return jax.make_array_from_single_device_arrays(x.shape, where, parts)

    return jax.tree.map(one, tree, shardings)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of every field of a Batch [M, R, ...]: rows are split."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def param_shardings(mesh: jax.sharding.Mesh, axes: Any, shapes: Any) -> Any:
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


def state_shardings_like(mesh: jax.sharding.Mesh, params: Any, state: Any) -> Any:
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


class Collectives(NamedTuple):
    """How the devices share the rows of a microbatch: each works through its own and nothing is sent between them
    before the step's last microbatch, save that the gradient of a parameter in parts goes to its parts at once.

    Values by row are arrays [M, R * n, ...] with n of them for each row.

    Attributes:
      total: a sum over the rows of a batch as the step sees it -> the sum over all rows.
      sums: `((trained, base), batch, count, known) -> (tree like trained, values by row)`, made to run on all devices:
        the trees are summed over them, and every device gets the values of all rows. `known` is whole on every device.
      all: `(params, batch, count) -> values by row`, made to run on all devices, each of which gets those of all rows.
      each: `(params, batch, count) -> arrays [M, R, ...]`, made to run on all devices; values stay with their rows.
      own: values of all rows -> those of a device's own; to be called inside of `sums`.
      whole: parameters, or their `layers` for one layer, as they lie on a device -> whole, for use inside of the
        functions above; None where they are so.
    """

    total: Callable[[Any], Any]
    sums: Callable[[Callable], Callable]
    all: Callable[[Callable], Callable]
    each: Callable[[Callable], Callable]
    own: Callable[[Any], Any]
    whole: Callable[[Any, Any], Any] | None


def _same(x: Any) -> Any:
    return x


NO_COLLECTIVES = Collectives(_same, _same, _same, _same, _same, None)  # one device has all the rows


def mesh_collectives(mesh: jax.sharding.Mesh, params: Any) -> Collectives:
    """Returns how rows are shared on a mesh.

    Args:
      mesh: from `make_mesh`.
      params: tree of the parameters' shardings; for `sums` a pair, of what is trained and of what is not.
    """
    axes = tuple(a for a in ROWS if mesh.shape[a] > 1)
    if not axes:
        return NO_COLLECTIVES
    # A kernel that XLA cannot split by itself may be called where every axis is manual.
    manual = set(AXES) if mesh.shape["tensor"] == 1 else set(axes)
    specs = jax.tree.map(lambda s: PartitionSpec(*(a if a in axes else None for a in s.spec)), params)
    rows, everywhere = PartitionSpec(None, axes), PartitionSpec()

    def run(function: Callable, out: Any, *more: PartitionSpec) -> Callable:
        where = (specs, rows, everywhere, *more)
        return jax.shard_map(function, mesh=mesh, in_specs=where, out_specs=out, axis_names=manual, check_vma=False)

    def sums(function: Callable) -> Callable:
        def body(*args: Any) -> Any:
            tree, values = function(*args)
            rest = jax.tree.map(lambda x, spec: _sum_over(x, [a for a in axes if a not in spec]), tree, specs[0])
            return rest, _of_all_rows(values, axes)

        return run(body, (specs[0], everywhere), everywhere)

    return Collectives(
        total=_same,
        sums=sums,
        all=lambda function: run(lambda *args: _of_all_rows(function(*args), axes), everywhere),
        each=lambda function: run(function, rows),
        own=partial(_own_rows, axes),
        whole=partial(_gather, mesh) if mesh.shape["fsdp"] > 1 else None,
    )


def shard_heads(mesh: jax.sharding.Mesh, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a kernel of attention, which XLA cannot split by itself, made for use inside of the functions of
    `split_rows`: every device works through its own heads.

    Args:
      mesh: from `make_mesh`; its `head_devices` divide the heads and the key-value heads.
      attend: `(q, k, v, rows, scoring) -> output`, where q, k, v and the output are [R, T, heads, d].
    """
    if head_devices(mesh) == 1:
        return attend  # every axis is manual there
    outside = {a for a in ROWS if mesh.shape[a] > 1}
    heads = PartitionSpec(None, None, "tensor")

    def run(q: Any, k: Any, v: Any, rows: Any, scoring: Any) -> jax.Array:
        return jax.shard_map(
            lambda *args: attend(*args, scoring),
            mesh=None if outside else mesh,
            in_specs=(heads, heads, heads, PartitionSpec()),
            out_specs=heads,
            axis_names=set(AXES) - outside,
            check_vma=False,
        )(q, k, v, rows)

    return run


def mesh_and_params(params: Any) -> tuple[jax.sharding.Mesh, Any]:
    """Returns the mesh on which parameters lie, and them; those that lie on none, whole on every device of this
    process."""
    for leaf in jax.tree.leaves(params):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh.axis_names == AXES:
            return where.mesh, params  # type: ignore[return-value]
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return mesh, jax.device_put(params, replicated(mesh))


def independent_rows(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """Returns `(params, rows, others) -> rows`, with rows on axis 0, made to run on all devices: each has its own rows
    and sends nothing, so that it may end before the others. Parameters are made whole along `fsdp`, once; where
    `tensor` splits them, devices have to send, so that they keep step."""
    axes = tuple(a for a in ROWS if mesh.shape[a] > 1)
    split, same = PartitionSpec(axes), PartitionSpec()
    if mesh.shape["tensor"] > 1:
        laid = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, split))
        return lambda params, rows, others: function(params, jax.tree.map(laid, rows), others)
    if not axes:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=(same, split, same), out_specs=split, check_vma=False)


def pmap_collectives(mesh: jax.sharding.Mesh) -> Collectives:
    """Returns how rows are shared under `pmap`; a mesh that splits parameters is a UserError."""
    if row_devices(mesh) != mesh.shape["data"] or mesh.size != mesh.shape["data"]:
        raise UserError("mesh.mode pmap: every device holds all parameters, so mesh.fsdp and mesh.tensor are 1")

    def sums(function: Callable) -> Callable:
        def body(*args: Any) -> Any:
            tree, values = function(*args)
            return jax.lax.psum(tree, MAPPED), _of_all_rows(values, MAPPED)

        return body

    return NO_COLLECTIVES._replace(
        total=partial(jax.lax.psum, axis_name=MAPPED),
        sums=sums,
        all=lambda function: lambda *args: _of_all_rows(function(*args), MAPPED),
        own=partial(_own_rows, MAPPED),
    )


def _of_all_rows(tree: Any, axes: Any) -> Any:
    """Returns values by row, of a device's own rows, as those of all rows; sent as one array."""
    leaves, kind = jax.tree.flatten(tree)
    flat = [x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in leaves]
    together = jax.lax.all_gather(jnp.concatenate(flat, axis=2), axes, axis=1, tiled=True)
    parts = jnp.split(together, list(itertools.accumulate(x.shape[2] for x in flat))[:-1], axis=2)
    return kind.unflatten(
        p.reshape(*p.shape[:2], *x.shape[2:]).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)
    )


def _own_rows(axes: Any, values: Any) -> Any:
    size = values.shape[1] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(axes) * size, size, axis=1)


def _sum_over(x: Any, axes: list[str]) -> Any:
    return jax.lax.psum(x, tuple(axes)) if axes else x


def _gather(mesh: jax.sharding.Mesh, tree: Any, shardings: Any) -> Any:
    """Returns parameters whole along fsdp; a layer's have one axis less than the stack of layers in `shardings`."""

    def one(x: Any, sharding: NamedSharding) -> Any:
        spec = sharding.spec[len(sharding.spec) - x.ndim :]
        if "fsdp" not in spec:
            return x
        gather = partial(jax.lax.all_gather, axis_name="fsdp", axis=spec.index("fsdp"), tiled=True)
        if mesh.shape["tensor"] == 1:
            return gather(x)
        # Left to itself, XLA would make the array whole along `tensor` too.
        kept = PartitionSpec(*(a if a == "tensor" else None for a in spec))
        return jax.shard_map(gather, in_specs=kept, out_specs=kept, axis_names={"tensor"}, check_vma=False)(x)

    return jax.tree.map(one, tree, shardings)
