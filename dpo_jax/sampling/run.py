"""Sampling of many texts: compiled once per shape; the host looks where texts have ended, and compacts batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed, sharding
from dpo_jax.models.interface import Model
from dpo_jax.records import Array
from dpo_jax.sampling.checks import check_sampling, ids_of_ends, takes_int8
from dpo_jax.sampling.decode import Draw, Rows, Sampler, SamplingState, Weights, add_tokens, first_token, move_rows
from dpo_jax.sampling.placement import Placement, gathering, shard_weights, weight_shapes
from dpo_jax.sampling.slots import (
    as_they_are,
    cache_sizes,
    compacted,
    moved,
    pad_prompts,
    prompt_batches,
    smaller_shape,
)

PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None}  # samples of the model's own distribution
SMALL_MODEL = 2**28  # bytes of parameters up to which batches run concurrently; a larger one fills the cores alone


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Array],
    *,
    copies: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    weights: str | None = None,
) -> list[np.ndarray]:
    """Samples `copies` continuations of each prompt, up to an end-of-sequence token.

    The prefill of a prompt is shared by its copies. The random numbers of a continuation depend only on the seed and on
    its index in the result, not on batches or devices; copies equal repetitions of the prompt.

    Prompts are sharded over the devices of the parameters, or over all of this process for host arrays, and so are the
    copies of few prompts. Parameters are copied once, in the compute dtype; sharded ones whose copy would take more
    than a quarter of a device's memory stay sharded. A batch is compacted when few texts still go on.

    Args:
      model: pure functions of the architecture.
      params: its parameters. Processes that share their mesh all call this with the same prompts.
      prompts: token ids, at least one per prompt.
      copies: continuations per prompt.
      max_new_tokens: maximum length of a continuation, in tokens.
      temperature: divides the logits; 0 is greedy.
      top_k: sample from the k most likely tokens only.
      top_p: sample from the smallest set of most likely tokens with at least this probability.
      eos_id: the token id, or ids, that end a text; None: those of the folder that the model was loaded from.
      seed: of the random numbers.
      batch_size: continuations at a time, over all devices.
      weights: "int8": new tokens are read with kernels in 8 bits, which changes the distribution a little.

    Returns:
      int32 ids of each continuation, grouped by prompt; the last one ends the text, unless the maximum came first.

    Raises:
      UserError: an option out of range, or more tokens than the model has positions.
    """
    check_sampling(model.architecture, prompts, copies, max_new_tokens, temperature, top_k, top_p)
    mesh, params = sharding.mesh_and_params(params)
    placement = Placement.of(model.architecture, model.compute, mesh, params)
    sampler = sampler_of(model, max_new_tokens, temperature, eos_id, takes_int8(weights, params, placement.shares))
    batches = list(prompt_batches([len(p) for p in prompts], copies, batch_size, sharding.independent_devices(mesh)))
    made = params["layers"], _prepare(sampler, placement, params, temperature)
    key_and_draw, out = (jax.random.key(seed), Draw.of(temperature, top_k, top_p)), {}

    def write(chosen: np.ndarray, indices: np.ndarray) -> None:
        rows = (*pad_prompts([np.asarray(prompts[i]) for i in chosen], len(indices)), indices)
        for texts in _texts(sampler, placement, made, rows, key_and_draw):
            out.update(texts)

    _run_batches([partial(write, *batch) for batch in batches], params)
    return [out[index] for index in range(len(prompts) * copies)]


def sampler_of(
    model: Model, new_tokens: int, temperature: float, eos_id: int | tuple[int, ...] | None, int8: bool = False
) -> Sampler:
    """Returns the sampler of a model; arguments as for `generate`."""
    functions, a = (model.prefill, model.unstack, model.decode, model.head), model.architecture
    ends = ids_of_ends(model.end_ids, eos_id)
    return Sampler(*functions, model.compute, a.vocab, a.logit_cap, new_tokens, ends, temperature > 0, int8)


def lower_generate(
    model: Model, params: Any, lengths: list[int], *, max_new_tokens: int, temperature: float, top_k: int | None,
    top_p: float | None, eos_id: int, batch_size: int = 32, memory: float | None = None,
) -> Any:  # fmt: skip
    """Returns the lowered program that begins a batch of `generate`, with room for all tokens: the one that holds most.

    Args:
      model, max_new_tokens, temperature, top_k, top_p, eos_id, batch_size: as for `generate`.
      params: shapes with shardings.
      lengths: tokens of each prompt.
      memory: bytes of a device that is not here.
    """
    mesh, params = sharding.mesh_and_params(params)
    sampler = sampler_of(model, max_new_tokens, temperature, eos_id)
    placement = Placement.of(model.architecture, model.compute, mesh, params, memory)
    chosen, indices = next(prompt_batches(lengths, 1, batch_size, sharding.independent_devices(mesh)))
    rows = (*pad_prompts([np.zeros(max(lengths), np.int32) for _ in chosen], len(indices)), indices)
    weights = params["layers"], weight_shapes(placement, sampler, params)
    draw = jax.eval_shape(jax.random.key, 0), Draw.of(temperature, top_k, top_p)
    return _begin.lower(sampler, placement, cache_sizes(max(1, max_new_tokens - 1))[-1], weights, rows, draw)


def _run_batches(batches: Sequence[Callable[[], None]], params: Any) -> None:
    """Runs batches, those of a small model concurrently; the first one alone, so that the program compiles once."""
    small = sum(x.nbytes for x in jax.tree.leaves(params)) < SMALL_MODEL
    distributed.run_concurrently(batches[:1], 1)
    distributed.run_concurrently(batches[1:], distributed.concurrent_programs() if small else 1)


def _texts(
    sampler: Sampler, placement: Placement, weights: tuple[Any, Weights], rows: tuple[Array, ...], key_and_draw: Any
) -> Iterator[dict[int, np.ndarray]]:
    """Yields texts when rows leave the batch: index of the continuation -> ids; a later one replaces an earlier one.

    Args:
      sampler: what is compiled.
      placement: of the parameters.
      weights: the model's layers, stacked, and the parameters of decoding.
      rows: tokens and mask of left-padded prompts int32[P, T], and indices int32[P, C] of their continuations.
      key_and_draw: random key, and a `Draw`.
    """
    sizes, longest, loops = cache_sizes(max(1, sampler.new_tokens - 1)), sampler.new_tokens, placement.loops
    size, places, left = sizes.pop(0), rows[2], sampler.new_tokens - 1  # the last token is never put into the cache
    fixed, state = _begin(sampler, placement, size, weights, rows, key_and_draw)
    while True:
        limit, shape = min(size + 1, longest), (len(places) // loops, places.shape[1])
        smaller = smaller_shape(*shape, left)
        bounds = np.int32(limit), np.array(smaller or (0, 1), np.int32)
        state = _add(sampler, placement, weights[1], fixed, state, (key_and_draw[1], *bounds))
        made, alive = distributed.fetch((state.made, state.alive))
        alive = alive.reshape(loops, *shape) & (made < longest)[:, None, None]
        moves = compacted(alive, smaller) if smaller else None
        if moves or not alive.any():
            new, lengths = distributed.fetch((state.out, state.lengths))
            yield {index: new[row, : lengths[row]] for row, index in enumerate(places.ravel().tolist())}
        if not alive.any():
            return
        going = made[alive.any((1, 2))]
        left, size = longest - int(going.min()), sizes.pop(0) if going.max() == limit else size
        moves = moves or as_they_are(loops, *shape)
        fixed, state = _move(placement, size, (fixed, state), moves)
        places = moved(places, moves[1], loops)


@partial(jax.jit, static_argnums=(0, 1))
def _prepare(sampler: Sampler, placement: Placement, params: Any, temperature: Array) -> Weights:
    """Returns `Weights` on the devices of a placement."""
    return shard_weights(placement, sampler, params, temperature)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(
    sampler: Sampler, placement: Placement, room: int, weights: tuple[Any, Weights], rows: tuple[Array, ...], draw: Any
) -> tuple[Rows, SamplingState]:
    """Returns `first_token` of rows that are sharded over the devices."""
    begin = partial(first_token, sampler, room, gathering(placement, sampler))
    specs = placement.specs["layers"], placement.weight_specs
    return sharding.independent_rows(placement.mesh, begin, specs)(weights, rows, draw)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))  # the cache is changed in place
def _add(
    sampler: Sampler, placement: Placement, weights: Weights, rows: Rows, state: SamplingState, others: Any
) -> SamplingState:
    """Returns `add_tokens` of rows that are sharded over the devices."""
    add = partial(add_tokens, sampler, gathering(placement, sampler))
    return sharding.independent_rows(placement.mesh, add, placement.weight_specs)(weights, (rows, state), others)


@partial(jax.jit, static_argnums=(0, 1))
def _move(placement: Placement, room: int, batch: tuple[Rows, SamplingState], index: tuple[Array, Array]) -> Any:
    """Returns `move_rows` of rows that are sharded over the devices, and stay on theirs."""
    move = sharding.independent_rows(placement.mesh, lambda _, rows, __: move_rows(room, *rows))
    return move(None, (batch, index), None)
