"""Optimizers by name, as optax transformations; the paper's warm-up; gradient clipping as in torch."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from dpo_jax.errors import UserError, closest
from dpo_jax.named import import_function
from dpo_jax.records import Array

Schedule = Callable[[Array], Array]


class Optimizer(optax.GradientTransformation):
    """An optax transformation that knows its learning rate.

    Attributes:
      learning_rate: updates done -> the rate of the next one; None if unknown.
    """

    learning_rate: Schedule | None = None

    @classmethod
    def of(cls, tx: Any, learning_rate: Schedule | None) -> "Optimizer":
        """Returns an optax transformation with its schedule."""
        optimizer = cls(tx.init, tx.update)
        optimizer.learning_rate = learning_rate
        return optimizer


def linear_warmup(learning_rate: float, steps: int) -> Callable[[Array], Array]:
    """Returns a schedule: linear to `learning_rate` over `steps` updates, then constant (paper, appendix B).

    Update t, counted from 0, has learning_rate * min(1, (t + 1) / (steps + 1)), as in the original code.
    """
    return lambda count: learning_rate * jnp.minimum(1.0, (count + 1) / (steps + 1))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns gradient clipping by global norm: g * min(1, max_norm / (norm + 1e-6)), as `clip_grad_norm_` of torch."""

    def clipped(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clipped)


OPTIMIZERS: dict[str, Callable[..., Any]] = {}
IN_MEMORY = "in_memory"  # the name of an optax object that was given in Python


def register_optimizer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an optimizer under its function's name; its keyword-only parameters are its options in a config."""
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
) -> Optimizer:
    """RMSprop as in torch, the paper's optimizer (appendix B).

    Args:
      learning_rate: Learning rate after the warm-up.
      warmup_steps: Updates over which the learning rate rises linearly.
      max_grad_norm: Gradients are clipped to this global norm.
      decay: Decay of the running mean of squared gradients (alpha in torch).
      eps: Added to the root of that mean.
    """
    rate = linear_warmup(learning_rate, warmup_steps)
    # As in torch: eps is added to the root, and the mean of squares starts at 0. optax's defaults differ.
    scale = optax.rmsprop(rate, decay=decay, eps=eps, eps_in_sqrt=False, initial_scale=0.0)
    return Optimizer.of(optax.chain(clip_by_global_norm(max_grad_norm), scale), rate)


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
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2017), as in torch and optax.

    Args:
      learning_rate: Learning rate after the warm-up.
      warmup_steps: Updates over which the learning rate rises linearly.
      max_grad_norm: Gradients are clipped to this global norm.
      b1: Decay of the running mean of gradients.
      b2: Decay of the running mean of squared gradients.
      eps: Added to the root of the latter.
      weight_decay: Decay of every parameter towards 0, times the learning rate.
    """
    rate = linear_warmup(learning_rate, warmup_steps)
    scale = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return Optimizer.of(optax.chain(clip_by_global_norm(max_grad_norm), scale), rate)


def build(name: str, **options: Any) -> Optimizer:
    """Returns the optimizer of a config: a registered name, or `module:function` that returns an optax transformation.

    Args:
      name: the optimizer.
      **options: its keyword arguments; numbers may be traced.

    Raises:
      UserError: an unknown name, a value out of range, or a function that returns no optax transformation.
    """
    function = optimizer_function(name)
    for key, value in options.items():
        # Traced values were checked before tracing. A user's function may take negative numbers.
        if ":" not in name and not isinstance(value, Tracer) and not 0 <= value < float("inf"):
            raise UserError(f"optim.{key}: {value} is not a finite number >= 0; change it")
    made = function(**options)
    if not (hasattr(made, "init") and hasattr(made, "update")):
        raise UserError(f"optim.name: {name} returns a {type(made).__name__}; return an optax transformation")
    return Optimizer.of(made, getattr(made, "learning_rate", None))


STATELESS = optax.identity()  # for a state that is read and not trained on


def checked_transformation(tx: Any) -> optax.GradientTransformation:
    """Returns an optax transformation; refuses everything else, such as `optax.adamw` without its call."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise UserError(f"tx: {tx!r} is no optax transformation; give one, as in optax.adamw(1e-6)")
    return tx


def _with_options(function: Callable[..., Any], where: str) -> Callable[..., Any]:
    """Returns a user's function, all of whose arguments can be options."""
    for p in inspect.signature(function).parameters.values():
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty:
            raise UserError(
                f"{where} takes {p.name} by position; name a function of keyword-only options that calls it"
            )
    return function


def _given_in_python() -> Optimizer:
    """Stands for an optax object in a process that does not have it: other commands than `train` need none."""
    raise UserError("optim.name: an optax object was given in Python; give optimizer=... again, or name one")


def optimizer_function(name: str, key: str = "optim.name") -> Callable[..., Any]:
    """Returns the function of a registered optimizer, or imports `module:function`.

    Raises:
      UserError: an unknown name, or a module that cannot be imported.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if ":" in name:
        return _with_options(import_function(name, key), f"{key}: {name}")
    if name == IN_MEMORY:
        return _given_in_python
    raise UserError(f"{key}: unknown optimizer {name!r}; {closest(name, OPTIMIZERS)}, or give module:function")
