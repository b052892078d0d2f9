"""Log-probs of pairs at given margins, at which losses are evaluated alone, without a model."""

import jax
import jax.numpy as jnp

from dpo_jax.losses import Loss
from dpo_jax.losses.term_options import first_responses
from dpo_jax.records import Array, Logps

STEPS = 300  # after which a running mean has forgotten its start


def settled_running(loss: Loss, lp: Logps) -> Array:
    """Returns the running statistics of a loss after many steps, each of all these pairs, float32[K]."""

    def after(_: int, running: Array) -> Array:
        return loss.statistics(lp._replace(running=running))

    return jax.lax.fori_loop(0, STEPS, after, jnp.zeros(loss.carried))


def logps_at(margins: Array, loss: Loss, ref_logp: float, tokens: float = 1.0, shift: float | Array = 0.0) -> Logps:
    """Returns log-probs with scores 3 and 1, and as many responses as a loss takes.

    The log-ratios are margin / 2 + shift of the chosen response, -margin / 2 + shift of the rejected one, and 0 of a
    third one, which comes first where it is a gold response.

    Args:
      margins: c - r in nats, float[B].
      loss: the objective.
      ref_logp: the reference's log-prob of each response.
      tokens: of each response.
      shift: of both log-ratios.
    """
    ratios = jnp.stack([margins / 2 + shift, -margins / 2 + shift, 0.0 * margins], 1)
    if loss.responses == 3 and not loss.mismatched:
        ratios = ratios[:, jnp.array([2, 0, 1])]
    policy, reference = ratios + ref_logp, jnp.full_like(ratios, ref_logp)
    scores, lengths = jnp.broadcast_to(jnp.array([3.0, 1.0, 0.0]), ratios.shape), jnp.full_like(ratios, tokens)
    shared = {"policy_shared": policy, "reference_shared": reference, "confidence": jnp.zeros_like(ratios)}
    lp = Logps.of(policy, reference, lengths=lengths, scores=scores, **shared)
    return first_responses(lp, loss.responses or 2)
