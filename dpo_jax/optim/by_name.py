"""Optimizers of a config by name, with learning rates by update."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.core import Tracer
from optax import contrib

from dpo_jax.errors import UserError, closest
from dpo_jax.named import import_function
from dpo_jax.optim.more import OPTAX, from_optax
from dpo_jax.optim.optimizers import OPTIMIZERS, clipped
from dpo_jax.optim.schedules import Schedule, learning_rates, unfinished_warmup

IN_MEMORY = "in_memory"  # the name of an optax object that was given in Python
COMMON = (learning_rates, clipped)  # whose options every optimizer has, but one's own


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


def build(name: str, **options: Any) -> Optimizer:
    """Returns the optimizer of a config: a registered name, one of optax, or `module:function`.

    Args:
      name: the optimizer.
      **options: its keyword arguments, and those of `COMMON`; floats may be traced, but for shares of updates.

    Raises:
      UserError: an unknown name, a value out of range, or a function that returns no optax transformation.
    """
    function = optimizer_function(name)
    if _is_own(name):
        made = function(**options)
        if not (hasattr(made, "init") and hasattr(made, "update")):
            raise UserError(f"optim.name: {name} returns a {type(made).__name__}; return an optax transformation")
        return Optimizer.of(made, getattr(made, "learning_rate", None))
    for key, value in options.items():  # traced values were checked before tracing
        unset = key in ("warmup_steps", "warmup_ratio") and value == -1
        if not isinstance(value, Tracer | str) and not (0 <= value < float("inf") or unset):
            raise UserError(f"optim.{key}: {value} is not a finite number >= 0; change it")
    rate, clipping = learning_rates(**_of(learning_rates, options)), clipped(**_of(clipped, options))
    rest = {key: value for key, value in options.items() if not any(key in _of(c, options) for c in COMMON)}
    return Optimizer.of(optax.chain(clipping, function(rate, **rest)), rate)


def _of(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those options that are keyword-only parameters of a function."""
    kinds = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return {key: value for key, value in options.items() if key in kinds}


def optimizer_options(name: str, key: str = "optim.name") -> list[Callable[..., Any]]:
    """Returns the functions whose keyword-only parameters are the options of a named optimizer."""
    function = optimizer_function(name, key)
    return [function] if _is_own(name) else [*COMMON, function]


def with_total_steps(section: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Returns a config's section with the updates of the run, which schedules need, unless it sets them itself."""
    known = [p for f in optimizer_options(section["name"]) for p in _of(f, {"total_steps": 0})]
    return {**section, **({"total_steps": steps} if known and not section.get("total_steps") else {})}


def warmup_note(section: Mapping[str, Any], steps: int) -> str:
    """Returns a warning if the learning rate of a run of so many updates never reaches its peak; else ""."""
    return "" if _is_own(section["name"]) else unfinished_warmup(steps, **section)


def _is_own(name: str) -> bool:
    return ":" in name or name == IN_MEMORY


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
    """Returns the function of a registered optimizer, makes one of optax's, or imports `module:function`.

    Raises:
      UserError: an unknown name, or a module that cannot be imported.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if ":" in name:
        return _with_options(import_function(name, key), f"{key}: {name}")
    if name == IN_MEMORY:
        return _given_in_python
    if name not in OPTAX:
        there = hasattr(optax, name) or hasattr(contrib, name)
        why = f"{name} of optax needs more than gradients, or options that no config expresses" if there else ""
        hint = why or f"unknown optimizer {name!r}; {closest(name, [*OPTIMIZERS, *OPTAX])}"
        raise UserError(f"{key}: {hint}{'; ' if there else ', or '}give module:function")
    return from_optax(name)
