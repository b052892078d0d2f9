"""Sampling from a model with a cache of keys and values: many texts at once, or one token by token."""

from dpo_jax.sampling.run import PLAIN, generate, lower_generate

__all__ = ["PLAIN", "generate", "lower_generate"]
