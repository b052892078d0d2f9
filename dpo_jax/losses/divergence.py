"""placeholder"""
from dpo_jax.records import Logps


def transform(lp: Logps, name: str, alpha: float) -> Logps:
    """Placeholder."""
    assert name == "reverse_kl"
    return lp
