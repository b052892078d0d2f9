"""Losses of a chosen and a rejected response, P = 2, which need no reference.

In formulas p_c and p_r are log pi(y | x) of the two, summed over tokens, L_c and L_r their lengths in tokens, and
m_c = p_c / L_c, m_r = p_r / L_r.
"""

import jax.numpy as jnp
from jax.nn import relu

from dpo_jax.losses.parts import logistic, margin, pair, per_token, power, require
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


def summed_rewards(lp: Logps, *, beta: float = 1.0, **_: float) -> Array:
    """Returns beta p, float32[B, P]."""
    return beta * lp.policy.astype(jnp.float32)


def mean_rewards(lp: Logps, *, beta: float, **_: float) -> Array:
    """Returns beta m, float32[B, P]."""
    return beta * per_token(lp.policy, lp)


def bent_rewards(lp: Logps, *, beta: float, alpha: float, **_: float) -> Array:
    """Returns the rewards of alphapo, float32[B, P]."""
    return beta * power(per_token(lp.policy, lp), -alpha)


def likelihood_rewards(lp: Logps) -> Array:
    """Returns e^m, float32[B, P], the inverse perplexity of each response."""
    return jnp.exp(per_token(lp.policy, lp))


def log_odds(means: Array) -> Array:
    """Returns log(e^m / (1 - e^m)) of means over tokens, finite too for a certain response or one without tokens."""
    certain = jnp.minimum(means, -1e-7)
    return certain - jnp.log(-jnp.expm1(certain))


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=mean_rewards)
def simpo(lp: Logps, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> Array:
    """Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6).

        loss = -log sigmoid(beta (m_c - m_r) - gamma)

    Args:
      lp: log-probabilities of B pairs.
      beta: Scale of the rewards, which are means over tokens (the authors' 2).
      gamma: Target margin of rewards, not divided by beta (the authors' gamma / beta of 0.25; TRL's simpo_gamma).
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    return logistic(margin(mean_rewards(lp, beta=beta)) - gamma, label_smoothing)


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=bent_rewards)
def alphapo(
    lp: Logps, *, beta: float = 2.0, gamma: float = 0.5, alpha: float = 0.25, label_smoothing: float = 0.0
) -> Array:
    """SimPO with a bent reward (Gupta et al. 2025, arXiv 2501.03884).

        reward(m) = beta (1 - e^(-alpha m)) / alpha
        loss = -log sigmoid(reward(m_c) - reward(m_r) - gamma)

    At alpha = 0 it is simpo. The exponent is clipped at 80.

    Args:
      lp: log-probabilities of B pairs.
      beta: Scale of the rewards.
      gamma: Target margin of rewards.
      alpha: How much more a likelihood counts that is already low (TRL's cpo alpha).
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    return logistic(margin(bent_rewards(lp, beta=beta, alpha=alpha)) - gamma, label_smoothing)


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=summed_rewards)
def cpo(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 1.0) -> Array:
    """Contrastive preference optimization with its likelihood term (Xu et al. 2024, arXiv 2401.08417, eq. 3).

        loss = -log sigmoid(beta (p_c - p_r)) - w m_c

    Args:
      lp: log-probabilities of B pairs.
      beta: Scale of the rewards.
      label_smoothing: The assumed rate of flipped labels.
      nll_weight: w (TRL's cpo_alpha), of the chosen response's negative log-likelihood a token.

    Returns:
      float32[B].
    """
    require("nll_weight", nll_weight, lambda w: w >= 0, "at least 0")
    nll = -per_token(lp.policy, lp)[:, 0]
    return logistic(margin(summed_rewards(lp, beta=beta)), label_smoothing) + nll_weight * nll


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=mean_rewards)
def orpo(lp: Logps, *, beta: float = 0.1) -> Array:
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eqs. 6 and 7).

        odds(m) = e^m / (1 - e^m)
        loss = -m_c - beta log sigmoid(log odds(m_c) - log odds(m_r))

    The rewards of its metrics are beta m, as in TRL; they order responses as their odds do.

    Args:
      lp: log-probabilities of B pairs.
      beta: The paper's lambda, weight of the odds ratio.

    Returns:
      float32[B].
    """
    means = per_token(lp.policy, lp)
    return -means[:, 0] + beta * logistic(margin(log_odds(means)))


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=summed_rewards)
def slic(lp: Logps, *, delta: float = 1.0, nll_weight: float = 0.1) -> Array:
    """Sequence likelihood calibration from human feedback (Zhao et al. 2023, arXiv 2305.10425).

        loss = max(0, delta - p_c + p_r) - lambda p_c

    with the chosen response as the one to stay close to.

    Args:
      lp: log-probabilities of B pairs.
      delta: Margin, in nats.
      nll_weight: The paper's lambda, of the chosen response's negative log-likelihood.

    Returns:
      float32[B].
    """
    require("nll_weight", nll_weight, lambda w: w >= 0, "at least 0")
    chosen, rejected = pair(lp.policy)
    return relu(delta - chosen + rejected) - nll_weight * chosen


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=likelihood_rewards)
def simper(lp: Logps) -> Array:
    """Simple alignment with perplexity, without a hyper-parameter (Xiao et al. 2025, arXiv 2502.00883).

        loss = -e^m_c + e^m_r

    e^-m is a response's perplexity, so that both terms are within 0 and 1.

    Args:
      lp: log-probabilities of B pairs.

    Returns:
      float32[B].
    """
    return -margin(likelihood_rewards(lp))


@register(responses=2, uses_reference=False, soft_labels=True, implicit_reward=mean_rewards)
def asft(lp: Logps, *, beta: float = 0.1) -> Array:
    """Aligned supervised fine-tuning, the likelihood of each alone (Wang et al. 2024, arXiv 2409.10571).

        odds(m) = e^m / (1 - e^m)
        loss = -m_c - beta [log sigmoid(log odds(m_c)) + log sigmoid(-log odds(m_r))]

    Since sigmoid(log odds(m)) = e^m, it is -(1 + beta) m_c - beta log(1 - e^m_r) (arXiv 2502.01237). The rewards of its
    metrics are beta m.

    Args:
      lp: log-probabilities of B pairs.
      beta: Weight of the two after the likelihood (orpo's default).

    Returns:
      float32[B].
    """
    means = per_token(lp.policy, lp)
    chosen, rejected = pair(log_odds(means))
    return -means[:, 0] + beta * (logistic(chosen) + logistic(-rejected))
