"""What sampling refuses, before anything is compiled."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.records import Array


def ids_of_ends(own: tuple[int, ...], eos_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the ids that end a text: those given, else those of the model's folder; without any, a UserError."""
    if eos_id is None and not own:
        raise UserError("eos_id: the model was not loaded from a folder that names it; give tokenizer.eos_token_id")
    return tuple(np.atleast_1d(own if eos_id is None else eos_id).tolist())


def takes_int8(weights: str | None, params: Any, shared: bool) -> bool:
    """Returns whether decoding is to take kernels in 8 bits; refuses where it cannot."""
    if weights is None:
        return False
    if weights != "int8":
        raise UserError(f"weights: {weights!r} is not known; choose int8, or leave it out")
    if shared:
        raise UserError("weights: int8 is for devices that have all parameters; leave it out, or shard rows only")
    if any("quantized" in leaves for leaves in params["layers"].values()):
        raise UserError("weights: the kernels are quantized already (lora.base); leave it out")
    if "router" in params["layers"]:
        raise UserError("weights: int8 is not for mixtures of experts; leave it out")
    return True


def check_sampling(
    a: Architecture,
    prompts: Sequence[Array],
    copies: int,
    new: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Refuses empty prompts, options out of range, and more tokens than the model has positions."""
    if copies < 1:
        raise UserError(f"copies must be at least 1, got {copies}")
    if new < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {new}")
    if temperature < 0:
        raise UserError(f"temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be in (0, 1], got {top_p}")
    if isinstance(prompts, str) or any(isinstance(p, str) for p in prompts):
        raise UserError("prompts: texts; give token ids, as in tokenizer(texts)['input_ids']")
    if any(np.ndim(p) != 1 for p in prompts):
        raise UserError("prompts: give a list of prompts, each a list of token ids")
    if a.score:
        raise UserError("generate: a reward model generates no text; load a language model")
    lengths = [len(p) for p in prompts]
    if 0 in lengths:
        raise UserError(f"prompt {lengths.index(0) + 1} has no tokens; give at least one")
    longest, end = max(lengths, default=0) + new, a.max_positions if a.learned_positions else a.rope and a.rope.end
    if end is not None and longest > end:
        sizes = f"{new} and the longest prompt are {longest} tokens, the model has {end} positions"
        raise UserError(f"max_new_tokens: {sizes}; lower it, or shorten the prompts")
