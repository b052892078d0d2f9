"""Parameters all-gathered over devices just before use, and embeddings exchanged in place of their table."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.sharding.gather_scatter import all_gather
from dpo_jax.sharding.mesh import axis_names

# Parameters that are cast to the compute dtype before use; norms, biases and rewards compute in float32.
CAST = ("kernel", "lora_a", "lora_b", "embedding", "layer_embedding", "positions", "head")


def gather_params(
    mesh: jax.sharding.Mesh, over: tuple[str, ...], reduce_dtype: str, tree: Any, shardings: Any, compute: str
) -> Any:
    """Returns parameters all-gathered along the mesh axes `over`; one layer has one axis less than its stack in
    `shardings`.

    Parameters that are cast to the compute dtype before use are all-gathered in it.
    """

    def one(path: Any, x: Any, sharding: NamedSharding) -> Any:
        spec = sharding.spec[len(sharding.spec) - x.ndim :]
        sharded = [axis for axis, entry in enumerate(spec) if axis_names(entry) & set(over)]
        if not sharded:
            return x
        narrow = path[-1].key in CAST and jnp.dtype(compute).itemsize < x.dtype.itemsize
        sent = jnp.dtype(compute) if narrow else x.dtype

        def gather(x: Any) -> Any:
            for axis in sharded:
                x = all_gather(x, spec[axis], axis, sent, jnp.dtype(reduce_dtype))
            return x

        if mesh.shape["tensor"] == 1:
            return gather(x)
        # Without this constraint XLA all-gathers along `tensor` too.
        kept = PartitionSpec(*(a if a == "tensor" else None for a in spec))
        return jax.shard_map(gather, in_specs=kept, out_specs=kept, axis_names={"tensor"}, check_vma=False)(x)

    return jax.tree_util.tree_map_with_path(one, tree, shardings)


def exchange_parts(names: tuple[str, ...], function: Callable[[Any], Any], index: Any) -> Any:
    """Runs a function of the indices of all devices along mesh axes; see `Collectives.exchange`."""
    parts = function(jax.lax.all_gather(index, names))
    return jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=parts.ndim - 1, tiled=True)[0]
