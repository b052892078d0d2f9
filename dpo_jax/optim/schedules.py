"""Learning rates: a warm-up, then a schedule by name, through optax."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax

from dpo_jax.errors import UserError
from dpo_jax.records import Array

Schedule = Callable[[Array], Array]
Name = Literal["constant", "linear", "cosine", "cosine_with_min", "wsd", "inverse_sqrt"]
FIXED = ("warmup_ratio", "decay_ratio")  # options that must not be traced
WARMUP = 150  # updates, as in the paper
# Updates of the warm-up and after it, lowest share of the peak, share of updates that decay -> share of the peak.
SCHEDULES: dict[str, Callable[[int, int, float, float], Schedule]] = {
    "constant": lambda warmup, steps, least, decay: optax.constant_schedule(1.0),
    "linear": lambda warmup, steps, least, decay: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda warmup, steps, least, decay: optax.cosine_decay_schedule(1.0, steps),
    "cosine_with_min": lambda warmup, steps, least, decay: optax.cosine_decay_schedule(1.0, steps, alpha=least),
    "inverse_sqrt": lambda warmup, steps, least, decay: lambda count: (1 + count / max(warmup, 1)) ** -0.5,
    "wsd": lambda warmup, steps, least, decay: optax.linear_schedule(
        1.0, least, math.ceil(decay * steps), transition_begin=steps - math.ceil(decay * steps)
    ),
}


def learning_rates(
    *,
    learning_rate: float = 1e-6,
    schedule: Name = "constant",
    warmup_steps: int = -1,
    warmup_ratio: float = -1.0,
    min_ratio: float = 0.1,
    decay_ratio: float = 0.1,
    total_steps: int = 0,
) -> Schedule:
    """Returns the learning rate of every update, counted from 0.

    Update t of the warm-up has learning_rate * (t + 1) / (warmup_steps + 1), as in the original code (appendix B of the
    paper); t later updates have schedule(t) * learning_rate.

    Args:
      learning_rate: Learning rate after the warm-up, the largest one.
      schedule: What follows the warm-up: constant (the paper's), linear to 0, cosine to 0, cosine_with_min to
        min_ratio, wsd: constant, then linear to min_ratio in the last decay_ratio of the updates, or inverse_sqrt:
        the square root of warmup_steps over the updates.
      warmup_steps: Updates over which the learning rate rises linearly; by default 150, but at most a tenth of the run.
      warmup_ratio: The same as a share of the run.
      min_ratio: Last learning rate of cosine_with_min and wsd, as a share of the largest.
      decay_ratio: Share of the updates after the warm-up in which wsd decays.
      total_steps: Updates after which the schedule ends; by default those of the run.

    Raises:
      UserError: values that do not fit together, or a schedule without `total_steps`.
    """
    warmup = warmup_updates(schedule, warmup_steps, warmup_ratio, total_steps)
    if not 0 <= decay_ratio <= 1:
        raise UserError(f"optim.decay_ratio: {decay_ratio} is no share of the updates; set a number from 0 to 1")
    share = SCHEDULES[schedule](warmup, max(total_steps - warmup, 1), min_ratio, decay_ratio)

    def rate(count: Array) -> Array:
        rising = jnp.minimum(1.0, (count + 1) / (warmup + 1))
        return learning_rate * rising * share(jnp.maximum(count - warmup, 0))

    return rate


def warmup_updates(schedule: str, steps: int, ratio: float, total: int) -> int:
    """Returns the updates of the warm-up. Arguments and errors are those of `learning_rates`."""
    if schedule not in SCHEDULES:
        raise UserError(f"optim.schedule: {schedule!r} is none; known: {', '.join(SCHEDULES)}")
    if total <= 0 and (schedule != "constant" or ratio >= 0):
        key = "schedule" if schedule != "constant" else "warmup_ratio"
        raise UserError(f"optim.{key}: needs the number of updates; set optim.total_steps")
    if steps >= 0 and ratio >= 0:
        raise UserError("optim: warmup_steps and warmup_ratio are both set; remove one")
    if ratio > 1:
        raise UserError(f"optim.warmup_ratio: {ratio} is more than the whole run; set a number from 0 to 1")
    if ratio >= 0:
        return math.ceil(ratio * total)
    if steps >= 0:
        return steps
    return min(WARMUP, total // 10) if total else WARMUP


def unfinished_warmup(
    steps: int,
    *,
    learning_rate: float = 1e-6,
    schedule: str = "constant",
    warmup_steps: int = -1,
    warmup_ratio: float = -1.0,
    total_steps: int = 0,
    **_: Any,
) -> str:
    """Returns a warning if a run of `steps` updates ends before its warm-up; else "". Options: `learning_rates`."""
    warmup = warmup_updates(schedule, warmup_steps, warmup_ratio, total_steps)
    if steps > warmup:
        return ""
    return (
        f"the warm-up takes {warmup} updates (optim.warmup_steps) and the run has {steps}, so that the learning rate "
        f"ends at {learning_rate * steps / (warmup + 1):.2g} instead of {learning_rate:.2g}; set fewer, or none for a "
        "tenth of the run"
    )
