"""All-gather and sum-scatter, each the gradient of the other, in dtypes that are chosen."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def all_gather(x: Any, names: Any, axis: int, sent: Any, reduced: Any) -> Any:
    """Returns x all-gathered along mesh axes in the dtype `sent`, in its own dtype; gradients are summed in `reduced`.

    The dtype is x's own again so that the gradient, which has the dtype of the result, is not rounded. XLA leaves out
    the cast there and the user's cast back.
    """
    del reduced
    return _gathered(x, names, axis, sent)


def _gathered(x: Any, names: Any, axis: int, sent: Any) -> Any:
    return jax.lax.all_gather(x.astype(sent), names, axis=axis, tiled=True).astype(x.dtype)


def _all_gather_fwd(x, names, axis, sent, reduced):
    # Not by calling `all_gather`, whose call remat policies would see in place of the collective, and save.
    return _gathered(x, names, axis, sent), None


def _all_gather_bwd(names, axis, sent, reduced, _, g):
    part = jax.lax.psum_scatter(g.astype(reduced), names, scatter_dimension=axis, tiled=True)
    return (part.astype(g.dtype),)


all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sum_scatter(x: jax.Array, names: Any, dtype: Any) -> jax.Array:
    """Returns this device's part of axis 0 of the sum of all devices' x, float32, rounded to `dtype` once.

    Gradients are gathered in `dtype`.
    """
    return _scattered(x, names, dtype)


def _scattered(x: jax.Array, names: Any, dtype: Any) -> jax.Array:
    return jax.lax.psum_scatter(x, names, tiled=True).astype(dtype)


def _sum_scatter_bwd(names, dtype, _, g):
    return (jax.lax.all_gather(g, names, tiled=True).astype(jnp.float32),)


sum_scatter.defvjp(lambda x, names, dtype: (_scattered(x, names, dtype), None), _sum_scatter_bwd)
