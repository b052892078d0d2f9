"""Samples one continuation token by token, for streaming."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed
from dpo_jax.models.interface import Model
from dpo_jax.records import Array
from dpo_jax.sampling.checks import check_sampling
from dpo_jax.sampling.decode import (
    AS_THEY_ARE,
    Draw,
    Rows,
    Sampler,
    SamplingState,
    Weights,
    decode_weights,
    first_token,
    next_token,
)
from dpo_jax.sampling.run import sampler_of
from dpo_jax.sampling.slots import pad_prompts

SHORTEST = 256  # tokens of a padded prompt; longer ones double, so that a growing conversation compiles seldom


def stream_tokens(
    model: Model,
    params: Any,
    prompt: Array,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Returns an iterator over the tokens that `generate` gives for one prompt, each as soon as it is sampled.

    The programs depend on the length of the prompt only by its power of two. Parameters are copied once per prompt, in
    the compute dtype; put them on a device first, or each prompt does.

    Args:
      model: pure functions of the architecture.
      params: its parameters.
      prompt: token ids, at least one.
      max_new_tokens, temperature, top_k, top_p, eos_id, seed: as for `generate`.

    Raises:
      UserError: as for `generate`, before the first token.
    """
    check_sampling(model.architecture, [prompt], 1, max_new_tokens, temperature, top_k, top_p)
    sampler = sampler_of(model, max_new_tokens, temperature, eos_id)
    rows = (*pad_prompts([np.asarray(prompt)], 1, padded_length(len(prompt))), np.zeros((1, 1), np.int32))
    return _tokens(sampler, params, rows, jax.random.key(seed), Draw.of(temperature, top_k, top_p))


def padded_length(length: int) -> int:
    """Returns the number of tokens that a prompt is padded to: a power of two, at least `SHORTEST`."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _tokens(sampler: Sampler, params: Any, rows: Any, key: Array, draw: Draw) -> Iterator[int]:
    """Yields the tokens of a continuation; arguments as for `decode.first_token`."""
    weights, rows, state = _begin(sampler, params, rows, (key, draw))
    for made in range(1, sampler.new_tokens + 1):
        token, alive = distributed.fetch((state.last, state.alive))
        yield int(token[0])
        if made == sampler.new_tokens or not alive[0]:
            return
        state = _go_on(sampler, weights, rows, draw, state)


@partial(jax.jit, static_argnums=0, donate_argnums=(4,))  # the cache is changed in place
def _go_on(sampler: Sampler, weights: Weights, rows: Rows, draw: Draw, state: SamplingState) -> SamplingState:
    return next_token(sampler, AS_THEY_ARE, weights, rows, draw, state)


@partial(jax.jit, static_argnums=0)
def _begin(sampler: Sampler, params: Any, rows: Any, draw: Any) -> tuple[Weights, Rows, SamplingState]:
    weights = decode_weights(sampler, params, params, draw[1].temperature)
    return weights, *first_token(sampler, sampler.new_tokens, AS_THEY_ARE, (params["layers"], weights), rows, draw)
