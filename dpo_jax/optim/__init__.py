"""Optimizers by name, as optax transformations with learning rates by update."""

from dpo_jax.optim.by_name import (
    COMMON,
    IN_MEMORY,
    OPTIMIZERS,
    STATELESS,
    Optimizer,
    build,
    checked_transformation,
    optimizer_function,
    optimizer_options,
    warmup_note,
    with_total_steps,
)
from dpo_jax.optim.more import OPTAX
from dpo_jax.optim.optimizers import register_optimizer, without_untrained
from dpo_jax.optim.schedules import FIXED, Schedule, learning_rates

__all__ = [
    "COMMON",
    "FIXED",
    "IN_MEMORY",
    "OPTAX",
    "OPTIMIZERS",
    "STATELESS",
    "Optimizer",
    "Schedule",
    "build",
    "checked_transformation",
    "learning_rates",
    "optimizer_function",
    "optimizer_options",
    "register_optimizer",
    "warmup_note",
    "with_total_steps",
    "without_untrained",
]
