"""Samples one continuation token by token, for streaming."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed
from dpo_jax.models.model import Model
from dpo_jax.records import Array
from dpo_jax.sampling import StaticOptions, check_sampling, first_token, ids_of_ends, next_token, pad_prompts

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
    check_sampling(model, [prompt], 1, max_new_tokens, temperature, top_k, top_p)
    options = StaticOptions(temperature > 0, top_k, model.architecture.logit_cap)
    functions = (model.prefill, model.unstack, model.decode, model.head)
    rows = (*pad_prompts([np.asarray(prompt)], 1, padded_length(len(prompt))), np.zeros((1, 1), np.int32))
    traced = (jax.random.key(seed), temperature, top_p)
    return _tokens(functions, max_new_tokens, options, ids_of_ends(model, eos_id), params, rows, traced)


def padded_length(length: int) -> int:
    """Returns the number of tokens that a prompt is padded to: a power of two, at least `SHORTEST`."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _tokens(
    functions: tuple,
    new_tokens: int,
    options: StaticOptions,
    ends: tuple[int, ...],
    params: Any,
    rows: Any,
    traced: Any,
) -> Iterator[int]:
    """Yields the tokens of a continuation; arguments as for `sampling.first_token`."""
    fixed, state = _begin(functions, (new_tokens, new_tokens), options, ends, params, rows, traced)
    for made in range(1, new_tokens + 1):
        token, alive = distributed.fetch((state.last, state.alive))
        yield int(token[0])
        if made == new_tokens or not alive[0]:
            return
        state = _go_on(functions, options, ends, fixed, state)


_begin = partial(jax.jit, static_argnums=(0, 1, 2, 3))(first_token)
# The state is donated: its cache is changed in place.
_go_on = partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))(next_token)
