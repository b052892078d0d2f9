"""Runs from Python: train, sweep, evaluate and sample, as the commands of the same names do."""
