"""Losses of P >= 2 responses, best first, all present.

In formulas z_k = beta (log pi(y_k | x) - log ref(y_k | x)).
"""

import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax, logsumexp, softmax

from dpo_jax.losses.pairwise import better_by
from dpo_jax.losses.parts import log_ratios, require
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


@register(responses=None, uses_reference=True, divergences=True)
def plackett_luce(lp: Logps, *, beta: float = 0.1) -> Array:
    """DPO of a ranking under the Plackett-Luce model (Rafailov et al. 2023, arXiv 2305.18290, appendix A.3).

        loss = -sum_k log [exp(z_k) / sum_{j >= k} exp(z_j)]

    Of two responses it is dpo.

    Args:
      lp: log-probabilities of B rankings.
      beta: Strength of the KL constraint to the reference.

    Returns:
      float32[B].
    """
    return rank_nll(beta * log_ratios(lp))


def rank_nll(z: Array) -> Array:
    """Returns -log of the Plackett-Luce probability of the order 0, 1, ... of strengths e^z, float[B]."""
    k = jnp.arange(z.shape[1])
    lead = z[:, None, :] - z[:, :, None]  # [B, k, j]: z_j - z_k
    return logsumexp(lead, axis=2, where=k[None, :] >= k[:, None]).sum(1)


@register(responses=None, uses_reference=True, divergences=True, scores=True)
def lipo(lp: Logps, *, beta: float = 0.1) -> Array:
    """Listwise preference optimization with a softmax over scores (Liu et al. 2024, arXiv 2402.01878).

        loss = -sum_k softmax(s)_k log softmax(z)_k

    with the scores s of the data; where the first is not above the last (or there are none) the value is NaN. With
    s / temperature for s it is InfoNCA (arXiv 2402.05369).

    Args:
      lp: log-probabilities of B scored lists.
      beta: Strength of the KL constraint to the reference.

    Returns:
      float32[B].
    """
    labels = softmax(lp.scores.astype(jnp.float32))
    loss = -(labels * log_softmax(beta * log_ratios(lp))).sum(1)
    return jnp.where(jnp.isnan(better_by(lp)), jnp.nan, loss)


def _log_labels(lp: Logps, temperature: float) -> Array:
    """Returns log softmax(s / temperature), float32[B, P], or NaN where the first score is not above the last."""
    require("temperature", temperature, lambda t: t > 0, "above 0")
    labels = log_softmax(lp.scores.astype(jnp.float32) / temperature)
    return jnp.where(jnp.isnan(better_by(lp))[:, None], jnp.nan, labels)


@register(responses=None, uses_reference=True, divergences=True, scores=True)
def exo_rw(lp: Logps, *, beta: float = 0.1, temperature: float = 1.0) -> Array:
    """Efficient exact optimization of a scored list, the other KL of lipo (Ji et al. 2024, arXiv 2402.00856).

        q, p = softmax(z), softmax(s / temperature)
        loss = sum_k q_k log(q_k / p_k)

    with the scores s of the data; where the first is not above the last (or there are none) the value is NaN.

    Args:
      lp: log-probabilities of B scored lists.
      beta: Strength of the KL constraint to the reference.
      temperature: Of the scores.

    Returns:
      float32[B].
    """
    log_q = log_softmax(beta * log_ratios(lp))
    return (jnp.exp(log_q) * (log_q - _log_labels(lp, temperature))).sum(1)


@register(responses=None, uses_reference=True, scores=True)
def nca(lp: Logps, *, beta: float = 0.1, temperature: float = 1.0) -> Array:
    """Noise contrastive alignment of a scored list (Chen et al. 2024, arXiv 2402.05369).

        loss = -sum_k [softmax(s / temperature)_k log sigmoid(z_k) + 1/K log sigmoid(-z_k)]

    with the scores s of the data; where the first is not above the last (or there are none) the value is NaN. Each
    response is compared with a fixed point, so that the likelihood of the best may not fall. Of two responses at a
    temperature near 0 it is nca_pair.

    Args:
      lp: log-probabilities of B scored lists.
      beta: Strength of the KL constraint to the reference.
      temperature: Of the scores (the paper's 1 / alpha; temperature_alpha in its authors' code).

    Returns:
      float32[B].
    """
    z = beta * log_ratios(lp)
    return -(jnp.exp(_log_labels(lp, temperature)) * log_sigmoid(z) + log_sigmoid(-z) / z.shape[1]).sum(1)
