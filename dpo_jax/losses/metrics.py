"""Metrics of log-probs, under TRL's names where it has them; NaN for comparisons without a value."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid

from dpo_jax.losses.parts import per_token
from dpo_jax.records import Array, Logps

Rewards = Callable[[Logps], Array]


def likelihood_metrics(lp: Logps) -> dict[str, Array]:
    """Returns the log-probs, float32[B], of the best and (P > 1) the worst response; for the best, nats per token."""
    chosen = jnp.where(lp.present[:, 0], lp.policy[:, 0], jnp.nan)
    metrics = {"logps/chosen": chosen, "nll": jnp.where(lp.present, -per_token(lp.policy, lp), jnp.nan)[:, 0]}
    if lp.policy.shape[1] == 1:
        return metrics
    return metrics | {"logps/rejected": jnp.where(lp.present[:, -1], lp.policy[:, -1], jnp.nan)} | length_metrics(lp)


def length_metrics(lp: Logps) -> dict[str, Array]:
    """Returns the number of scored tokens, float32[B], of the best response and of the worst."""
    found = jnp.where(lp.present, lp.lengths, jnp.nan)
    return {"lengths/chosen": found[:, 0], "lengths/rejected": found[:, -1]}


def margin_metrics(values: Array, noise: Array, lp: Logps) -> dict[str, Array]:
    """Returns TRL's reward metrics, float32[B], of the best response against the worst.

    A margin within the rounding error of its log-probs is a tie, and reported as 0. A tie counts as half right (TRL:
    wrong), so that a policy equal to its reference scores 0.5. If the chosen response is better with probability p,
    accuracy is the probability that the label agrees with the rewards: at most max(p, 1 - p). gradient_weight is
    sigmoid(-margin), how much a pair still moves the model (paper, section 4).

    Args:
      values: float[B, P], rewards.
      noise: float[B, P], how far rounding may move each of them.
      lp: log-probs, for labels and absent responses.
    """
    shown = jnp.where(lp.present, values.astype(jnp.float32), jnp.nan)
    chosen, rejected = shown[:, 0], shown[:, -1]
    margin = chosen - rejected
    margin = jnp.where(jnp.abs(margin) <= noise[:, 0] + noise[:, -1], 0.0, margin)
    right = 0.5 * (jnp.sign(margin) + 1.0)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": lp.preference * right + (1.0 - lp.preference) * (1.0 - right),
        "rewards/margins": margin,
        "gradient_weight": sigmoid(-margin),
    }


def reward_metrics(lp: Logps, beta: Array | float) -> dict[str, Array]:
    """Returns `margin_metrics` of rewards beta * (log pi - log ref) (paper, eq. 5 without its partition function), and:

    - logratios/*: log pi - log ref, float32[B].
    - logratio: the mean over responses of log pi - log ref, float32[B]. Over responses that the reference wrote, its
      mean estimates -KL(reference || policy) of whole sequences.
    """
    ratios = jnp.where(lp.present, lp.policy - lp.reference, jnp.nan)
    return margin_metrics(beta * ratios, beta * lp.rounding, lp) | {
        "logratios/chosen": ratios[:, 0],
        "logratios/rejected": ratios[:, -1],
        "logratio": jnp.nanmean(ratios, axis=1),
    }


def implicit_reward_metrics(lp: Logps, rewards: Rewards) -> dict[str, Array]:
    """Returns `margin_metrics` of rewards, float32[B, P], that follow from the log-probs of the policy alone."""
    values, noise = jax.jvp(lambda policy: rewards(lp._replace(policy=policy)), (lp.policy,), (lp.rounding,))
    return margin_metrics(values, jnp.abs(noise), lp)


def weighted_means(metrics: dict[str, Array], weights: Array) -> dict[str, Array]:
    """Returns the weighted mean of each metric over the comparisons that have it, float32[], and `length_bias`.

    A NaN loss stays NaN; a metric without any value is NaN. If no comparison has both responses (KTO), the margin is
    the difference of the mean rewards, as in TRL.

    Args:
      metrics: name -> float32[B].
      weights: float32[B], 0 for absent comparisons.
    """
    means = {name: _mean(value, weights, skip=not name.startswith("loss")) for name, value in metrics.items()}
    if "rewards/margins" in metrics:
        means["length_bias"] = length_bias(metrics, weights)
        of_means = means["rewards/chosen"] - means["rewards/rejected"]
        means["rewards/margins"] = jnp.where(jnp.isnan(means["rewards/margins"]), of_means, means["rewards/margins"])
    return means


def _mean(value: Array, weights: Array, skip: bool) -> Array:
    # Absent comparisons may hold NaN, and 0 * NaN is NaN.
    counted = (weights > 0) & ~(jnp.isnan(value) & skip)
    weights = jnp.where(counted, weights, 0.0)
    return jnp.sum(jnp.where(counted, value, 0.0) * weights) / jnp.sum(weights)


def length_bias(metrics: dict[str, Array], weights: Array) -> Array:
    """Returns the correlation of the reward margin with the length difference (chosen - rejected) over comparisons.

    Near 1, the policy has learned to prefer long responses. 0 if either does not vary; ties count as margin 0. Of numpy
    arrays it is computed by numpy: as a dozen programs of one operation it would take longer to compile than to sum.
    """
    xp = jnp if isinstance(weights, jax.Array) else np
    longer = metrics["lengths/chosen"] - metrics["lengths/rejected"]
    margin = metrics["rewards/margins"]
    share = xp.where(xp.isnan(longer + margin), 0.0, weights)
    share /= xp.maximum(xp.sum(share), xp.finfo(xp.float32).tiny)
    x, y = (xp.where(share > 0, v - xp.sum(xp.where(share > 0, v, 0.0) * share), 0.0) for v in (longer, margin))
    spread = xp.sqrt(xp.sum(share * x * x) * xp.sum(share * y * y))
    return xp.where(spread > 0, xp.sum(share * x * y) / xp.where(spread > 0, spread, 1.0), 0.0)
