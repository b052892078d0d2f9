"""Preference data: sources, tokenisation, order and packing. Nothing here imports JAX."""
