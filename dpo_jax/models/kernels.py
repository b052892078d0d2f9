"""What a run may take in place of `packed_attention`: our own (`flash`, `blocks`), and kernels of libraries.

Each takes and returns what `packed_attention` does. Those of libraries get `visible_keys` as an explicit mask, an entry
for each pair of tokens; ours need none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import Attend, RowMask, Scoring, visible_keys
from dpo_jax.models.blocks import block_attention
from dpo_jax.models.flash import PLATFORMS, flash_attention
from dpo_jax.models.remat import ATTENTION, keeps_attention
from dpo_jax.records import Array

BLOCK = 128  # queries and keys per block: splash attention's default


class Kernel(NamedTuple):
    """Another implementation of attention.

    Attributes:
      platforms: JAX's names of the devices that run it.
      attend: the kernel, with the signature of `packed_attention`.
      auto: those on which `model.attention: auto` tries it.
      dtypes: supported compute dtypes.
      note: a remark for users, logged when the kernel is used; may be empty.
      pair_mask: whether it needs a mask with an entry for each pair of tokens, and so all tokens of a row on one device
        (`mesh.sequence` 1).
      sinks: whether it takes attention sinks. Splash's have one gradient for all heads.
    """

    platforms: tuple[str, ...]
    attend: Attend
    auto: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    note: str = ""
    pair_mask: bool = True
    sinks: bool = False


def splash(q: Array, k: Array, v: Array, mask: RowMask, scoring: Scoring, *, interpret: bool = False) -> Array:
    """Returns splash attention (TPU), which skips fully masked blocks; `interpret` runs it on a CPU, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # imported late: it is slow to import

    def one(q: Array, k: Array, v: Array, visible: Array) -> Array:
        kernel = library.make_splash_mha(
            visible[None],  # the same mask for all heads
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=scoring.cap,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        # Built inside a traced function, this flag is an array, and the library would branch on it in Python.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q * jnp.asarray(scoring.scale, q.dtype), k, v)

    def run(q: Array, k: Array, v: Array, mask: RowMask) -> Array:
        visible = visible_keys(mask)
        return jax.vmap(one)(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), visible).swapaxes(1, 2)

    return _run_on_blocks(run, q, k, v, mask)


def cudnn(q: Array, k: Array, v: Array, mask: RowMask, scoring: Scoring, *, implementation: Any = "cudnn") -> Array:
    """Returns cuDNN's flash attention, which skips keys after the query and masks the rest.

    Raises:
      NotImplementedError: the scores have a cap.
    """
    if scoring.cap is not None:
        raise NotImplementedError("cannot cap scores, which this model does")

    def run(q: Array, k: Array, v: Array, mask: RowMask) -> Array:
        visible = visible_keys(mask)[:, None]
        options: dict[str, Any] = {"mask": visible, "is_causal": True, "scale": scoring.scale}
        return jax.nn.dot_product_attention(q, k, v, **options, implementation=implementation)

    return _run_on_blocks(run, q, k, v, mask)


# Only under this flag does XLA ask cuDNN to sum in a fixed order.
_ORDER = "its gradients differ in the last bits each time, but with XLA_FLAGS=--xla_gpu_deterministic_ops=true"
# In the order in which `model.attention: auto` tries them.
KERNELS = {
    "flash": Kernel(PLATFORMS, flash_attention, PLATFORMS, pair_mask=False, sinks=True),
    "blocks": Kernel((*PLATFORMS, "cpu"), block_attention, PLATFORMS, pair_mask=False, sinks=True),
    "splash": Kernel(("tpu",), splash),
    "cudnn": Kernel(("gpu",), cudnn, dtypes=("bfloat16",), note=_ORDER),
}


def _run_on_blocks(
    run: Callable[[Array, Array, Array, RowMask], Array], q: Array, k: Array, v: Array, mask: RowMask
) -> Array:
    """Runs a kernel on rows padded to a multiple of `BLOCK`; the backward pass recomputes the mask."""
    length = q.shape[1]
    pad = partial(jax.tree.map, lambda x: jnp.pad(x, ((0, 0), (0, -length % BLOCK)) + ((0, 0),) * (x.ndim - 2)))
    segment_ids, branch_ids, positions = pad(mask.queries[1:])
    mask = RowMask.of(segment_ids, branch_ids, positions, mask.window)
    recomputed: Any = jax.checkpoint(run, policy=keeps_attention, prevent_cse=False)
    return recomputed(pad(q), pad(k), pad(v), mask)[:, :length]
