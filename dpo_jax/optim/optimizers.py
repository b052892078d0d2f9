"""The paper's optimizer, AdamW, and gradient clipping as in torch."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.errors import UserError
from dpo_jax.optim.schedules import Schedule

OPTIMIZERS: dict[str, Callable[..., Any]] = {}
UNDECAYED = ("bias", "scale", "expert_scale")  # parameters of norms, biases, and factors that begin at 1
UNTRAINED = ("correction", "constant")  # of a router, by which experts are chosen; of a layer, by which it ends


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns gradient clipping by global norm: g * min(1, max_norm / (norm + 1e-6)), as `clip_grad_norm_` of torch."""

    def clip(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clip)


def register_optimizer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `(learning rate by update, *, option=default, ...) -> optax transformation` under its name.

    Raises:
      UserError: another signature; the rate, its schedule and clipping are options of every optimizer.
    """
    kinds = [p.kind is not p.KEYWORD_ONLY for p in inspect.signature(function).parameters.values()]
    if not kinds or not kinds[0] or any(kinds[1:]):
        raise UserError(f"optimizer {function.__name__}: define it as (rate, *, option=default, ...)")
    OPTIMIZERS[function.__name__] = function
    return function


def clipped(*, max_grad_norm: float = 10.0) -> optax.GradientTransformation:
    """Returns the clipping that comes before every optimizer.

    Args:
      max_grad_norm: Gradients are clipped to this global norm.
    """
    return clip_by_global_norm(max_grad_norm)


@register_optimizer
def rmsprop(rate: Schedule, *, decay: float = 0.99, eps: float = 1e-8) -> optax.GradientTransformation:
    """RMSprop as in torch, the paper's optimizer (appendix B).

    Args:
      rate: learning rate by update.
      decay: Decay of the running mean of squared gradients (alpha in torch).
      eps: Added to the root of that mean.
    """
    # As in torch: eps is added to the root, and the mean of squares starts at 0. optax's defaults differ.
    return optax.rmsprop(rate, decay=decay, eps=eps, eps_in_sqrt=False, initial_scale=0.0)


@register_optimizer
def adamw(
    rate: Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017), as in torch and optax.

    Args:
      rate: learning rate by update.
      b1: Decay of the running mean of gradients.
      b2: Decay of the running mean of squared gradients.
      eps: Added to the root of the latter.
      weight_decay: Decay towards 0, times the learning rate, of all parameters but norms and biases.
    """
    # The parts of optax.adamw; its own mask would change the state, and so the checkpoints.
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps), decay(weight_decay), optax.scale_by_learning_rate(rate)
    )


def decay(weight_decay: float) -> optax.GradientTransformation:
    """Returns weight decay of the parameters that `decayed` names."""

    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, on: u + weight_decay * p if on else u, updates, params, decayed(params))

    return optax.stateless(add)


def decayed(params: Any) -> Any:
    """Returns which parameters weight decay applies to: all but those of norms, and biases (as in transformers)."""
    name = jax.tree_util.keystr
    return jax.tree_util.tree_map_with_path(lambda path, _: name(path[-1:], simple=True) not in UNDECAYED, params)


def without_untrained(updates: Any) -> Any:
    """Returns updates that are 0 for the parameters in `UNTRAINED`, whatever the optimizer makes of a gradient of 0."""
    name = jax.tree_util.keystr

    def one(path: Any, update: Any) -> Any:
        return jnp.zeros_like(update) if name(path[-1:], simple=True) in UNTRAINED else update

    return jax.tree_util.tree_map_with_path(one, updates)
