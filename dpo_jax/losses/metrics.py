"""What a run says of its log-probs, under TRL's names first; NaN where a comparison has nothing to say."""

import jax.numpy as jnp
from jax.nn import sigmoid

from dpo_jax.records import Array, Logps


def likelihood_metrics(lp: Logps) -> dict[str, Array]:
    """Returns the log-probs, float32[B], of the best response and (P > 1) of the worst; nats a token for the best."""
    chosen = jnp.where(lp.present[:, 0], lp.policy[:, 0], jnp.nan)
    metrics = {"logps/chosen": chosen, "nll": chosen / -jnp.maximum(lp.lengths[:, 0], 1.0)}
    if lp.policy.shape[1] == 1:
        return metrics
    return metrics | {"logps/rejected": jnp.where(lp.present[:, -1], lp.policy[:, -1], jnp.nan)} | length_metrics(lp)


def length_metrics(lp: Logps) -> dict[str, Array]:
    """Returns the tokens, float32[B], of the best response and of the worst."""
    found = jnp.where(lp.present, lp.lengths, jnp.nan)
    return {"lengths/chosen": found[:, 0], "lengths/rejected": found[:, -1]}


def margin_metrics(values: Array, lp: Logps) -> dict[str, Array]:
    """Returns TRL's reward metrics, float32[B], of the best response against the worst; values: float[B, P].

    A tie counts as half right, where TRL counts it as wrong, so that a policy equal to its reference scores 0.5 and
    not 0. Where the chosen response is the better one with probability p only, accuracy is the probability that the
    label agrees with the rewards: at best the larger of p and 1 - p. gradient_weight is sigmoid(-margin), how much a
    pair still moves the model (paper, section 4).
    """
    shown = jnp.where(lp.present, values.astype(jnp.float32), jnp.nan)
    chosen, rejected = shown[:, 0], shown[:, -1]
    margin = chosen - rejected
    right = 0.5 * (jnp.sign(margin) + 1.0)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": lp.preference * right + (1.0 - lp.preference) * (1.0 - right),
        "rewards/margins": margin,
        "gradient_weight": sigmoid(-margin),
    }


def reward_metrics(lp: Logps, beta: Array | float) -> dict[str, Array]:
    """Returns `margins` of rewards beta * (log pi - log ref) (paper, eq. 5 without its partition function), float32[B],
    and what goes with them.

    - logratios/*: log pi - log ref, whatever beta.
    - kl: log ref - log pi, averaged over the responses, whose mean estimates KL(reference || policy) over whole
      sequences as far as the reference wrote them.
    """
    ratios = jnp.where(lp.present, lp.policy - lp.reference, jnp.nan)
    return margin_metrics(beta * ratios, lp) | {
        "logratios/chosen": ratios[:, 0],
        "logratios/rejected": ratios[:, -1],
        "kl": -jnp.nanmean(ratios, axis=1),
    }


def weighted_means(metrics: dict[str, Array], weights: Array) -> dict[str, Array]:
    """Returns the weighted mean of each metric over the comparisons that have it, float32[], and `length_bias`.

    A loss that is NaN stays NaN; a metric that no comparison has is NaN. Where no comparison has both responses the
    margin is that of the means, as TRL's for KTO.

    Args:
      metrics: name -> float32[B].
      weights: float32[B], 0 for absent comparisons.
    """
    means = {name: _mean(value, weights, skip=not name.startswith("loss")) for name, value in metrics.items()}
    if "rewards/margins" in metrics:
        means["length_bias"] = length_bias(metrics, weights)
        apart = means["rewards/chosen"] - means["rewards/rejected"]  # all that single responses can say
        means["rewards/margins"] = jnp.where(jnp.isnan(means["rewards/margins"]), apart, means["rewards/margins"])
    return means


def _mean(value: Array, weights: Array, skip: bool) -> Array:
    # What is absent may hold anything, and 0 * NaN is NaN.
    counted = (weights > 0) & ~(jnp.isnan(value) & skip)
    weights = jnp.where(counted, weights, 0.0)
    return jnp.sum(jnp.where(counted, value, 0.0) * weights) / jnp.sum(weights)


def length_bias(metrics: dict[str, Array], weights: Array) -> Array:
    """Returns the correlation, over comparisons, of the reward margin with how much longer the chosen response is:
    near 1, the policy has learned to prefer length; 0 where either does not vary.
    """
    longer = metrics["lengths/chosen"] - metrics["lengths/rejected"]
    margin = metrics["rewards/margins"]
    share = jnp.where(jnp.isnan(longer + margin), 0.0, weights)
    share /= jnp.maximum(jnp.sum(share), jnp.finfo(jnp.float32).tiny)
    x, y = (jnp.where(share > 0, v - jnp.sum(jnp.where(share > 0, v, 0.0) * share), 0.0) for v in (longer, margin))
    spread = jnp.sqrt(jnp.sum(share * x * x) * jnp.sum(share * y * y))
    return jnp.where(spread > 0, jnp.sum(share * x * y) / jnp.where(spread > 0, spread, 1.0), 0.0)
