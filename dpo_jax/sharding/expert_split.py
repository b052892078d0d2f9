"""How devices shard the experts of a mixture. Pure functions for the inside of a `shard_map`.

Axis letters: N tokens of all devices that shard the experts, n of them, D model width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.sharding.gather_scatter import all_gather, sum_scatter


class ExpertSplit(NamedTuple):
    """Devices that shard the experts of every layer, for use inside the functions of `sharding.Collectives`.

    Each has as many experts, in order, and rows of its own. Tokens are all-gathered, each device computes its experts'
    outputs for all of them, and the sums are reduce-scattered: n - 1 times N / n tokens of D numbers are sent in each
    direction, in the compute dtype and in float32, and as many in the backward pass. Shapes and traffic do not depend
    on the routing, so no token is dropped.

    Attributes:
      axis: the mesh axis along which the devices are.
      parts: how many they are.
    """

    axis: str
    parts: int

    def gather(self, x: jax.Array) -> jax.Array:
        """Returns the entries [N, ...] of all tokens, from those [N / n, ...] of this device's; sums gradients in
        float32."""
        if jnp.issubdtype(x.dtype, jnp.integer):  # has no gradient
            return jax.lax.all_gather(x, self.axis, tiled=True)
        return all_gather(x, self.axis, 0, x.dtype, jnp.dtype("float32"))

    def own(self, expert: jax.Array, count: int) -> jax.Array:
        """Returns which of this device's `count` experts those are, int32; `count` for an expert of another device."""
        place = expert - count * jax.lax.axis_index(self.axis)
        return jnp.where((place >= 0) & (place < count), place, count)

    def scatter(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns the entries [N / n, D] of this device's tokens in `dtype`, summed over the devices' float32[N, D]."""
        return sum_scatter(x, self.axis, jnp.dtype(dtype))
