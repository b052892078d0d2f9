"""What the backward pass saves from the forward pass, by name; it recomputes everything else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Outputs of projections; inputs of layers, of projections and of norms; outputs and log-sum-exps of attention.
PROJECTION, ACTIVATION, ATTENTION = "projection", "activation", "attention"


def named(x: jax.Array, name: str) -> jax.Array:
    """Returns x under a name by which remat policies save it, inside a function that has its own derivative."""
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    # XLA slices no bfloat16 on a CPU: it would convert what all layers have saved to float32, at once.
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def saved(x: jax.Array, name: str) -> jax.Array:
    """Returns x under a name by which remat policies save it, and with its gradient."""
    return named(x, name)


saved.defvjp(lambda x, name: (named(x, name), None), lambda name, _, g: (g,))
_NAMED = jax.checkpoint_policies.save_only_these_names(ATTENTION)


def keeps_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """Remat policy: saves what the backward pass of attention needs, so that its forward pass is not run again."""
    # cuDNN's log-sum-exp is not visible here and cannot be named, so its forward call is recognized by primitive.
    return primitive.name == "dot_product_attention_fwd_wrapper" or bool(_NAMED(primitive, *_, **params))


def _and_attention(*names: str) -> Callable[..., bool]:
    by_name = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_from_both_policies(by_name, keeps_attention)


# `model.remat` -> what is saved of a layer. Parameters that were all-gathered never are: they would add up to the
# whole model on every device.
POLICIES: dict[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _and_attention(PROJECTION),
    "none": _and_attention(PROJECTION, ACTIVATION),
}
