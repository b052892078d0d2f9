"""Equations of PPO on completions: pure functions of float32[N, T] arrays, N completions of at most T tokens.

`mask`, bool[N, T], is True for tokens and False for padding on the right. The source is Ziegler et al. 2019 (arXiv
1909.08593) with its released code, as documented by Huang et al. 2024 (arXiv 2403.17031), unless a function names
another one.
"""

import jax
import jax.numpy as jnp

from dpo_jax.records import Array

MAX_ERROR = 0.2  # the controller clips its relative error to this


def token_rewards(scores: Array, logps: Array, reference: Array, mask: Array, kl_coef: Array | float) -> Array:
    """Returns the reward of each token: -kl_coef (log pi - log ref), plus the completion's score at its last token.

    Args:
      scores: float32[N].
      logps: log pi of the tokens under the policy that sampled them.
      reference: log-probs of the tokens under the reference.
      mask: True for tokens; every completion has at least one.
      kl_coef: beta.
    """
    last = jnp.arange(mask.shape[1]) == mask.sum(axis=1, keepdims=True) - 1
    return jnp.where(mask, last * scores[:, None] - kl_coef * (logps - reference), 0.0)


def whiten(values: Array, mask: Array, center: bool = True) -> Array:
    """Returns values divided by their standard deviation over all tokens; `center` subtracts their mean first.

    Without `center` Ziegler's code subtracts the mean, divides, and adds the undivided mean. With completions of
    different lengths that rewards length (or its absence), so here the values are divided, mean included.
    """
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.sum(jnp.where(mask, values, 0.0)) / count
    variance = jnp.sum(jnp.where(mask, (values - mean) ** 2, 0.0)) / count
    return jnp.where(mask, (values - mean * center) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def advantages(rewards: Array, values: Array, mask: Array, gamma: Array | float, lam: Array | float) -> Array:
    """Returns the generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}

    The value after the last token is 0.
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def step(later: Array, delta: Array) -> tuple[Array, Array]:
        now = delta + gamma * lam * later
        return now, now

    _, estimates = jax.lax.scan(step, jnp.zeros(len(rewards)), deltas.T, reverse=True)
    return jnp.where(mask, estimates.T, 0.0)


def policy_loss(logps: Array, old: Array, advantage: Array, mask: Array, clip: Array | float) -> Array:
    """Returns the negated clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), the mean over tokens of

    -min(rho A, clamp(rho, 1 - clip, 1 + clip) A),    rho = pi / pi_old
    """
    ratio = jnp.exp(jnp.where(mask, logps - old, 0.0))
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    return -masked_mean(surrogate, mask)


def value_loss(values: Array, old: Array, returns: Array, mask: Array, clip: Array | float) -> Array:
    """Returns half the mean over tokens of the larger squared error: of the value, or of the clipped value.

    The value is clipped to a distance of `clip` from the old one.
    """
    clipped = jnp.clip(values, old - clip, old + clip)
    return 0.5 * masked_mean(jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean over tokens."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(mask.sum(), 1)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: float) -> float:
    """Returns the KL coefficient after a step, by proportional control (Ziegler et al. 2019, section 2.2).

        e = clamp(KL / target - 1, -0.2, 0.2),    beta <- beta (1 + e completions / horizon)

    An infinite horizon keeps it constant.
    """
    error = min(max(kl / target - 1.0, -MAX_ERROR), MAX_ERROR)
    return kl_coef * (1.0 + error * completions / horizon)
