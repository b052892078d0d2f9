"""Losses of a chosen and a rejected response, P = 2, each compared with a fixed point instead of the other.

Notation as in pairwise.py: c and r are log pi - log ref of the two.
"""

from jax.nn import log_sigmoid, sigmoid

from dpo_jax.losses.parts import log_ratios, pair, require
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


@register(responses=2, uses_reference=True, soft_labels=True)
def nca_pair(lp: Logps, *, beta: float = 0.1) -> Array:
    """Noise contrastive alignment of pairs (Chen et al. 2024, arXiv 2402.05369).

        loss = -log sigmoid(beta c) - 1/2 log sigmoid(-beta c) - 1/2 log sigmoid(-beta r)

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.

    Returns:
      float32[B].
    """
    c, r = pair(beta * log_ratios(lp))
    return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)


@register(responses=2, uses_reference=True, soft_labels=True)
def bco_pair(lp: Logps, *, beta: float = 0.1) -> Array:
    """Binary classifier optimization of pairs without its reward shift (Jung et al. 2024, arXiv 2404.04656), as TRL.

        loss = -log sigmoid(beta c) - log sigmoid(-beta r)

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.

    Returns:
      float32[B].
    """
    c, r = pair(beta * log_ratios(lp))
    return -log_sigmoid(c) - log_sigmoid(-r)


@register(responses=2, uses_reference=True, soft_labels=True)
def sppo_hard(lp: Logps, *, beta: float = 0.1) -> Array:
    """Self-play preference optimization with win rates of 1 and 0 (Wu et al. 2024, arXiv 2405.00675, eq. 4.7).

        loss = (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2

    Twice that of the authors' code, which halves the sum, as TRL: the same minimum, and `weight: 0.5` in a sum of
    losses. With a soft label p the gradient is that of (c - (2 p - 1) / (2 beta))^2 and its mirror, soft SPPO.
    Cal-DPO (arXiv 2412.14516) is dpo with beta 1 and this loss with weight 0.5.

    Args:
      lp: log-probabilities of B pairs.
      beta: The paper's 1 / eta; its authors' code recommends about 1e-3.

    Returns:
      float32[B].
    """
    require("beta", beta, lambda b: b > 0, "above 0")
    c, r = pair(log_ratios(lp))
    return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2


@register(responses=2, uses_reference=True, soft_labels=True)
def apo_zero(lp: Logps, *, beta: float = 0.1) -> Array:
    """Anchored preference optimization: chosen up, rejected down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7).

        loss = 1 - sigmoid(beta c) + sigmoid(beta r)

    For chosen responses that are better than the model's own.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.

    Returns:
      float32[B].
    """
    c, r = pair(beta * log_ratios(lp))
    return sigmoid(-c) + sigmoid(r)


@register(responses=2, uses_reference=True, soft_labels=True)
def apo_down(lp: Logps, *, beta: float = 0.1) -> Array:
    """Anchored preference optimization: both down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8).

        loss = sigmoid(beta c) + 1 - sigmoid(beta (c - r))

    For chosen responses that are worse than the model's own.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.

    Returns:
      float32[B].
    """
    c, r = pair(beta * log_ratios(lp))
    return sigmoid(c) + sigmoid(r - c)
