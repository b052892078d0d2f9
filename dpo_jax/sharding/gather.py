"""Parameters all-gathered over devices just before use, and embeddings exchanged in place of their table."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.sharding.mesh import SHARDS, axis_names

# Parameters that are cast to the compute dtype before use; norms, biases and rewards compute in float32.
CAST = ("kernel", "lora_a", "lora_b", "embedding", "positions", "head")


def gather_params(mesh: jax.sharding.Mesh, reduce_dtype: str, tree: Any, shardings: Any, compute: str) -> Any:
    """Returns parameters all-gathered along fsdp (and sequence, where rows are split); one layer has one axis less than
    its stack in `shardings`.

    Parameters that are cast to the compute dtype before use are all-gathered in it.
    """

    def one(path: Any, x: Any, sharding: NamedSharding) -> Any:
        spec = sharding.spec[len(sharding.spec) - x.ndim :]
        axis = next((i for i, entry in enumerate(spec) if axis_names(entry) & set(SHARDS)), None)
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


def exchange_parts(names: tuple[str, ...], function: Callable[[Any], Any], index: Any) -> Any:
    """Runs a function of the indices of all devices along mesh axes; see `Collectives.exchange`."""
    parts = function(jax.lax.all_gather(index, names))
    return jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=parts.ndim - 1, tiled=True)[0]
