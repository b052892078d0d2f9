"""Direct Preference Optimization (arXiv 2305.18290) in JAX and Flax."""

__version__ = "0.1.0"
