"""Likelihood alone: supervised fine-tuning, P = 1, and unlikelihood, P = 2."""

from typing import Literal

import jax.numpy as jnp

from dpo_jax.losses.parts import logistic, margin, pair, per_token, require
from dpo_jax.losses.reference_free import summed_rewards
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


@register(responses=1, uses_reference=False)
def sft(lp: Logps, *, reduction: Literal["sum", "mean"] = "sum") -> Array:
    """Supervised fine-tuning; on chosen responses Preferred-FT (Rafailov et al. 2023, arXiv 2305.18290, section 6).

        loss = -sum_t log pi(y_t | x, y_<t), or that over the number of tokens

    Of several responses, as a term beside another loss, it takes the first, the chosen one.

    Args:
      lp: log-probabilities of B comparisons.
      reduction: Over a response's tokens: sum, as the original code, or mean.

    Returns:
      float32[B].
    """
    return -(lp.policy.astype(jnp.float32) if reduction == "sum" else per_token(lp.policy, lp))[:, 0]


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=summed_rewards)
def unlikelihood(lp: Logps, *, alpha: float = 0.5) -> Array:
    """Unlikelihood, a baseline of the DPO paper (Rafailov et al. 2023, arXiv 2305.18290, appendix C.3).

        loss = -log pi(y_c | x) + alpha log pi(y_r | x)

    It has no least value: the rejected response may become ever less likely.

    Args:
      lp: log-probabilities of B pairs.
      alpha: Weight of the rejected response, within 0 and 1 (the paper: 0.05 to 1).

    Returns:
      float32[B].
    """
    require("alpha", alpha, lambda a: 0 <= a <= 1, "within 0 and 1")
    chosen, rejected = pair(lp.policy)
    return alpha * rejected - chosen


@register(responses=2, uses_reference=False, soft_labels=True, rewards=True)
def bradley_terry(lp: Logps, *, label_smoothing: float = 0.0, center: float = 0.0) -> Array:
    """Likelihood of a Bradley-Terry reward model (Rafailov et al. 2023, arXiv 2305.18290, eq. 2).

        loss = -log sigmoid(r_c - r_r) + lambda (r_c + r_r)^2

    It trains a reward model, which is no language model: `Logps.policy` holds its rewards.

    Args:
      lp: rewards of B pairs.
      label_smoothing: The assumed rate of flipped labels.
      center: lambda, which keeps rewards around 0 (TRL's center_rewards_coefficient; its authors' 0.01).

    Returns:
      float32[B].
    """
    require("center", center, lambda c: c >= 0, "at least 0")
    chosen, rejected = pair(lp.policy)
    return logistic(margin(lp.policy), label_smoothing) + center * (chosen + rejected) ** 2
