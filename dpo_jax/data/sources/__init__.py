"""Data sources, one module each; `base` states their contract. The module's name is the value of `data.name`."""
