"""Where the parameters of sampling lie on a mesh, and when they are gathered.

Along `data`, `fsdp`, `expert` and `sequence` devices have rows of their own. The prefill gathers parameters that the
last three shard one layer after another, experts too. Decoding reads a copy that is gathered once, if it fits; else it
gathers each layer at each token, so that no device holds the whole model, and devices keep step. Where `tensor` shards
parameters too, XLA decides.
"""

import logging
import os
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax import distributed, sharding
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.groups import names_of
from dpo_jax.models.layer_embedding import TABLES
from dpo_jax.records import Array
from dpo_jax.sampling.decode import AS_THEY_ARE, TOP, Gathering, Sampler, Weights, decode_weights
from dpo_jax.sampling.quantize import dequantize_layer

WHOLE_SHARE = 0.25  # of a device's memory that a gathered copy of the parameters may take
log = logging.getLogger(__name__)


class Placement(NamedTuple):
    """How parameters lie on devices. It is hashable: programs are compiled for it.

    Attributes:
      mesh: the devices.
      leaves: shardings of the parameters, in the order of `tree`; () where these axes shard none.
      tree: structure of the parameters.
      by_layer: whether decoding gathers each layer at each token.
      head: key of the head's weight, if a device may have some of its columns only; None if the head has a bias too.
      layers: the names of each layer's parameters.
    """

    mesh: jax.sharding.Mesh
    leaves: tuple[NamedSharding, ...] = ()
    tree: Any = None
    by_layer: bool = False
    head: str | None = None
    layers: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(
        cls, a: Architecture, compute: str, mesh: jax.sharding.Mesh, params: Any, memory: float | None = None
    ) -> "Placement":
        """Returns the placement of parameters on a mesh; `memory` is that of a device that is not here, in bytes."""
        where = jax.tree.map(lambda x: _padded(x.sharding, x.ndim), params)
        if sharding.head_devices(mesh) > 1 or _whole_params(mesh, where).gather is None:
            return cls(mesh)
        leaves, tree = jax.tree.flatten(where)
        size = sum(x.size for x in jax.tree.leaves(params)) * jnp.dtype(compute).itemsize
        fits = size <= WHOLE_SHARE * (_device_memory(mesh) if memory is None else memory)
        by_layer = not (distributed.all_agree(fits) if sharding.spans_processes(mesh) else fits)
        if by_layer:
            log.info(f"sampling: parameters ({size / 2**30:.1f} GiB) stay sharded; each token gathers every layer")
        names = tuple(names_of(a.kinds, params["layers"], i) for i in range(a.layers))
        head = None if a.head_bias else "embedding" if a.tied else "head"
        return cls(mesh, tuple(leaves), tree, by_layer, head, names)

    @property
    def loops(self) -> int:
        """The number of devices, or groups of them, with rows of their own."""
        return 1 if sharding.head_devices(self.mesh) > 1 else sharding.independent_devices(self.mesh)

    @property
    def shares(self) -> bool:
        """Whether devices share the parameters: each has a part."""
        return bool(self.leaves) or sharding.head_devices(self.mesh) > 1

    @property
    def shardings(self) -> Any:
        """The tree of the parameters' shardings."""
        return jax.tree.unflatten(self.tree, self.leaves)

    @property
    def specs(self) -> Any:
        """The tree of the parameters' partitions."""
        if not self.leaves:
            return {"layers": PartitionSpec()}
        return jax.tree.map(lambda s: s.spec, self.shardings)

    @property
    def weight_specs(self) -> Any:
        """The partitions of `Weights`."""
        whole = PartitionSpec()
        if not self.by_layer:
            return whole
        specs = self.specs
        layer = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs["layers"])
        layers = [{name: layer[name] for name in own} for own in self.layers]
        tree = {key: specs[key] if key in TABLES else whole for key in specs if key in TOP}
        return Weights(tree | {"layers": layers}, specs[self.head] if self.head else whole)


def _whole_params(mesh: jax.sharding.Mesh, where: Any) -> sharding.Collectives:
    """Returns collectives that gather whole layers, with all experts of a mixture: rows end at their own time."""
    return sharding.mesh_collectives(mesh, where, whole_experts=True)


def _padded(where: Any, ndim: int) -> Any:
    """Returns a sharding with an entry for each axis."""
    spec = getattr(where, "spec", ())
    return NamedSharding(where.mesh, PartitionSpec(*spec, *[None] * (ndim - len(spec)))) if spec else where


def _device_memory(mesh: jax.sharding.Mesh) -> float:
    """Returns the bytes of memory of a device of this process on the mesh."""
    stats = mesh.local_devices[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(jax.local_devices())
    return stats.get("bytes_limit", machine)


def gathering(placement: Placement, sampler: Sampler) -> Gathering:
    """Returns how the programs of a placement make parameters whole, for the inside of a `shard_map`."""
    compute = sampler.compute
    if sampler.int8:
        return AS_THEY_ARE._replace(decode={"gather": partial(dequantize_layer, dtype=compute)})
    if not placement.leaves:
        return AS_THEY_ARE
    where, collectives = placement.shardings, _whole_params(placement.mesh, placement.shardings)
    gather: Any = collectives.gather

    def layer(tree: Any) -> Any:
        return gather(tree, {name: where["layers"][name] for name in tree}, compute)

    def top(tree: Any) -> Any:
        return gather(tree, {key: where[key] for key in tree}, compute)

    use = AS_THEY_ARE._replace(prefill={"gather": layer}, layer=layer, top=top)
    if not placement.by_layer:
        return use
    looked_up = not all(where[key].is_fully_replicated for key in TABLES if key in where)
    options = {"gather": layer, "exchange": collectives.exchange if looked_up else None}
    head = {} if placement.head is None else {"head": lambda x: top({placement.head: x})[placement.head]}
    use = use._replace(agree=sharding.any_device(placement.mesh), hold=jax.lax.optimization_barrier)
    return use._replace(prefill=options, decode=options, **head)


def shard_weights(placement: Placement, sampler: Sampler, params: Any, temperature: Array | float) -> Weights:
    """Returns the parameters as decoding reads them, whole or as `by_layer` says; `params` are of `placement`."""
    if not placement.leaves:
        return decode_weights(sampler, params, params, temperature)
    use, split_head = gathering(placement, sampler), placement.by_layer and placement.head is not None

    def local(params: Any, temperature: Array) -> Weights:
        whole = {**params, **use.top({key: leaf for key, leaf in params.items() if key != "layers"})}
        made = decode_weights(sampler, whole, params if split_head else whole, temperature)
        if placement.by_layer:
            return made._replace(tree={**made.tree, **{key: params[key] for key in TABLES if key in params}})
        return made._replace(tree={**made.tree, "layers": [use.layer(layer) for layer in made.tree["layers"]]})

    where, out = (placement.specs, PartitionSpec()), placement.weight_specs
    run = jax.shard_map(local, mesh=placement.mesh, in_specs=where, out_specs=out, check_vma=False)
    return run(params, temperature)


def weight_shapes(placement: Placement, sampler: Sampler, params: Any) -> Weights:
    """Returns the shapes and shardings of `shard_weights`, from those of the parameters."""
    made = jax.eval_shape(lambda params: shard_weights(placement, sampler, params, 1.0), params)
    specs = jax.tree.broadcast(placement.weight_specs, made, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def one(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(placement.mesh, spec))

    return jax.tree.map(one, made, specs)
