"""Device mesh and logical-to-mesh axis rules. The only module that names mesh axes."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.errors import UserError
from dpo_jax.row_split import RowSplit

AXES = ("data", "fsdp", "sequence", "tensor")  # neighbours along the last ones are the closest devices
ROWS = ("data", "fsdp")  # the rows of a microbatch are sharded over both
SPLIT = (*ROWS, "sequence")  # over which the tokens of a microbatch are sharded: by rows, then within a row
MAPPED = "devices"  # the one axis of pmap
_HEADS, _SHARDS = ("tensor",), ("fsdp", "sequence")
# Logical axis of a parameter -> the mesh axes that shard it together; all others are replicated.
RULES = {"vocab": _HEADS, "heads": _HEADS, "kv_heads": _HEADS, "mlp": _HEADS, "embed": _SHARDS}
log = logging.getLogger(__name__)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[Any] | None = None,
    groups: Sequence[int] | None = None,
) -> jax.sharding.Mesh:
    """Returns a mesh over all devices; one axis may be -1, which takes the remaining devices.

    Args:
      data, fsdp, tensor, sequence: devices along each axis.
      devices: to use; by default all there are. Those of a compiler's topology need not exist.
      groups: of fast links, as `link_groups` returns, which is the default.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, sequence, tensor], jax.devices() if devices is None else devices
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


def head_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices that share the attention heads."""
    return mesh.shape["tensor"]


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


class Collectives(NamedTuple):
    """Collectives of a data-parallel step, in which each device processes its own rows, or its part of them.

    Gradients of replicated parameters are psum-ed once per step, gradients of FSDP-sharded parameters are
    reduce-scattered per microbatch. A per-row value is an array [M, R * n, ...] with n entries for each row, the same
    on all devices that share a row.

    Attributes:
      psum: a device's sum over its rows -> the sum over all rows; the identity where a step sees all rows.
      reduce: runs `((trained, base), batch, count, known) -> (tree like trained, per-row values)` on every device, sums
        the trees over devices and all-gathers the values. `known` is replicated.
      gather_rows: runs `(params, batch, count) -> per-row values` on every device and all-gathers them.
      map_rows: runs `(params, batch, count) -> arrays [M, R, ...]` on every device; the arrays stay sharded by row.
      own_rows: per-row values of all rows -> those of this device; for use inside `reduce`.
      gather: (parameters or one layer of them, shardings, compute dtype) -> the same all-gathered along fsdp, for use
        inside the functions above; None if nothing is sharded along fsdp. Where rows are split, `sequence` shards
        parameters too.
      exchange: runs `indices of all tokens -> own part of the last axis` on every device along fsdp and sends each
        device its tokens' parts: (function, own indices) -> whole last axis, for use likewise; None where parameters
        are whole or `tensor` shards them too.
      split: how devices share the tokens of a row; None if each has whole rows.
    """

    psum: Callable[[Any], Any]
    reduce: Callable[[Callable], Callable]
    gather_rows: Callable[[Callable], Callable]
    map_rows: Callable[[Callable], Callable]
    own_rows: Callable[[Any], Any]
    gather: Callable[[Any, Any, str], Any] | None
    exchange: Callable[[Callable[[Any], Any], Any], Any] | None = None
    split: RowSplit | None = None


def _same(x: Any) -> Any:
    return x


NO_COLLECTIVES = Collectives(_same, _same, _same, _same, _same, None)  # one device has all rows


def mesh_collectives(mesh: jax.sharding.Mesh, params: Any, reduce_dtype: str = "float32") -> Collectives:
    """Returns the collectives of a step under jit on a mesh.

    Args:
      mesh: from `make_mesh`.
      params: tree of the parameters' shardings; a pair (trained, base) if `reduce` is used.
      reduce_dtype: dtype in which gradients are summed over fsdp.

    Raises:
      UserError: bfloat16 sums on a mesh that shards along `tensor` too.
    """
    axes = _present(mesh, SPLIT)
    if reduce_dtype != "float32" and mesh.shape["tensor"] > 1:  # XLA's compiler for CPUs crashes there
        raise UserError(f"mesh.reduce_dtype: {reduce_dtype} is for fsdp alone; set mesh.tensor to 1, or float32")
    if not axes:
        return NO_COLLECTIVES
    # Attention kernels that XLA cannot partition need every axis to be manual, which only works if none shards heads.
    manual = set(AXES) if mesh.shape["tensor"] == 1 else set(axes)
    specs = jax.tree.map(lambda s: PartitionSpec(*(a if _names(a) & set(axes) else None for a in s.spec)), params)
    row_axes, everywhere = _present(mesh, ROWS), PartitionSpec()
    rows, tokens, shards = PartitionSpec(None, row_axes), token_devices(mesh), _present(mesh, _SHARDS)

    def run(function: Callable, out: Any, *more: PartitionSpec) -> Callable:
        where = (specs, rows, everywhere, *more)
        return jax.shard_map(function, mesh=mesh, in_specs=where, out_specs=out, axis_names=manual, check_vma=False)

    def reduce(function: Callable) -> Callable:
        def body(*args: Any) -> Any:
            tree, values = function(*args)
            # all_gather's transpose has reduce-scattered the sharded gradients already; the rest is summed here.
            rest = jax.tree.map(partial(_sum_over, axes), tree, specs[0])
            return rest, _gather_row_values(values, row_axes)

        return run(body, (specs[0], everywhere), everywhere)

    return Collectives(
        psum=_same,
        reduce=reduce,
        gather_rows=lambda function: run(lambda *args: _gather_row_values(function(*args), row_axes), everywhere),
        map_rows=lambda function: run(function, rows),
        own_rows=partial(_own_rows, row_axes),
        gather=partial(_gather_params, mesh, reduce_dtype) if shards else None,
        exchange=partial(_exchange, shards) if shards and mesh.shape["tensor"] == 1 else None,
        split=RowSplit("sequence", tokens, "tensor", head_devices(mesh)) if tokens > 1 else None,
    )


def _present(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those axes that have more than one device."""
    return tuple(a for a in axes if mesh.shape[a] > 1)


def _names(entry: str | tuple[str, ...] | None) -> set[str]:
    """Returns the mesh axes in an entry of a PartitionSpec."""
    return {entry} if isinstance(entry, str) else set(entry or ())


def shard_heads(mesh: jax.sharding.Mesh, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an attention kernel that runs on each device's own heads, for kernels that XLA cannot partition.

    Call it inside the functions of `mesh_collectives`.

    Args:
      mesh: from `make_mesh`; its `head_devices` must divide the heads and the key-value heads.
      attend: `(q, k, v, mask, scoring) -> output`, where q, k, v and the output are [R, T, heads, d].
    """
    if head_devices(mesh) == 1:
        return attend  # every axis is manual there
    outside = set(_present(mesh, SPLIT))
    heads = PartitionSpec(None, None, "tensor")

    def run(q: Any, k: Any, v: Any, mask: Any, scoring: Any) -> jax.Array:
        return jax.shard_map(
            lambda *args: attend(*args, scoring),
            mesh=None if outside else mesh,
            in_specs=(heads, heads, heads, PartitionSpec()),
            out_specs=heads,
            axis_names=set(AXES) - outside,
            check_vma=False,
        )(q, k, v, mask)

    return run


def mesh_and_params(params: Any) -> tuple[jax.sharding.Mesh, Any]:
    """Returns the mesh of parameters, and the parameters; without one, replicated on this process's devices."""
    for leaf in jax.tree.leaves(params):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh.axis_names == AXES:
            return where.mesh, params  # type: ignore[return-value]
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices), 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    return mesh, jax.device_put(params, replicated(mesh))


def independent_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices, or groups of them along `tensor`, with their own rows in `independent_rows`."""
    return math.prod(mesh.shape[a] for a in SPLIT)


def independent_rows(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """Returns `(params, rows, others) -> rows`, rows on axis 0, run on all devices without communication.

    A device may finish before the others (a sampling loop ends when its rows have ended). Rows are whole, and devices
    along `sequence` have different ones. Parameters are all-gathered along `fsdp` and `sequence` once. Where `tensor`
    shards them, devices have to communicate, and keep step.
    """
    axes = _present(mesh, SPLIT)
    split, same = PartitionSpec(axes), PartitionSpec()
    if mesh.shape["tensor"] > 1:
        sharded = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, split))
        return lambda params, rows, others: function(params, jax.tree.map(sharded, rows), others)
    if not axes:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=(same, split, same), out_specs=split, check_vma=False)


def pmap_collectives(mesh: jax.sharding.Mesh) -> Collectives:
    """Returns the collectives of a step under `pmap`; a mesh that shards parameters is a UserError."""
    if row_devices(mesh) != mesh.shape["data"] or mesh.size != mesh.shape["data"]:
        raise UserError(
            "mesh.mode pmap: parameters are replicated; set mesh.fsdp, mesh.tensor and mesh.sequence to 1"
        )

    def reduce(function: Callable) -> Callable:
        def body(*args: Any) -> Any:
            tree, values = function(*args)
            return jax.lax.psum(tree, MAPPED), _gather_row_values(values, MAPPED)

        return body

    return NO_COLLECTIVES._replace(
        psum=partial(jax.lax.psum, axis_name=MAPPED),
        reduce=reduce,
        gather_rows=lambda function: lambda *args: _gather_row_values(function(*args), MAPPED),
        own_rows=partial(_own_rows, MAPPED),
    )


def _gather_row_values(tree: Any, axes: Any) -> Any:
    """Returns per-row values of all devices, all-gathered as one array."""
    if not axes:  # every device has all rows
        return tree
    leaves, kind = jax.tree.flatten(tree)
    flat = [x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in leaves]
    together = jax.lax.all_gather(jnp.concatenate(flat, axis=2), axes, axis=1, tiled=True)
    parts = jnp.split(together, list(itertools.accumulate(x.shape[2] for x in flat))[:-1], axis=2)
    return kind.unflatten(
        p.reshape(*p.shape[:2], *x.shape[2:]).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)
    )


def _own_rows(axes: Any, values: Any) -> Any:
    if not axes:
        return values
    size = values.shape[1] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(axes) * size, size, axis=1)


def _sum_over(axes: tuple[str, ...], x: Any, spec: PartitionSpec) -> Any:
    """Returns an array psum-ed over those axes that do not shard it."""
    rest = tuple(a for a in axes if not any(a in _names(entry) for entry in spec))
    return jax.lax.psum(x, rest) if rest else x


# Parameters that are cast to the compute dtype before use; norms, biases and rewards compute in float32.
CAST = ("kernel", "lora_a", "lora_b", "embedding", "positions", "head")


def _gather_params(mesh: jax.sharding.Mesh, reduce_dtype: str, tree: Any, shardings: Any, compute: str) -> Any:
    """Returns parameters all-gathered along fsdp (and sequence, where rows are split); one layer has one axis less than
    its stack in `shardings`.

    Those that are cast to the compute dtype anyway are sent in it.
    """

    def one(path: Any, x: Any, sharding: NamedSharding) -> Any:
        spec = sharding.spec[len(sharding.spec) - x.ndim :]
        axis = next((i for i, entry in enumerate(spec) if _names(entry) & set(_SHARDS)), None)
        if axis is None:
            return x
        narrow = path[-1].key in CAST and jnp.dtype(compute).itemsize < x.dtype.itemsize
        sent = jnp.dtype(compute) if narrow else x.dtype

        def gather(x: Any) -> Any:
            return _all_gather(x, spec[axis], axis, sent, jnp.dtype(reduce_dtype))

        if mesh.shape["tensor"] == 1:
            return gather(x)
        # Without this constraint XLA all-gathers along `tensor` too.
        kept = PartitionSpec(*(a if a == "tensor" else None for a in spec))
        return jax.shard_map(gather, in_specs=kept, out_specs=kept, axis_names={"tensor"}, check_vma=False)(x)

    return jax.tree_util.tree_map_with_path(one, tree, shardings)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _all_gather(x: Any, names: Any, axis: int, sent: Any, reduced: Any) -> Any:
    """Returns x all-gathered along mesh axes in the dtype `sent`, in its own dtype; gradients are summed in `reduced`.

    The dtype is x's own again so that the gradient, which has the dtype of the result, is not rounded. XLA leaves out
    the cast there and the user's cast back.
    """
    del reduced
    return _gathered(x, names, axis, sent)


def _gathered(x: Any, names: Any, axis: int, sent: Any) -> Any:
    return jax.lax.all_gather(x.astype(sent), names, axis=axis, tiled=True).astype(x.dtype)


def _all_gather_fwd(x, names, axis, sent, reduced):
    # Not by calling `_all_gather`, whose call remat policies would see in place of the collective, and save.
    return _gathered(x, names, axis, sent), None


def _all_gather_bwd(names, axis, sent, reduced, _, g):
    part = jax.lax.psum_scatter(g.astype(reduced), names, scatter_dimension=axis, tiled=True)
    return (part.astype(g.dtype),)


_all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)


def _exchange(names: tuple[str, ...], function: Callable[[Any], Any], index: Any) -> Any:
    """Runs a function of the indices of all devices along mesh axes; see `Collectives.exchange`."""
    parts = function(jax.lax.all_gather(index, names))
    return jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=parts.ndim - 1, tiled=True)[0]
