"""Losses of a chosen and a rejected response, P = 2."""

from jax.nn import log_sigmoid

from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


def margin(scores: Array) -> Array:
    """Returns chosen minus rejected, float[B, 2] -> float[B]; any other P is an error."""
    chosen, rejected = scores.T
    return chosen - rejected


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def dpo(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7); with smoothing, conservative DPO.

        z = beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]
        loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      label_smoothing: eps, the assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    z = beta * margin(lp.policy - lp.reference)
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)
