"""What PPO on completions is made of: pure functions of arrays float32[N, T], where bool[N, T] `mask` has the tokens.

Each follows Ziegler et al. 2019 (arXiv 1909.08593) and its released code, as Huang et al. 2024 (arXiv 2403.17031) take
it apart, unless it says otherwise.
"""

import jax
import jax.numpy as jnp

from dpo_jax.records import Array

WORST = 0.2  # of the controller's relative error


def token_rewards(scores: Array, logps: Array, reference: Array, mask: Array, kl_coef: Array | float) -> Array:
    """Returns the reward of each token: -kl_coef (log pi - log ref), and at the last one the completion's score too.

    Args:
      scores: float32[N].
      logps: log pi of the tokens when they were drawn.
      reference: log ref of them.
      mask: which tokens are some, a completion's from the left on, at least one.
      kl_coef: beta.
    """
    last = jnp.arange(mask.shape[1]) == mask.sum(axis=1, keepdims=True) - 1
    return jnp.where(mask, last * scores[:, None] - kl_coef * (logps - reference), 0.0)


def whiten(values: Array, mask: Array, center: bool = True) -> Array:
    """Returns values over their standard deviation among all tokens, less their mean first where they are centered.

    Ziegler's code adds the mean again, undivided, where they are not: of completions of unlike lengths that would
    reward the long or the short ones for it, and so does not happen here.
    """
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.sum(jnp.where(mask, values, 0.0)) / count
    variance = jnp.sum(jnp.where(mask, (values - mean) ** 2, 0.0)) / count
    return jnp.where(mask, (values - mean * center) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def advantages(rewards: Array, values: Array, mask: Array, gamma: Array | float, lam: Array | float) -> Array:
    """Returns the generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}

    Nothing is worth anything after a completion's end.
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def back(later: Array, delta: Array) -> tuple[Array, Array]:
        now = delta + gamma * lam * later
        return now, now

    _, found = jax.lax.scan(back, jnp.zeros(len(rewards)), deltas.T, reverse=True)
    return jnp.where(mask, found.T, 0.0)


def policy_loss(logps: Array, old: Array, advantage: Array, mask: Array, clip: Array | float) -> Array:
    """Returns the clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated, as a mean over tokens.

    -min(rho A, clamp(rho, 1 - clip, 1 + clip) A),    rho = pi / pi_old
    """
    ratio = jnp.exp(jnp.where(mask, logps - old, 0.0))
    kept = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    return -masked_mean(kept, mask)


def value_loss(values: Array, old: Array, returns: Array, mask: Array, clip: Array | float) -> Array:
    """Returns half the larger of two squared errors, the value's and that of the value held within `clip` of the old
    one, as a mean over tokens."""
    held = jnp.clip(values, old - clip, old + clip)
    return 0.5 * masked_mean(jnp.maximum((values - returns) ** 2, (held - returns) ** 2), mask)


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean over tokens."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(mask.sum(), 1)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: float) -> float:
    """Returns the KL coefficient after a step, by proportional control (Ziegler et al. 2019, section 2.2).

        e = clamp(KL / target - 1, -0.2, 0.2),    beta <- beta (1 + e completions / horizon)

    An infinite horizon leaves it as it is.
    """
    error = min(max(kl / target - 1.0, -WORST), WORST)
    return kl_coef * (1.0 + error * completions / horizon)
