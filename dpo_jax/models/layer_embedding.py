"""Embeddings of a token that each layer has for itself (Gemma 3n), beside that of the first layer.

Axis letters: R rows, T tokens, D model width, L layers, P width of these embeddings.
"""

import jax.numpy as jnp

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.layers import Linear, Norm, activate, scaled
from dpo_jax.models.remat import ACTIVATION, saved
from dpo_jax.records import Array

TABLES = ("embedding", "layer_embedding")  # keys of the parameters in which tokens are looked up, where they exist


def layer_embeddings(a: Architecture, rows: Array, x: Array) -> Array:
    """Returns the embeddings [L, R, T, P] of tokens; call it inside a Linen module.

    Args:
      a: the architecture.
      rows: of the table, [R, T, L * P].
      x: the residual before the first layer, [R, T, D], which is projected and added.
    """
    assert a.layer_embedding is not None
    shape, axes = (a.layers, a.layer_embedding), ("embed", "layer_inputs", "layer_embedding")
    project = Linear((a.width,), shape, axes, False, a.initializer_range, name="layer_embedding_projection")
    norm = Norm(a, shape[1:], axes[2:], name="layer_embedding_norm")
    projected = norm(scaled(project(x), a.width**-0.5))
    both = projected + scaled(rows, a.layer_embedding**0.5).reshape(projected.shape)
    return jnp.moveaxis(scaled(both, 2**-0.5), 2, 0)


def embedding_branch(a: Architecture, x: Array, embedding: Array) -> Array:
    """Returns what a layer makes of its embedding of the tokens [R, T, P] and of the residual: [R, T, D]."""
    size = embedding.shape[-1]
    gate = Linear((a.width,), (size,), ("embed", "mlp"), False, a.initializer_range, name="embedding_gate")(x)
    inner = saved(activate(embedding, gate, a.activation), ACTIVATION)
    return Linear((size,), (a.width,), ("mlp", "embed"), False, a.initializer_range, name="embedding_out")(inner)
