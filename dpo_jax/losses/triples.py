"""Losses of a gold, a chosen and a rejected response, P = 3 in this order, which need no reference.

In formulas p and m = p / L are log pi(y | x), summed and per token; index g is the gold response.
"""

from dpo_jax.losses.parts import logistic, per_token, require
from dpo_jax.losses.reference_free import mean_rewards, summed_rewards
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


def _nll(lp: Logps, nll_weight: float) -> Array:
    """Returns the weighted negative log-likelihood a token of the gold response, float32[B]."""
    require("nll_weight", nll_weight, lambda w: w >= 0, "at least 0")
    return -nll_weight * per_token(lp.policy, lp)[:, 0]


@register(responses=3, uses_reference=False, implicit_reward=summed_rewards)
def tpo(lp: Logps, *, beta: float = 0.01, nll_weight: float = 1.0, label_smoothing: float = 0.0) -> Array:
    """Triple preference optimization (Saeidi et al. 2024, arXiv 2405.16681), TRL's TPO.

        loss = -log sigmoid(beta (p_c - p_r)) - w m_g

    Args:
      lp: log-probabilities of B triples.
      beta: Scale of the rewards (TRL's 0.01).
      nll_weight: w (TRL's tpo_alpha), of the gold response's negative log-likelihood a token.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    _, c, r = summed_rewards(lp, beta=beta).T
    return logistic(c - r, label_smoothing) + _nll(lp, nll_weight)


@register(responses=3, uses_reference=False, implicit_reward=mean_rewards)
def tpo_l(
    lp: Logps, *, beta: float = 2.0, gamma: float = 0.5, nll_weight: float = 1.0, label_smoothing: float = 0.0
) -> Array:
    """Length-normalized triple preference optimization (Saeidi et al. 2024, arXiv 2405.16681), TRL's tpo-l.

        loss = -log sigmoid(beta (m_c - m_r) - gamma) - w m_g

    Args:
      lp: log-probabilities of B triples.
      beta: Scale of the rewards, which are means over tokens, as in simpo.
      gamma: Target margin of rewards, not divided by beta (TRL's tpo_l_gamma).
      nll_weight: w (TRL's tpo_alpha), of the gold response's negative log-likelihood a token.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    _, c, r = mean_rewards(lp, beta=beta).T
    return logistic(c - r - gamma, label_smoothing) + _nll(lp, nll_weight)
