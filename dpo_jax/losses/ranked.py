"""Losses of P >= 2 responses, best first, all present.

In formulas z_k = beta (log pi(y_k | x) - log ref(y_k | x)).
"""

import jax.numpy as jnp
from jax.nn import log_softmax, logsumexp, softmax

from dpo_jax.losses.pairwise import better_by
from dpo_jax.losses.parts import log_ratios
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
    z = beta * log_ratios(lp)
    k = jnp.arange(z.shape[1])
    lead = z[:, None, :] - z[:, :, None]  # [B, k, j]: z_j - z_k
    return logsumexp(lead, axis=2, where=k[None, :] >= k[:, None]).sum(1)


@register(responses=None, uses_reference=True, divergences=True, scores=True)
def lipo(lp: Logps, *, beta: float = 0.1) -> Array:
    """Listwise preference optimization with a softmax over scores (Liu et al. 2024, arXiv 2402.01878).

        loss = -sum_k softmax(s)_k log softmax(z)_k

    with the scores s of the data; where the first is not above the last (or there are none) the value is NaN.

    Args:
      lp: log-probabilities of B scored lists.
      beta: Strength of the KL constraint to the reference.

    Returns:
      float32[B].
    """
    labels = softmax(lp.scores.astype(jnp.float32))
    loss = -(labels * log_softmax(beta * log_ratios(lp))).sum(1)
    return jnp.where(jnp.isnan(better_by(lp)), jnp.nan, loss)
