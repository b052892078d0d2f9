"""How devices share the tokens of a long row. Pure functions for the inside of a `shard_map`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class RowSplit(NamedTuple):
    """Devices that share the tokens of every row, for use inside the functions of `sharding.Collectives`.

    A row is 2 * parts blocks, and device i has blocks i and 2 * parts - 1 - i: the queries of every device then see
    equally many keys of a causal row. Every device has the ids of the whole row, which are small.

    Attributes:
      axis: the mesh axis along which the devices are.
      parts: how many they are.
      head_axis: the mesh axis that shards heads.
      heads: devices along it.
    """

    axis: str
    parts: int
    head_axis: str
    heads: int

    def own(self, x: jax.Array) -> jax.Array:
        """Returns the entries [R, T / parts] of this device's tokens, from those of the whole row [R, T]."""
        device = jax.lax.axis_index(self.axis)
        return self._blocks(x, jnp.stack([device, 2 * self.parts - 1 - device]))

    def in_order(self, x: jax.Array) -> jax.Array:
        """Returns the entries [R, T] of the whole row in the order of `gather`: device after device."""
        return self._blocks(x, jnp.array([b for i in range(self.parts) for b in (i, 2 * self.parts - 1 - i)]))

    def _blocks(self, x: jax.Array, which: jax.Array) -> jax.Array:
        return jnp.take(x.reshape(len(x), 2 * self.parts, -1), which, axis=1).reshape(len(x), -1)

    def gather(self, x: jax.Array) -> jax.Array:
        """Returns keys or values of the whole row [R, T, K, d], all-gathered from those of each device's tokens.

        Its gradient is reduce-scattered.
        """
        gather = partial(jax.lax.all_gather, axis_name=self.axis, axis=1, tiled=True)
        if self.heads == 1 or x.shape[2] % self.heads:
            return gather(x)
        kept = PartitionSpec(None, None, self.head_axis)  # without it XLA would all-gather the heads too
        return jax.shard_map(gather, in_specs=kept, out_specs=kept, axis_names={self.head_axis}, check_vma=False)(x)

    def locate(self, places: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        """Returns whether places in a row of `length` tokens are this device's, and where they are among its own."""
        size = length // (2 * self.parts)
        block, rest = places // size, places % size
        device = jnp.minimum(block, 2 * self.parts - 1 - block)
        return device == jax.lax.axis_index(self.axis), rest + size * (block >= self.parts)

    def sum(self, tree: Any) -> Any:
        """Returns sums over the tokens of the whole row, from those over each device's tokens."""
        return _sum_of_parts(tree, self.axis)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_of_parts(tree: Any, axis: str) -> Any:
    """psum whose gradient is the identity: all devices compute the same loss, which must not count once for each."""
    return jax.lax.psum(tree, axis)


_sum_of_parts.defvjp(lambda tree, axis: (_sum_of_parts(tree, axis), None), lambda axis, _, slopes: (slopes,))
