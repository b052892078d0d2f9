"""The router loss of mixtures of experts, over the tokens of separate sequences, however they are packed.

Equations 4 to 6 of the Switch Transformer (arXiv 2101.03961), with all layers together as in transformers:
E * sum_e f_e P_e, where f_e is how often a token goes to expert e and P_e the mean of the router's probability for e.
"""

import jax
import jax.numpy as jnp

from dpo_jax.records import Array, Batch


def load_balance(routing: Array) -> Array:
    """Returns the router loss float32[] of statistics by row, float32[R, 2, E], from `experts.routing_of`.

    It is k if every expert gets as many tokens, and more if some get more. The fraction of tokens has no gradient.
    """
    chosen, probs = routing.sum(0)
    tokens = jax.lax.stop_gradient(probs.sum())  # the probabilities of a token sum to 1
    return len(probs) * jnp.vdot(jax.lax.stop_gradient(chosen), probs) / tokens**2


def token_counts(batch: Batch, present: Array) -> Array:
    """Returns in how many of the sequences [prompt | response] a token of a packed row is, float32[R, T].

    Args:
      batch: one microbatch.
      present: bool[R, G, P], False for an absent response.
    """
    responses = jnp.pad(present.sum(-1, dtype=jnp.float32), ((0, 0), (1, 0)))  # of padding, then of each comparison
    of_prompt = jnp.take_along_axis(responses, batch.segment_ids, axis=1)
    return jnp.where(batch.branch_ids == 0, of_prompt, 1.0 * (batch.segment_ids > 0))
