"""Losses of a chosen and a rejected response, P = 2, which fit the reward margin to the gap of the data's scores.

In formulas z = beta (c - r), with c and r the log-ratios of pairwise.py, and d = eta (s_c - s_r) with the scores s of
the data; where the chosen one's is not the higher (or there are none) the value is NaN. All three are least at z = d.
"""

from jax.nn import log_sigmoid, sigmoid

from dpo_jax.losses.pairwise import better_by
from dpo_jax.losses.parts import log_ratios, margin, require
from dpo_jax.losses.registry import register
from dpo_jax.records import Array, Logps


def _margins(lp: Logps, beta: float, eta: float) -> tuple[Array, Array]:
    """Returns the margin of rewards z and that of the data's scores d, float32[B] each."""
    require("eta", eta, lambda e: e > 0, "above 0")
    return beta * margin(log_ratios(lp)), eta * better_by(lp)


def _bernoulli_kl(a: Array, b: Array) -> Array:
    """Returns KL(sigmoid(a) || sigmoid(b)) of two coins."""
    return sigmoid(a) * (log_sigmoid(a) - log_sigmoid(b)) + sigmoid(-a) * (log_sigmoid(-a) - log_sigmoid(-b))


@register(responses=2, uses_reference=True, divergences=True, scores=True)
def rpo_sq(lp: Logps, *, beta: float = 0.1, eta: float = 1.0) -> Array:
    """Reward-aware preference optimization, squared (Sun et al. 2025, arXiv 2502.00203), NeMo's rpo_sq.

        loss = (z - d)^2

    With eta = 1 and 1 / beta for its eta it is REBEL (Gao et al. 2024, arXiv 2404.16767), whose code has beta = 1.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      eta: Scale of the scores (NeMo's gt_reward_scale).

    Returns:
      float32[B].
    """
    z, d = _margins(lp, beta, eta)
    return (z - d) ** 2


@register(responses=2, uses_reference=True, divergences=True, scores=True)
def rpo_bwd(lp: Logps, *, beta: float = 0.1, eta: float = 1.0) -> Array:
    """Reward-aware preference optimization, Nemotron-4's (Adler et al. 2024, arXiv 2406.11704), NeMo's rpo_bwd_kl.

        loss = KL(sigmoid(d) || sigmoid(z)) of two coins

    Its gradient is that of dpo with soft labels sigmoid(d).

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      eta: Scale of the scores (NeMo's gt_reward_scale).

    Returns:
      float32[B].
    """
    z, d = _margins(lp, beta, eta)
    return _bernoulli_kl(d, z)


@register(responses=2, uses_reference=True, divergences=True, scores=True)
def rpo_fwd(lp: Logps, *, beta: float = 0.1, eta: float = 1.0) -> Array:
    """Reward-aware preference optimization, the other KL (Sun et al. 2025, arXiv 2502.00203), NeMo's rpo_fwd_kl.

        loss = KL(sigmoid(z) || sigmoid(d)) of two coins

    Of labels sigmoid(d) = 1 - eps it is exo_pair.

    Args:
      lp: log-probabilities of B pairs.
      beta: Strength of the KL constraint to the reference.
      eta: Scale of the scores (NeMo's gt_reward_scale).

    Returns:
      float32[B].
    """
    z, d = _margins(lp, beta, eta)
    return _bernoulli_kl(z, d)
