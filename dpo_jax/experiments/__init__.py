"""The paper's experiments: its baselines, and what reward each method reaches at what distance from the reference."""
