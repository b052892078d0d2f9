"""One module per model family: its config.json mapping and the names of its tensors."""
