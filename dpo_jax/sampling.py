"""Text from a model: generation with a cache of keys and values, compiled once a shape."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import distributed, sharding
from dpo_jax.errors import UserError
from dpo_jax.models.attention import capped
from dpo_jax.models.decoder import extend_cache
from dpo_jax.models.model import Model
from dpo_jax.records import Array

MULTIPLE = 32  # prompts are padded to a multiple of it, so that few lengths are compiled
ROOM = 32  # tokens that the cache has room for at first; it grows fourfold, for attention reads what is not used too
SMALL = 2**28  # bytes of parameters, which every batch that runs copies
BLOCK = 128  # tokens of the vocabulary that are drawn among together


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Array],
    *,
    copies: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | tuple[int, ...],
    seed: int = 0,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Continues each prompt until an end-of-sequence token, as often as `copies` says.

    The prompt is read once for all its copies. The random numbers of a continuation depend on the seed and its place in
    the result only, not on the batch it is in or on the device: copies are as the same prompt given so often.

    Prompts are spread over the devices on which the parameters lie, or over all of this process if they lie on none;
    few prompts, with their copies in parts. Parameters are copied once for each batch, in the compute dtype.

    Args:
      model: the architecture's pure functions.
      params: its parameters; of several processes that share a mesh, all call this with the same prompts.
      prompts: ids, at least one each.
      copies: continuations of each prompt.
      max_new_tokens: tokens after which a continuation is cut.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw among this many likeliest tokens only.
      top_p: draw among the fewest likeliest tokens that hold this much probability only.
      eos_id: the token, or tokens, that end a text.
      seed: of the random numbers.
      batch_size: continuations at a time, on all devices together.

    Returns:
      int32 ids of each continuation, those of a prompt together, without the prompt, with the end-of-sequence token if
      it was reached.

    Raises:
      UserError: an empty prompt, a setting out of range, or more tokens than the model has positions.
    """
    _check(model, prompts, copies, max_new_tokens, temperature, top_k, top_p)
    mesh, params = sharding.mesh_and_params(params)
    filters = _Filters(temperature > 0, top_k, model.architecture.logit_cap)
    functions, ends = (model.prefill, model.unstack, model.decode, model.head), tuple(np.atleast_1d(eos_id).tolist())
    fixed, others = (mesh, functions, max_new_tokens, filters, ends), (jax.random.key(seed), temperature, top_p)
    out: list[np.ndarray] = [np.zeros(0, np.int32)] * (len(prompts) * copies)

    def write(chosen: np.ndarray, numbers: np.ndarray) -> None:
        rows = (*_pad([np.asarray(prompts[i]) for i in chosen], len(numbers)), numbers)
        new, lengths = distributed.fetch(_generate(*fixed, params, rows, others))
        for row, number in enumerate(numbers.ravel()):
            if number >= 0:
                out[number] = new[row, : lengths[row]]

    batches = _batches([len(p) for p in prompts], copies, batch_size, sharding.row_devices(mesh))
    _run([partial(write, *batch) for batch in batches], params)
    return out


def _run(batches: Sequence[Callable[[], None]], params: Any) -> None:
    """Samples batches, of a small model several at a time; the first alone, so that its program is compiled once."""
    small = sum(x.nbytes for x in jax.tree.leaves(params)) < SMALL
    distributed.run_concurrently(batches[:1], 1)
    distributed.run_concurrently(batches[1:], distributed.concurrent_programs() if small else 1)


def _batches(lengths: list[int], copies: int, batch_size: int, devices: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields places of prompts, and the places of their continuations int32[prompts, continuations], -1 where none is.

    Every batch has the same shape, so many prompts that each device has as many, and prompts of like lengths are
    together, for the least padding. A prompt occurs again where its copies are too many for one place.
    """
    many = min(copies, batch_size, -(-len(lengths) * copies // devices))
    places = [(prompt, first) for prompt in np.argsort(lengths, kind="stable") for first in range(0, copies, many)]
    few = -(-max(1, min(batch_size // max(many, 1), len(places))) // devices) * devices
    for start in range(0, len(places), few):
        chosen, first = np.transpose(places[start : start + few])
        numbers = np.full((few, many), -1, np.int32)
        copy = first[:, None] + np.arange(many)
        numbers[: len(chosen)] = np.where(copy < copies, chosen[:, None] * copies + copy, -1)
        yield chosen, numbers


class _Filters(NamedTuple):
    """What is compiled into the program: whether tokens are drawn at random, among how many, and the logits' cap."""

    random: bool
    top_k: int | None
    cap: float | None = None


class _State(NamedTuple):
    """Between two tokens: `made` tokens a row so far, in `out` [B, N]; `alive` rows go on; `last` is the newest."""

    made: Array
    out: Array
    lengths: Array
    alive: Array
    last: Array
    cache: Any


def filter_logits(logits: Array, top_k: int | None, top_p: Array | float | None) -> Array:
    """Returns float32 logits [B, V] with -inf where a token may not be drawn, top_k applied before top_p.

    The likeliest token always stays, and with it those of equal probability to the least likely that is kept.
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ranked, axis=-1)
        kept = jnp.maximum((jnp.cumsum(p, axis=-1) - p < top_p).sum(-1, keepdims=True), 1)
        logits = jnp.where(logits < jnp.take_along_axis(ranked, kept - 1, axis=-1), -jnp.inf, logits)
    return logits


def choose_tokens(logits: Array, keys: Array, filters: _Filters, top_p: Array | None) -> Array:
    """Returns the next token int32[B] of each row of logits float32[B, V], drawn with the row's own key."""
    if not filters.random:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return sample_tokens(filter_logits(logits, filters.top_k, top_p), keys)


def sample_tokens(logits: Array, keys: Array) -> Array:
    """Returns a token int32[B] of each row of logits float32[B, V], drawn with probability softmax(logits).

    First a block of tokens is drawn by its sum, then one of the block: two random numbers a row, where the usual way
    of adding noise to every logit takes V. The tokens of a block lie V / BLOCK apart, so that neighbours are added to
    neighbours; their exponentials are computed once for the sum and again for the block that is drawn, never stored.
    """
    logits = jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % BLOCK)), constant_values=-jnp.inf)
    blocks = logits.reshape(len(logits), BLOCK, -1)
    top = blocks.max((1, 2), keepdims=True)
    numbers = jax.vmap(partial(jax.random.uniform, shape=(2,)))(keys)
    block = _reached(jnp.exp(blocks - top).sum(1), numbers[:, 0])
    inside = jnp.exp(jnp.take_along_axis(blocks, block[:, None, None], axis=2) - top)[..., 0]
    return block + blocks.shape[2] * _reached(inside, numbers[:, 1])


def _reached(weights: Array, fraction: Array) -> Array:
    """Returns int32[B]: the first place at which the sum of weights [B, K] so far is above a fraction [B] of all."""
    so_far = jnp.cumsum(weights, axis=-1)
    # A fraction just below 1 may round to the whole sum, which is reached at the last weight that is not 0.
    reached = (so_far > fraction[:, None] * so_far[:, -1:]) | (so_far >= so_far[:, -1:])
    return jnp.argmax(reached, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(
    mesh: Any,
    functions: tuple[Callable[..., Any], ...],
    new_tokens: int,
    filters: _Filters,
    ends: tuple[int, ...],
    params: Any,
    rows: tuple[Array, Array, Array],
    others: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    """Returns `_continued` of rows that are spread over the devices of a mesh."""
    return sharding.independent_rows(mesh, partial(_continued, functions, new_tokens, filters, ends))(
        params, rows, others
    )


def _continued(
    functions: tuple[Callable[..., Any], ...],
    new_tokens: int,
    filters: _Filters,
    ends: tuple[int, ...],
    params: Any,
    rows: tuple[Array, Array, Array],
    others: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    """Returns new tokens [B, N] and how many of each row are meant.

    `rows` are tokens and mask of prompts [P, T], which end at the right, and the numbers [P, B / P] of their
    continuations; `others` are the key, the temperature and top_p.
    """
    prefill, unstack, decode, head = functions
    (tokens, mask, numbers), (key, temperature, top_p) = rows, others
    copies, numbers = numbers.shape[1], numbers.ravel()
    sizes = jnp.repeat(mask.sum(-1), copies)
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)

    def pick(state: _State, hidden: Array, cache: Any) -> _State:
        logits = jnp.einsum("bd,vd->bv", hidden, weight, preferred_element_type=jnp.float32)
        logits = capped(logits, cap).at[:, vocab:].set(-jnp.inf)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.made)
        token = choose_tokens(logits, keys, filters, top_p)
        ended = (token[:, None] == jnp.asarray(ends, jnp.int32)).any(-1)
        out = jax.lax.dynamic_update_slice_in_dim(state.out, token[:, None], state.made, axis=1)
        return _State(state.made + 1, out, state.lengths + state.alive, state.alive & ~ended, token, cache)

    def step(state: _State) -> _State:
        before = state.made - 1  # the newest token is not yet in the cache
        hidden, cache = decode(layers, state.last, sizes + before, state.cache, mask > 0, before)
        return pick(state, hidden, cache)

    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    rooms = _rooms(max(1, new_tokens - 1))  # the last token is not read
    hidden, cache = prefill(params, tokens, positions, mask, copies, rooms[0])
    layers, (weight, vocab), cap = unstack(params), _padded(head(params)), filters.cap
    if filters.random:  # logits are divided by it once for all tokens
        weight, cap = weight / temperature, None if cap is None else cap / temperature
    weight = weight.astype(hidden.dtype)
    zeros = jnp.zeros_like(numbers)
    first = _State(jnp.int32(0), jnp.zeros((len(numbers), new_tokens), jnp.int32), zeros, numbers >= 0, zeros, None)
    state = pick(first, jnp.repeat(hidden[:, -1], copies, axis=0), cache)
    for room in rooms:
        state = state._replace(cache=extend_cache(state.cache, room))
        most = min(room + 1, new_tokens)
        state = jax.lax.while_loop(lambda s, most=most: (s.made < most) & s.alive.any(), step, state)
    return state.out, state.lengths


def _rooms(most: int) -> list[int]:
    """Returns the sizes that a cache has one after another until there is room for `most` tokens."""
    sizes = [ROOM]
    while sizes[-1] < most:
        sizes.append(4 * sizes[-1])
    return [*sizes[:-1], most]


def _padded(weight: Array) -> tuple[Array, int]:
    """Returns a head [V, D] with rows of zeros, so that blocks of its tokens are full, and V."""
    vocab = len(weight)
    return jnp.pad(weight, ((0, -vocab % BLOCK), (0, 0))), vocab


def _pad(prompts: list[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask int32[rows, T]: prompts end at the right, padding and unused rows have mask 0."""
    length = -(-max(len(p) for p in prompts) // MULTIPLE) * MULTIPLE
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return tokens, mask


def _check(
    model: Model,
    prompts: Sequence[Array],
    copies: int,
    new: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Raises UserError for what cannot be sampled."""
    if copies < 1:
        raise UserError(f"copies = {copies}: it must be at least 1")
    if new < 1:
        raise UserError(f"max_new_tokens = {new}: it must be at least 1")
    if temperature < 0:
        raise UserError(f"temperature = {temperature}: it must be at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}: it must be above 0 and at most 1")
    sizes = [len(p) for p in prompts]
    if 0 in sizes:
        raise UserError(f"prompt {sizes.index(0) + 1} has no tokens; a prompt needs at least one")
    a, most = model.architecture, max(sizes, default=0) + new
    if (a.rope is None or a.rope.scaling == "longrope") and most > a.max_positions:
        why = f"the longest prompt and {new} new tokens are {most}, the model has {a.max_positions} positions"
        raise UserError(f"max_new_tokens = {new}: {why}; give a smaller number or shorter prompts")
