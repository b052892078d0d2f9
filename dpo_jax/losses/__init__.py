"""Every loss, by name.

A loss is a pure function `Logps, *, hyper-parameters -> float32[B]`, unreduced, written as its equation. Its
keyword-only parameters are its options in a config, and their help is its docstring. To add one, write the function in
one of these files under `@register`, and give it a row in tests/test_losses.py, which fails until it has one.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from dpo_jax.losses.registry import REGISTRY, Entry
from dpo_jax.records import Array, Logps, UserError

for _module in ("pairwise", "anchored", "batchwise", "unpaired", "ranked", "reference_free", "likelihood"):
    importlib.import_module(f"dpo_jax.losses.{_module}")

FUNCTIONS: dict[str, Callable] = {name: entry.function for name, entry in REGISTRY.items()}


class Loss(NamedTuple):
    """A loss with its hyper-parameters bound.

    Attributes:
      values: Logps -> float32[B], unreduced.
      metrics: Logps -> TRL's metric names to float32[B], the loss among them.
      responses: P, how many responses a comparison must have.
      uses_reference: whether `Logps.reference` must be filled in.
    """

    values: Callable[[Logps], Array]
    metrics: Callable[[Logps], dict[str, Array]]
    responses: int
    uses_reference: bool


def build(name: str, **hyper: Any) -> Loss:
    """Returns the named loss with its hyper-parameters bound.

    Raises:
      UserError: no such loss, or a hyper-parameter that it does not have.
    """
    if name not in REGISTRY:
        raise UserError(f"loss.name: unknown loss {name!r}; known: {', '.join(sorted(REGISTRY))}")
    entry: Entry = REGISTRY[name]
    try:
        inspect.signature(entry.function).bind(None, **hyper)
    except TypeError as e:
        raise UserError(f"loss {name}: {e}; its parameters: {inspect.signature(entry.function)}") from e
    values = functools.partial(entry.function, **hyper)
    beta = hyper.get("beta", 1.0)
    kind = reward_metrics if entry.uses_reference else likelihood_metrics
    return Loss(values, lambda lp: {"loss": values(lp)} | kind(lp, beta), entry.responses, entry.uses_reference)


def likelihood_metrics(lp: Logps, beta: float = 1.0) -> dict[str, Array]:
    """Returns the log-probs, float32[B], of the best response and (P > 1) of the worst; nats a token for the best."""
    del beta
    metrics = {"logps/chosen": lp.policy[:, 0], "nll": -lp.policy[:, 0] / jnp.maximum(lp.lengths[:, 0], 1.0)}
    return metrics | ({"logps/rejected": lp.policy[:, -1]} if lp.policy.shape[1] > 1 else {})


def reward_metrics(lp: Logps, beta: float) -> dict[str, Array]:
    """Returns TRL's reward metrics, float32[B], of the best response against the worst.

    A reward is beta * (log pi - log ref) (paper, eq. 5 without its partition function). A tie counts as half right,
    where TRL counts it as wrong, so that a policy equal to its reference scores 0.5 and not 0.
    """
    rewards = beta * (lp.policy - lp.reference)
    margin = rewards[:, 0] - rewards[:, -1]
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, -1],
        "rewards/accuracies": 0.5 * (jnp.sign(margin) + 1.0),
        "rewards/margins": margin,
        "logps/chosen": lp.policy[:, 0],
        "logps/rejected": lp.policy[:, -1],
    }
