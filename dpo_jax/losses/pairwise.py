"""Losses of a chosen and a rejected response, P = 2, which compare the policy with the reference.

In formulas c and r are log pi(y | x) - log ref(y | x) of the chosen and the rejected response, summed over tokens, and
L_c and L_r their lengths in tokens; of tokens with weights, means over tokens are divided by the sum of the weights
instead. Hyper-parameters with TRL's names have TRL's defaults unless stated otherwise.
"""

from typing import Literal

import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid

from dpo_jax.losses.parts import chi_squared_score, log_ratios, logistic, margin, pair, per_token, require
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def dpo(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); smoothed, conservative DPO.

        z = beta (c - r)
        loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      label_smoothing: eps, the assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    return logistic(beta * margin(log_ratios(lp)), label_smoothing)


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def sigmoid_norm(lp: Logps, *, beta: float = 5.0, label_smoothing: float = 0.0) -> Array:
    """Length-normalized DPO (Lambert et al. 2024, arXiv 2411.15124, section 5), TRL's sigmoid_norm.

        loss = -log sigmoid(beta (c / L_c - r / L_r))

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the constraint, for log-ratios of nats a token: much larger than in dpo (the paper's 5).
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    return logistic(beta * margin(per_token(log_ratios(lp), lp)), label_smoothing)


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def ipo(lp: Logps, *, beta: float = 0.1) -> Array:
    """Identity preference optimization of means over tokens (Azar et al. 2023, arXiv 2310.12036, eq. 17), as in TRL.

        loss = (c / L_c - r / L_r - 1 / (2 beta))^2

    Args:
      lp: log-probabilities of B pairs.
      beta: The paper's tau; the margin goes to 1 / (2 beta) nats a token.

    Returns:
      float32[B].
    """
    require("beta", beta, lambda b: b > 0, "above 0")
    return (margin(per_token(log_ratios(lp), lp)) - 1 / (2 * beta)) ** 2


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def ipo_sum(lp: Logps, *, beta: float = 0.1) -> Array:
    """Identity preference optimization of sums (Azar et al. 2023, arXiv 2310.12036, eq. 17), as in DPO's original code.

        loss = (c - r - 1 / (2 beta))^2

    Args:
      lp: log-probabilities of B pairs.
      beta: The paper's tau; the margin goes to 1 / (2 beta) nats.

    Returns:
      float32[B].
    """
    require("beta", beta, lambda b: b > 0, "above 0")
    return (margin(log_ratios(lp)) - 1 / (2 * beta)) ** 2


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def hinge(lp: Logps, *, beta: float = 0.1) -> Array:
    """Hinge loss on normalized likelihoods, RSO's choice (Liu et al. 2023, arXiv 2309.06657).

        loss = max(0, 1 - beta (c - r))

    Args:
      lp: log-probabilities of B pairs.
      beta: The paper's gamma; pairs with a margin beyond 1 / beta nats are done with.

    Returns:
      float32[B].
    """
    return relu(1 - beta * margin(log_ratios(lp)))


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def robust(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    """Robust DPO: its mean over flipped labels is DPO's on clean ones (Chowdhury et al. 2024, arXiv 2403.00409).

        z = beta (c - r)
        loss = [-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps)

    It may be negative, and falls without bound where the labels are less noisy than assumed.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      label_smoothing: eps, the rate of flipped labels, from 0, which is dpo, to below one half.

    Returns:
      float32[B].
    """
    require("label_smoothing", label_smoothing, lambda eps: 0 <= eps < 0.5, "at least 0 and below 0.5")
    z = beta * margin(log_ratios(lp))
    kept, flipped = (1 - label_smoothing) * log_sigmoid(z), label_smoothing * log_sigmoid(-z)
    return (flipped - kept) / (1 - 2 * label_smoothing)


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def exo_pair(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Array:
    """Efficient exact optimization, the reverse KL of two classifiers (Ji et al. 2024, arXiv 2402.00856, eq. 16).

        q = sigmoid(beta (c - r))
        loss = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      label_smoothing: eps, the probability that the rejected response is the better one; the paper's 1e-3, never 0.

    Returns:
      float32[B].
    """
    require("label_smoothing", label_smoothing, lambda eps: 0 < eps < 0.5, "above 0 and below 0.5")
    z = beta * margin(log_ratios(lp))
    chosen = sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-label_smoothing))
    return chosen + sigmoid(-z) * (log_sigmoid(-z) - jnp.log(label_smoothing))


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def discopop(lp: Logps, *, beta: float = 0.1, tau: float = 0.05) -> Array:
    """DiscoPOP, a loss that a language model discovered (Lu et al. 2024, arXiv 2406.08414, eq. 5).

        z = beta (c - r)
        loss = -sigmoid(-z / tau) log sigmoid(z) + sigmoid(z / tau) e^-z

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      tau: Temperature of the passage from one to the other, below 1 (the paper's 0.05).

    Returns:
      float32[B].
    """
    require("tau", tau, lambda t: 0 < t < 1, "above 0 and below 1")
    z = beta * margin(log_ratios(lp))
    exponential = jnp.exp(log_sigmoid(z / tau) - z)  # as a product it would be 0 * inf at very negative z
    return exponential - sigmoid(-z / tau) * log_sigmoid(z)


@register(responses=2, uses_reference=True, divergences=True, scores=True)
def odpo(
    lp: Logps,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    offset: Literal["log", "linear", "ratio"] = "log",
    label_smoothing: float = 0.0,
) -> Array:
    """DPO with an offset by how much better the chosen response is (Amini et al. 2024, arXiv 2402.10571).

        loss = -log sigmoid(beta (c - r) - alpha Delta)
        Delta = log(s_c - s_r), s_c - s_r or log(s_c / s_r)

    with the scores s of the data; where the chosen one's is not the higher (or there are none) the value is NaN, and
    that of a ratio where a score is not above 0.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      alpha: Weight of the offset (the paper's 1).
      offset: Delta: log, the paper's, linear, or ratio, the authors' code's option.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    require("alpha", alpha, lambda a: a >= 0, "at least 0")
    gap = better_by(lp)
    delta = {"log": jnp.log, "linear": lambda x: x, "ratio": lambda x: log_ratio_of_scores(lp, x)}[offset](gap)
    return logistic(beta * margin(log_ratios(lp)) - alpha * delta, label_smoothing)


def better_by(lp: Logps) -> Array:
    """Returns by how much the first score of a comparison exceeds its last, float32[B], or NaN: no order, no loss.

    An absent comparison has 1.
    """
    gap = lp.scores[:, 0].astype(jnp.float32) - lp.scores[:, -1].astype(jnp.float32)
    return jnp.where(lp.weights > 0, jnp.where(gap > 0, gap, jnp.nan), 1.0)


def log_ratio_of_scores(lp: Logps, gap: Array) -> Array:
    """Returns log(s_c / s_r) for the gap of `better_by`, float32[B]: NaN where that is, or where s_r is not above 0."""
    low = jnp.where(lp.weights > 0, lp.scores[:, -1].astype(jnp.float32), 1.0)
    return jnp.where(low > 0, jnp.log1p(gap / jnp.where(low > 0, low, 1.0)), jnp.nan)


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def dpop(lp: Logps, *, beta: float = 0.3, penalty: float = 50.0, label_smoothing: float = 0.0) -> Array:
    """DPO-positive: the chosen response may not become less likely than it was (Pal et al. 2024, arXiv 2402.13228).

        loss = -log sigmoid(beta (c - r - lambda max(0, -c)))

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference (the paper's 0.3).
      penalty: The paper's lambda (its 50).
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    require("penalty", penalty, lambda p: p >= 0, "at least 0")
    c, r = pair(log_ratios(lp))
    return logistic(beta * (c - r - penalty * relu(-c)), label_smoothing)


@register(responses=2, uses_reference=True, soft_labels=True, divergences=True)
def r_dpo(lp: Logps, *, beta: float = 0.1, alpha: float = 0.01, label_smoothing: float = 0.0) -> Array:
    """Length-regularised DPO: rewards less alpha a token (Park et al. 2024, arXiv 2403.19159).

        loss = -log sigmoid(beta (c - r) + alpha (L_c - L_r))

    The preference for a longer chosen response is attributed in part to its length, so the policy learns less from it.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      alpha: Price of a token (the paper: up to 0.01 for dialogue, up to 0.5 for summaries).
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    return logistic(beta * margin(log_ratios(lp)) + alpha * margin(lp.lengths), label_smoothing)


@register(responses=2, uses_reference=True, soft_labels=True)
def hypo(lp: Logps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """Hybrid DPO: a reference that prefers the rejected response is not followed (Yuan et al. 2026, arXiv 2602.11902).

        loss = -log sigmoid(beta (p_c - p_r - max(0, ref_c - ref_r)))

    with p and ref the log-probs under policy and reference. Where the reference prefers the chosen response it is dpo.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    return logistic(beta * (margin(lp.policy) - relu(margin(lp.reference))), label_smoothing)


@register(responses=2, uses_reference=True, soft_labels=True)
def chi_po(lp: Logps, *, beta: float = 0.1, reward_range: float = 10.0, label_smoothing: float = 0.0) -> Array:
    """Chi-squared preference optimization, against overoptimization (Huang et al. 2024, arXiv 2407.13399).

        phi(x) = e^x + x
        loss = -log sigmoid(clip(beta (phi(c) - phi(r)), -2 R, 2 R))

    The scores of option `divergence: chi2_kl` of dpo, clipped: a policy that maximises reward - beta (KL + chi^2 / 2)
    has rewards beta phi.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the constraint to the reference.
      reward_range: R, the largest difference of rewards; a pair beyond twice that is done with, on either side.
      label_smoothing: The assumed rate of flipped labels.

    Returns:
      float32[B].
    """
    require("reward_range", reward_range, lambda r: r > 0, "above 0")
    z = beta * margin(chi_squared_score(log_ratios(lp)))
    return logistic(jnp.clip(z, -2 * reward_range, 2 * reward_range), label_smoothing)
