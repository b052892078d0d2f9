"""Remat policies: what the backward pass saves. Everything else is recomputed."""

from collections.abc import Callable
from typing import Any

import jax

from dpo_jax.models.attention import keeps_attention

POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("projection"), keeps_attention
    ),
    "none": None,
}


def saves_all_but_gathers(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy: saves everything but all-gathered parameters, which the backward pass gathers again, and casts."""
    return primitive.name not in ("all_gather", "shard_map", "convert_element_type")
