"""Sampling from a model with a cache of keys and values; compiled once per shape."""

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

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of it, so that few lengths are compiled
CACHE_TOKENS = 32  # initial size of the cache; it grows fourfold, because attention also reads its unused part
SMALL_MODEL = 2**28  # bytes of parameters up to which batches run concurrently; each of them copies the parameters
BLOCK = 128  # tokens of the vocabulary per block, see `sample_tokens`
PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None}  # samples of the model's own distribution


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
) -> list[np.ndarray]:
    """Samples `copies` continuations of each prompt, up to an end-of-sequence token.

    The prefill of a prompt is shared by its copies. The random numbers of a continuation depend only on the seed and on
    its index in the result, not on batches or devices; copies equal repetitions of the prompt.

    Prompts are sharded over the devices of the parameters, or over all devices of this process for host arrays. The
    copies of few prompts are sharded too. Parameters are copied once per batch, in the compute dtype.

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

    Returns:
      int32 token ids of each continuation, grouped by prompt; without the prompt, and with the end-of-sequence token if
      it was reached.

    Raises:
      UserError: an empty prompt, an option out of range, or more tokens than the model has positions.
    """
    check_sampling(model, prompts, copies, max_new_tokens, temperature, top_k, top_p)
    mesh, params = sharding.mesh_and_params(params)
    static = _static(mesh, model, max_new_tokens, temperature, top_k, eos_id)
    traced = jax.random.key(seed), temperature, top_p
    out: list[np.ndarray] = [np.zeros(0, np.int32)] * (len(prompts) * copies)

    def write(chosen: np.ndarray, indices: np.ndarray) -> None:
        rows = (*pad_prompts([np.asarray(prompts[i]) for i in chosen], len(indices)), indices)
        new, lengths = distributed.fetch(_generate(*static, params, rows, traced))
        for row, index in enumerate(indices.ravel()):
            if index >= 0:
                out[index] = new[row, : lengths[row]]

    batches = _prompt_batches([len(p) for p in prompts], copies, batch_size, sharding.independent_devices(mesh))
    _run_batches([partial(write, *batch) for batch in batches], params)
    return out


def lower_generate(
    model: Model, params: Any, lengths: list[int], *, max_new_tokens: int, temperature: float,
    top_k: int | None, top_p: float | None, eos_id: int, batch_size: int = 32,
) -> Any:  # fmt: skip
    """Returns the lowered program of `generate` for prompts of these lengths; `params` are shapes with shardings."""
    mesh, params = sharding.mesh_and_params(params)
    chosen, indices = next(_prompt_batches(lengths, 1, batch_size, sharding.independent_devices(mesh)))
    rows = (*pad_prompts([np.zeros(max(lengths), np.int32) for _ in chosen], len(indices)), indices)
    static = _static(mesh, model, max_new_tokens, temperature, top_k, eos_id)
    return _generate.lower(*static, params, rows, (jax.eval_shape(jax.random.key, 0), temperature, top_p))


def _static(mesh: Any, model: Model, new_tokens: int, temperature: float, top_k: int | None, eos_id: Any) -> tuple:
    """Returns the static arguments of `_generate`."""
    options = StaticOptions(temperature > 0, top_k, model.architecture.logit_cap)
    functions = model.prefill, model.unstack, model.decode, model.head
    return mesh, functions, new_tokens, options, ids_of_ends(model, eos_id)


def ids_of_ends(model: Model, eos_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the ids that end a text: those given, else those of the model's folder; without any, a UserError."""
    if eos_id is None and not model.end_ids:
        raise UserError("eos_id: the model was not loaded from a folder that names it; give tokenizer.eos_token_id")
    return tuple(np.atleast_1d(model.end_ids if eos_id is None else eos_id).tolist())


def _run_batches(batches: Sequence[Callable[[], None]], params: Any) -> None:
    """Runs batches, those of a small model concurrently; the first one alone, so that the program compiles once."""
    small = sum(x.nbytes for x in jax.tree.leaves(params)) < SMALL_MODEL
    distributed.run_concurrently(batches[:1], 1)
    distributed.run_concurrently(batches[1:], distributed.concurrent_programs() if small else 1)


def _prompt_batches(
    lengths: list[int], copies: int, batch_size: int, devices: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches: indices of P prompts, and indices of their continuations int32[P, C], -1 for padding.

    All batches have the same shape, with the same number of prompts on each device. Prompts are sorted by length, for
    the least padding. A prompt with more than C copies occurs several times.
    """
    per_prompt = min(copies, batch_size, -(-len(lengths) * copies // devices))
    parts = [(prompt, first) for prompt in np.argsort(lengths, kind="stable") for first in range(0, copies, per_prompt)]
    per_batch = -(-max(1, min(batch_size // max(per_prompt, 1), len(parts))) // devices) * devices
    for start in range(0, len(parts), per_batch):
        chosen, first = np.transpose(parts[start : start + per_batch])
        indices = np.full((per_batch, per_prompt), -1, np.int32)
        copy = first[:, None] + np.arange(per_prompt)
        indices[: len(chosen)] = np.where(copy < copies, chosen[:, None] * copies + copy, -1)
        yield chosen, indices


class StaticOptions(NamedTuple):
    """Sampling options that are compiled into the program.

    Attributes:
      random: sample at random; False is greedy.
      top_k: number of most likely tokens to sample from; None for all.
      cap: soft cap of the logits; None for none.
    """

    random: bool
    top_k: int | None
    cap: float | None = None


class SamplingState(NamedTuple):
    """The state between two tokens.

    Attributes:
      made: int32, tokens sampled per row so far.
      out: int32[B, N], the sampled tokens.
      lengths: int32[B], lengths of the continuations.
      alive: bool[B], rows that have not ended.
      last: int32[B], the newest tokens.
      cache: keys and values of all tokens before `last`.
    """

    made: Array
    out: Array
    lengths: Array
    alive: Array
    last: Array
    cache: Any


class FixedParts(NamedTuple):
    """What is the same for all tokens of a batch.

    Attributes:
      layers: decode-time parameters.
      weight: the head, padded and divided by the temperature.
      vocab: V, the tokens before the padding.
      cap: soft cap of the logits; None for none.
      prompt_lengths: int32[B].
      mask: int32[P, T] of the left-padded prompts.
      row_keys: random keys [B].
      top_p: as for `generate`.
    """

    layers: Any
    weight: Array
    vocab: Array | int
    cap: Any
    prompt_lengths: Array
    mask: Array
    row_keys: Array
    top_p: Array | None


def filter_logits(logits: Array, top_k: int | None, top_p: Array | float | None) -> Array:
    """Returns float32 logits [B, V] with -inf for excluded tokens; top_k is applied before top_p.

    The most likely token is always kept, and so are tokens as likely as the least likely one that is kept.
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


def choose_tokens(logits: Array, keys: Array, options: StaticOptions, top_p: Array | None) -> Array:
    """Returns the next token int32[B] of each row of logits float32[B, V]; keys [B] are of the rows."""
    if not options.random:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return sample_tokens(filter_logits(logits, options.top_k, top_p), keys)


def sample_tokens(logits: Array, keys: Array) -> Array:
    """Returns tokens int32[B] sampled with probability softmax(logits), from logits float32[B, V] and keys [B].

    First a block of tokens is sampled by its total probability, then a token of the block: two random numbers per row,
    where Gumbel noise takes V. The tokens of a block are V / BLOCK apart, so that sums add contiguous vectors.
    Exponentials are computed for the sums, and again for the sampled block, but never stored.
    """
    logits = jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % BLOCK)), constant_values=-jnp.inf)
    blocks = logits.reshape(len(logits), BLOCK, -1)
    top = blocks.max((1, 2), keepdims=True)
    uniform = jax.vmap(partial(jax.random.uniform, shape=(2,)))(keys)
    block = _sample_index(jnp.exp(blocks - top).sum(1), uniform[:, 0])
    inside = jnp.exp(jnp.take_along_axis(blocks, block[:, None, None], axis=2) - top)[..., 0]
    return block + blocks.shape[2] * _sample_index(inside, uniform[:, 1])


def _sample_index(weights: Array, fraction: Array) -> Array:
    """Returns int32[B], the first index at which the cumulative sum of weights [B, K] exceeds a fraction [B] of all."""
    so_far = jnp.cumsum(weights, axis=-1)
    # A fraction just below 1 may round to the full sum, which is reached at the last weight that is not 0.
    reached = (so_far > fraction[:, None] * so_far[:, -1:]) | (so_far >= so_far[:, -1:])
    return jnp.argmax(reached, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(
    mesh: Any,
    functions: tuple[Callable[..., Any], ...],
    new_tokens: int,
    options: StaticOptions,
    ends: tuple[int, ...],
    params: Any,
    rows: tuple[Array, Array, Array],
    traced: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    """Returns `_continue_rows` with rows sharded over the devices of a mesh."""
    return sharding.independent_rows(mesh, partial(_continue_rows, functions, new_tokens, options, ends))(
        params, rows, traced
    )


def _continue_rows(
    functions: tuple[Callable[..., Any], ...],
    new_tokens: int,
    options: StaticOptions,
    ends: tuple[int, ...],
    params: Any,
    rows: tuple[Array, Array, Array],
    traced: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    """Returns the continuations int32[B, N] of a batch, and their lengths int32[B].

    Args:
      functions: prefill, unstack, decode and head of the model.
      new_tokens: N, the maximum length.
      options: compiled sampling options.
      ends: ids of the end-of-sequence tokens.
      params: parameters of the model.
      rows: tokens and mask of left-padded prompts int32[P, T], and indices int32[P, C] of their continuations, P C = B.
      traced: random key, temperature and top_p.
    """
    cache_sizes = _cache_sizes(max(1, new_tokens - 1))  # the last token is never put into the cache
    fixed, state = first_token(functions, (new_tokens, cache_sizes[0]), options, ends, params, rows, traced)
    step = partial(next_token, functions, options, ends, fixed)
    for size in cache_sizes:
        state = state._replace(cache=extend_cache(state.cache, size))
        limit = min(size + 1, new_tokens)
        state = jax.lax.while_loop(lambda s, limit=limit: (s.made < limit) & s.alive.any(), step, state)
    return state.out, state.lengths


def first_token(
    functions: tuple[Callable[..., Any], ...],
    sizes: tuple[int, int],
    options: StaticOptions,
    ends: tuple[int, ...],
    params: Any,
    rows: tuple[Array, Array, Array],
    traced: tuple[Array, Array, Array | None],
) -> tuple[FixedParts, SamplingState]:
    """Returns the constants of a batch, and the state after its first token.

    `sizes` are the maximum length and the size of the cache; the other arguments are those of `_continue_rows`.
    """
    prefill, unstack, _, head = functions
    (tokens, mask, indices), (key, temperature, top_p) = rows, traced
    copies, indices = indices.shape[1], indices.ravel()
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    hidden, cache = prefill(params, tokens, positions, mask, copies, sizes[1])
    layers, (weight, vocab), cap = unstack(params), _pad_vocab(head(params)), options.cap
    if options.random:  # divide the head once instead of the logits of every token
        weight, cap = weight / temperature, None if cap is None else cap / temperature
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(indices)
    lengths = jnp.repeat(mask.sum(-1), copies)
    fixed = FixedParts(layers, weight.astype(hidden.dtype), vocab, cap, lengths, mask, row_keys, top_p)
    zeros, out = jnp.zeros_like(indices), jnp.zeros((len(indices), sizes[0]), jnp.int32)
    first = SamplingState(jnp.int32(0), out, zeros, indices >= 0, zeros, None)
    return fixed, _pick_token(options, ends, fixed, first, jnp.repeat(hidden[:, -1], copies, axis=0), cache)


def next_token(
    functions: tuple[Callable[..., Any], ...],
    options: StaticOptions,
    ends: tuple[int, ...],
    fixed: FixedParts,
    state: SamplingState,
) -> SamplingState:
    """Returns the state after one more token of each row."""
    before = state.made - 1  # the newest token is not yet in the cache
    places = fixed.prompt_lengths + before
    hidden, cache = functions[2](fixed.layers, state.last, places, state.cache, fixed.mask > 0, before)
    return _pick_token(options, ends, fixed, state, hidden, cache)


def _pick_token(
    options: StaticOptions, ends: tuple[int, ...], fixed: FixedParts, state: SamplingState, hidden: Array, cache: Any
) -> SamplingState:
    """Returns the state with a token chosen by the hidden states [B, D] of the newest tokens."""
    logits = jnp.einsum("bd,vd->bv", hidden, fixed.weight, preferred_element_type=jnp.float32)
    logits = jnp.where(jnp.arange(logits.shape[1]) < fixed.vocab, capped(logits, fixed.cap), -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(fixed.row_keys, state.made)
    token = choose_tokens(logits, keys, options, fixed.top_p)
    ended = (token[:, None] == jnp.asarray(ends, jnp.int32)).any(-1)
    out = jax.lax.dynamic_update_slice_in_dim(state.out, token[:, None], state.made, axis=1)
    return SamplingState(state.made + 1, out, state.lengths + state.alive, state.alive & ~ended, token, cache)


def _cache_sizes(tokens: int) -> list[int]:
    """Returns the sizes of a growing cache, in tokens; the last one is `tokens`."""
    sizes = [CACHE_TOKENS]
    while sizes[-1] < tokens:
        sizes.append(4 * sizes[-1])
    return [*sizes[:-1], tokens]


def _pad_vocab(weight: Array) -> tuple[Array, int]:
    """Returns a head [V, D] padded with zeros to a multiple of `BLOCK` tokens, and V."""
    vocab = len(weight)
    return jnp.pad(weight, ((0, -vocab % BLOCK), (0, 0))), vocab


def pad_prompts(prompts: list[np.ndarray], rows: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask int32[rows, T] of left-padded prompts; the mask is 0 for padding and unused rows.

    T is `length`, by default a multiple of `PROMPT_MULTIPLE`.
    """
    length = length or -(-max(len(p) for p in prompts) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return tokens, mask


def check_sampling(
    model: Model, prompts: Sequence[Array], copies: int, new: int, temperature: float,
    top_k: int | None, top_p: float | None,
) -> None:  # fmt: skip
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
    if model.architecture.score:
        raise UserError("generate: a reward model generates no text; load a language model")
    lengths = [len(p) for p in prompts]
    if 0 in lengths:
        raise UserError(f"prompt {lengths.index(0) + 1} has no tokens; give at least one")
    a, longest = model.architecture, max(lengths, default=0) + new
    if (a.rope is None or a.rope.scaling == "longrope") and longest > a.max_positions:
        sizes = f"{new} and the longest prompt are {longest} tokens, the model has {a.max_positions} positions"
        raise UserError(f"max_new_tokens: {sizes}; lower it, or shorten the prompts")
