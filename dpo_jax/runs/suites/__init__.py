"""Standard evaluations: one file per suite, which registers itself by name in `registry`."""
