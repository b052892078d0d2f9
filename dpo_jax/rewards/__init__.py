"""Rewards of texts, judges of two responses, and win rates."""
