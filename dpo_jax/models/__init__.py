"""Decoder-only language models as pure functions of their parameters."""
