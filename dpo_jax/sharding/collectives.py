"""Collectives of a data-parallel step, and functions that run on each device's own rows or heads."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.errors import UserError
from dpo_jax.sharding.expert_split import ExpertSplit
from dpo_jax.sharding.gather import exchange_parts, gather_params
from dpo_jax.sharding.mesh import (
    AXES,
    EXPERTS,
    MAPPED,
    ROWS,
    SHARDS,
    SPLIT,
    axis_names,
    expert_devices,
    head_devices,
    present_axes,
    row_devices,
    token_devices,
)
from dpo_jax.sharding.row_split import RowSplit


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
      experts: how devices shard the experts of a mixture; None if each has, or gathers, all of them.
    """

    psum: Callable[[Any], Any]
    reduce: Callable[[Callable], Callable]
    gather_rows: Callable[[Callable], Callable]
    map_rows: Callable[[Callable], Callable]
    own_rows: Callable[[Any], Any]
    gather: Callable[[Any, Any, str], Any] | None
    exchange: Callable[[Callable[[Any], Any], Any], Any] | None = None
    split: RowSplit | None = None
    experts: ExpertSplit | None = None


def _same(x: Any) -> Any:
    return x


NO_COLLECTIVES = Collectives(_same, _same, _same, _same, _same, None)  # one device has all rows


def mesh_collectives(
    mesh: jax.sharding.Mesh, params: Any, reduce_dtype: str = "float32", *, whole_experts: bool = False
) -> Collectives:
    """Returns the collectives of a step under jit on a mesh.

    Args:
      mesh: from `make_mesh`.
      params: tree of the parameters' shardings; a pair (trained, base) if `reduce` is used.
      reduce_dtype: dtype in which gradients are summed over fsdp.
      whole_experts: `gather` gathers the experts of a mixture too, so that devices do not exchange tokens.

    Raises:
      UserError: bfloat16 sums on a mesh that shards along `tensor` too.
    """
    axes = present_axes(mesh, SPLIT)
    if reduce_dtype != "float32" and mesh.shape["tensor"] > 1:  # XLA's compiler for CPUs crashes there
        raise UserError(f"mesh.reduce_dtype: {reduce_dtype} is for fsdp alone; set mesh.tensor to 1, or float32")
    if not axes:
        return NO_COLLECTIVES
    # Attention kernels that XLA cannot partition need every axis to be manual, which only works if none shards heads.
    manual = set(AXES) if mesh.shape["tensor"] == 1 else set(axes)
    specs = jax.tree.map(lambda s: PartitionSpec(*(a if axis_names(a) & set(axes) else None for a in s.spec)), params)
    row_axes, everywhere = present_axes(mesh, ROWS), PartitionSpec()
    rows, tokens, shards = PartitionSpec(None, row_axes), token_devices(mesh), present_axes(mesh, SHARDS)
    experts = 1 if whole_experts else expert_devices(mesh)
    gathered = present_axes(mesh, (*EXPERTS, *SHARDS) if whole_experts else SHARDS)

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
        gather=partial(gather_params, mesh, gathered, reduce_dtype) if gathered else None,
        exchange=partial(exchange_parts, shards) if shards and mesh.shape["tensor"] == 1 else None,
        split=RowSplit("sequence", tokens, "tensor", head_devices(mesh)) if tokens > 1 else None,
        experts=ExpertSplit("expert", experts) if experts > 1 else None,
    )


def shard_heads(mesh: jax.sharding.Mesh, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an attention kernel that runs on each device's own heads, for kernels that XLA cannot partition.

    Call it inside the functions of `mesh_collectives`.

    Args:
      mesh: from `make_mesh`; its `head_devices` must divide the heads and the key-value heads.
      attend: `(q, k, v, mask, scoring, *sinks) -> output`, where q, k, v and the output are [R, T, heads, d], and
        sinks [heads].
    """
    if head_devices(mesh) == 1:
        return attend  # every axis is manual there
    outside = set(present_axes(mesh, SPLIT))
    heads = PartitionSpec(None, None, "tensor")

    def run(q: Any, k: Any, v: Any, mask: Any, scoring: Any, *sinks: Any) -> jax.Array:
        return jax.shard_map(
            lambda q, k, v, mask, *sinks: attend(q, k, v, mask, scoring, *sinks),
            mesh=None if outside else mesh,
            in_specs=(heads, heads, heads, PartitionSpec(), *[PartitionSpec("tensor")] * len(sinks)),
            out_specs=heads,
            axis_names=set(AXES) - outside,
            check_vma=False,
        )(q, k, v, mask, *sinks)

    return run


def independent_rows(mesh: jax.sharding.Mesh, function: Callable, specs: Any = None) -> Callable:
    """Returns `(params, rows, others) -> rows`, rows on axis 0, run on each device with rows of its own.

    A device may finish before the others (a sampling loop ends when its rows have ended), unless the function makes
    them communicate. Rows are whole, and devices along `sequence` have different ones. Where `tensor` shards
    parameters, devices have to communicate, and keep step.

    Args:
      mesh: from `make_mesh`.
      function: what runs.
      specs: partitions of the parameters that the function gets; by default all are gathered.
    """
    axes = present_axes(mesh, SPLIT)
    split, same = PartitionSpec(axes), PartitionSpec()
    specs = same if specs is None else specs
    if mesh.shape["tensor"] > 1:
        sharded, parts = NamedSharding(mesh, split), math.prod(mesh.shape[a] for a in axes)

        def spread(x: jax.Array) -> jax.Array:
            return x if len(x) % parts else jax.lax.with_sharding_constraint(x, sharded)

        return lambda params, rows, others: function(params, jax.tree.map(spread, rows), others)
    if not axes:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=(specs, split, same), out_specs=split, check_vma=False)


def any_device(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns bool[] -> whether it is true on any device, for the inside of `independent_rows`."""
    axes = present_axes(mesh, SPLIT)
    return lambda flag: jax.lax.psum(flag.astype(jnp.int32), axes) > 0


def pmap_collectives(mesh: jax.sharding.Mesh) -> Collectives:
    """Returns the collectives of a step under `pmap`; a mesh that shards parameters is a UserError."""
    if row_devices(mesh) != mesh.shape["data"] or mesh.size != mesh.shape["data"]:
        others = "mesh.fsdp, mesh.tensor, mesh.sequence and mesh.expert"
        raise UserError(f"mesh.mode pmap: parameters are replicated; set {others} to 1")

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
    flat = [x.reshape(len(x), -1).astype(jnp.float32) for x in leaves]
    together = jax.lax.all_gather(jnp.concatenate(flat, axis=1), axes, axis=1)
    parts = jnp.split(together, list(itertools.accumulate(x.shape[1] for x in flat))[:-1], axis=2)
    return kind.unflatten(
        p.reshape(len(x), -1, *x.shape[2:]).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)
    )


def _own_rows(axes: Any, values: Any) -> Any:
    if not axes:
        return values
    size = values.shape[1] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(axes) * size, size, axis=1)


def _sum_over(axes: tuple[str, ...], x: Any, spec: PartitionSpec) -> Any:
    """Returns an array psum-ed over those axes that do not shard it."""
    rest = tuple(a for a in axes if not any(a in axis_names(entry) for entry in spec))
    return jax.lax.psum(x, rest) if rest else x
