"""One module per command of `dpo-jax`."""
