"""Attention over packed rows by the kernels of libraries, for devices that have one.

Each takes and returns what `packed_attention` does. What a query sees goes in as a mask, so that packing, responses
that share a prompt, and windows are the rule of `seen_keys`, which is written once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import RowMask, Scoring, visible_keys
from dpo_jax.records import Array

Attend = Callable[[Array, Array, Array, RowMask, Scoring], Array]  # as `packed_attention`
CHUNKS = "chunks"  # the name of `packed_attention`, which every device has
BLOCK = 128  # queries, and keys, that a kernel takes at a time: splash's own choice
_NAMED = jax.checkpoint_policies.save_only_these_names("attention")


def keeps_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of what the backward pass keeps: all that attention needs to do no work of the forward pass again."""
    # What cuDNN's forward pass returns cannot be named, since its log-sum-exp is not seen from here.
    return primitive.name == "dot_product_attention_fwd_wrapper" or bool(_NAMED(primitive, *_, **params))


class Kernel(NamedTuple):
    """A kernel.

    Attributes:
      platform: JAX's name of the devices that run it.
      attend: as `packed_attention`.
      dtypes: that it takes.
      note: what its users must know.
    """

    platform: str
    attend: Attend
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    note: str = ""


def splash(q: Array, k: Array, v: Array, rows: RowMask, scoring: Scoring, *, interpret: bool = False) -> Array:
    """Splash attention, which skips blocks of which nothing is seen; on processors with `interpret`, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # slow to import, needed where it is used

    def one(q: Array, k: Array, v: Array, seen: Array) -> Array:
        kernel = library.make_splash_mha(
            seen[None],  # the same for all heads
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=scoring.cap,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        # Made inside of a program it holds a flag as an array, of which it then asks whether it is true.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q * jnp.asarray(scoring.scale, q.dtype), k, v)

    def run(q: Array, k: Array, v: Array, rows: RowMask) -> Array:
        seen = visible_keys(rows, 0, q.shape[1])
        return jax.vmap(one)(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), seen).swapaxes(1, 2)

    return _in_blocks(run, q, k, v, rows)


def cudnn(q: Array, k: Array, v: Array, rows: RowMask, scoring: Scoring, *, implementation: Any = "cudnn") -> Array:
    """cuDNN's flash attention, which skips what is to the right of a query and masks the rest.

    Raises:
      NotImplementedError: scores are capped.
    """
    if scoring.cap is not None:
        raise NotImplementedError("cannot cap scores, which this model does")

    def run(q: Array, k: Array, v: Array, rows: RowMask) -> Array:
        seen = visible_keys(rows, 0, q.shape[1])[:, None]
        how: dict[str, Any] = {"mask": seen, "is_causal": True, "scale": scoring.scale}
        return jax.nn.dot_product_attention(q, k, v, **how, implementation=implementation)

    return _in_blocks(run, q, k, v, rows)


# XLA asks cuDNN for sums in a fixed order under this flag only.
_ORDER = "its gradients differ in the last bits each time, but with XLA_FLAGS=--xla_gpu_deterministic_ops=true"
KERNELS = {"cudnn": Kernel("gpu", cudnn, ("bfloat16",), _ORDER), "splash": Kernel("tpu", splash)}


def _in_blocks(
    run: Callable[[Array, Array, Array, RowMask], Array], q: Array, k: Array, v: Array, rows: RowMask
) -> Array:
    """Runs a kernel on rows of whole blocks, the last of them padded; the backward pass makes the mask again."""
    length = q.shape[1]
    pad = partial(jax.tree.map, lambda x: jnp.pad(x, ((0, 0), (0, -length % BLOCK)) + ((0, 0),) * (x.ndim - 2)))
    rows = pad(rows._replace(window=None))._replace(window=rows.window)
    kept: Any = jax.checkpoint(run, policy=keeps_attention, prevent_cse=False)
    return kept(pad(q), pad(k), pad(v), rows)[:, :length]
