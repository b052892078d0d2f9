"""The loss of a reward model, P = 2; in formulas r_c and r_r are its rewards of chosen and rejected response."""

from dpo_jax.losses.parts import check, logistic, margin, pair
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


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
    check("center", center, lambda c: c >= 0, "at least 0")
    chosen, rejected = pair(lp.policy)
    return logistic(margin(lp.policy), label_smoothing) + center * (chosen + rejected) ** 2
