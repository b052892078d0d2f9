"""Plain values -> optax: the optimisers by name, the paper's warm-up, and clipping as torch does it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from dpo_jax.errors import UserError
from dpo_jax.records import Array


def linear_warmup(learning_rate: float, steps: int) -> Callable[[Array], Array]:
    """Returns a schedule: linear to `learning_rate` over `steps` updates, then constant (paper, appendix B).

    Update t, from 0, has learning_rate * min(1, (t + 1) / (steps + 1)), as the original code.
    """
    return lambda count: learning_rate * jnp.minimum(1.0, (count + 1) / (steps + 1))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns gradient clipping by global norm as `torch.nn.utils.clip_grad_norm_`: g * min(1, max / (norm + 1e-6))."""

    def clipped(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clipped)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {}


def register_optimizer(
    function: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformation]:
    """Files an optimiser under its function's name; its keyword-only parameters are its options in a config."""
    OPTIMIZERS[function.__name__] = function
    return function


@register_optimizer
def rmsprop(
    *,
    learning_rate: float = 1e-6,
    warmup_steps: int = 150,
    max_grad_norm: float = 10.0,
    decay: float = 0.99,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """RMSprop as torch's, the paper's optimiser (appendix B).

    Args:
      learning_rate: The rate after the warm-up.
      warmup_steps: Updates over which the rate rises linearly.
      max_grad_norm: Gradients are clipped to this global norm.
      decay: Of the running mean of squared gradients (torch's alpha).
      eps: Added to the root of that mean.
    """
    # optax's defaults differ from torch's in all three: the root takes eps in, decay is 0.9, steps are rescaled.
    scale = optax.rmsprop(
        linear_warmup(learning_rate, warmup_steps), decay=decay, eps=eps, eps_in_sqrt=False, initial_scale=0.0
    )
    return optax.chain(clip_by_global_norm(max_grad_norm), scale)


@register_optimizer
def adamw(
    *,
    learning_rate: float = 1e-6,
    warmup_steps: int = 150,
    max_grad_norm: float = 10.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017), as torch's and optax's.

    Args:
      learning_rate: The rate after the warm-up.
      warmup_steps: Updates over which the rate rises linearly.
      max_grad_norm: Gradients are clipped to this global norm.
      b1: Decay of the running mean of gradients.
      b2: Decay of the running mean of squared gradients.
      eps: Added to the root of the latter.
      weight_decay: Pull of every parameter to 0, times the rate.
    """
    rate = linear_warmup(learning_rate, warmup_steps)
    return optax.chain(
        clip_by_global_norm(max_grad_norm), optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    )


def build(name: str, **options: float) -> optax.GradientTransformation:
    """Returns the named optimiser.

    Raises:
      UserError: no such optimiser, or a value that cannot train.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optim.name: unknown optimiser {name!r}; known: {', '.join(sorted(OPTIMIZERS))}")
    for key, value in options.items():
        # A traced value cannot be looked at; it was checked as a number before.
        if not isinstance(value, Tracer) and not 0 <= value < float("inf"):
            raise UserError(f"optim.{key}: {value} is not a finite number >= 0")
    return OPTIMIZERS[name](**options)
