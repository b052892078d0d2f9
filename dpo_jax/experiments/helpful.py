"""Anthropic's dialogues in two halves: one for a policy, one for a judge that has seen none of the policy's pairs."""

import hashlib
from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import unknown_choice
from dpo_jax.data.sources.hh import TURN, hh_pairs
from dpo_jax.errors import UserError

HALVES = ("policy", "judge")


def dialogues(path: tuple[str, ...], split: str, *, half: str = "policy") -> Iterator[dict[str, Any] | UserError]:
    """Yields the pairs of one half, and an error for a bad line. Dialogues with the same first question share a half.

    Args:
      path: as for the source `hh`.
      split: likewise.
      half: "policy" or "judge".

    Raises:
      UserError: another half, or files that cannot be read.
    """
    if half not in HALVES:
        raise unknown_choice("half (data.options)", half, HALVES)
    for pair in hh_pairs(path, split):
        if isinstance(pair, UserError):
            yield pair
        elif half_of(pair.prompt.partition(TURN)[0]) == half:
            # A response that continues another dialogue is left empty here, so that data.degenerate counts it.
            rejected = pair.rejected if pair.same_prompt else ""
            yield {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": rejected}


def half_of(question: str) -> str:
    """Returns the half of a dialogue, by a hash of its first question."""
    return HALVES[hashlib.blake2b(question.encode(), digest_size=1).digest()[0] % 2]
