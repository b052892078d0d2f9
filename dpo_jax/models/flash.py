"""Attention over packed rows in O(T) memory on TPUs and GPUs (FlashAttention, arXiv 2205.14135), by kernels of our own.

No array has an entry for each pair of tokens, forward or backward. From the ids of the tokens each row gets lists of
the blocks of scores that have a visible pair; the kernels visit these blocks and mask inside of them, so that packing
and shared prompts are exact and cost nothing. Queries and keys may differ in number and place: the queries of a device
may be a part of the row.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import KeyValues, Queries, RowMask, Scoring
from dpo_jax.models.flash_blocks import (
    LARGEST,
    Backend,
    Blocks,
    Sides,
    lists_of,
    padded_ids,
    visible_blocks,
)
from dpo_jax.models.remat import ATTENTION, named
from dpo_jax.records import Array

PLATFORMS = ("tpu", "gpu")


class _Static(NamedTuple):
    scoring: Scoring
    platform: str | None
    interpret: bool


def flash_attention(
    q: Queries,
    k: KeyValues,
    v: KeyValues,
    mask: RowMask,
    scoring: Scoring,
    sinks: Array | None = None,
    *,
    platform: str | None = None,
    interpret: bool = False,
) -> Queries:
    """Returns what `packed_attention` does, for queries and keys in any order and number.

    A query that sees no key gets 0.

    Args:
      q: queries [R, T, H, d] in the compute dtype.
      k: keys [R, S, K, d]; H is a multiple of K.
      v: values [R, S, K, d].
      mask: which keys a query attends to; ids of the queries are int32[R, T], of the keys int32[R, S].
      scoring: scale and cap of the scores.
      sinks: as in `packed_attention`.
      platform: "tpu" or "gpu"; by default, that for which the program is compiled.
      interpret: runs the kernels of the platform (by default a TPU's) on a CPU, slowly.

    Returns:
      The output [R, T, H, d] in the dtype of q.
    """
    static = _Static(scoring, platform or (PLATFORMS[0] if interpret else None), interpret)
    return _flash(q, k, v, sinks, mask, static)


def _backend(platform: str) -> Backend:
    """Returns the kernels of a platform, imported late: Pallas is slow to import."""
    if platform == "tpu":
        from dpo_jax.models.flash_tpu import TPU

        return TPU
    from dpo_jax.models.flash_gpu import GPU

    return GPU


def _on_platform(function: Any, static: _Static, *args: Any) -> Any:
    """Returns function(kernels, *args) for the platform, which may be known only when the program is compiled."""
    if static.platform:
        return function(_backend(static.platform), *args)
    tpu, cuda = (partial(function, _backend(name)) for name in PLATFORMS)
    return jax.lax.platform_dependent(*args, tpu=tpu, cuda=cuda)


def _pad(x: Array, block: int, axis: int = 1, value: float = 0.0) -> Array:
    return jnp.pad(x, [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value)


def _prepare(blocks: Blocks, q: Array, k: Array, v: Array, mask: RowMask) -> tuple[Sides, Array]:
    """Returns the padded inputs, and which blocks to visit: bool[R, n, m]. Padding sees nothing and is not seen."""
    queries = padded_ids(mask.queries, blocks.queries, -1)
    keys = padded_ids(mask.keys, blocks.keys, LARGEST)
    width = None if mask.window is None else jnp.reshape(mask.window, (1,)).astype(jnp.int32)
    sides = Sides(_pad(q, blocks.queries), _pad(k, blocks.keys), _pad(v, blocks.keys), queries, keys, width)
    return sides, visible_blocks(queries, keys, mask.window, blocks)


def _forward(static: _Static, backend: Backend, q: Array, k: Array, v: Array, mask: RowMask) -> tuple[Array, Array]:
    blocks = backend.blocks(q, k)
    sides, visible = _prepare(blocks, q, k, v, mask)
    out, lse = backend.forward(sides, lists_of(visible), static.scoring, blocks, static.interpret)
    return out[:, : q.shape[1]], lse[..., : q.shape[1]]


def _backward(
    static: _Static, backend: Backend, q: Array, k: Array, v: Array, mask: RowMask, *more: Array
) -> tuple[Array, Array, Array]:
    blocks = backend.blocks(q, k)
    sides, visible = _prepare(blocks, q, k, v, mask)
    by_query, by_key = lists_of(visible), lists_of(visible.swapaxes(1, 2))
    padded = [_pad(x, blocks.queries, axis) for x, axis in zip(more, (1, 2, 2), strict=True)]
    dq, dk, dv = backend.backward(sides, by_query, by_key, padded, static.scoring, blocks, static.interpret)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, sinks, mask, static):
    return _flash_fwd(q, k, v, sinks, mask, static)[0]


def _flash_fwd(q, k, v, sinks, mask, static):
    out, lse = _on_platform(partial(_forward, static), static, q, k, v, mask)
    if sinks is not None:
        # One more key per head, of value 0: it takes its share of the weights from the output.
        with_sink = jnp.logaddexp(lse, sinks[:, None])
        out = (out * jnp.exp(lse - with_sink).swapaxes(1, 2)[..., None]).astype(out.dtype)
        lse = with_sink
    # Named so that a remat policy can keep these two arrays; the backward pass then never reruns this function.
    out, lse = named(out, ATTENTION), named(lse, ATTENTION)
    return out, (q, k, v, sinks, mask, out, lse)


def _flash_bwd(static, residuals, g):
    q, k, v, sinks, mask, out, lse = residuals
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    dq, dk, dv = _on_platform(partial(_backward, static), static, q, k, v, mask, g, lse, delta)
    d_sinks = None if sinks is None else -(jnp.exp(sinks[:, None] - lse) * delta).sum((0, 2))
    return dq, dk, dv, d_sinks, None


_flash.defvjp(_flash_fwd, _flash_bwd)
