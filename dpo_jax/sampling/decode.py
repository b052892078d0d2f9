"""Sampling on the devices: pure functions that begin a batch, add tokens to it, and move its rows.

Axis letters: P prompts, T tokens of a padded prompt, B = P * C rows, C copies of a prompt, N the most new tokens, D
model width, V vocabulary, padded to whole blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import capped
from dpo_jax.models.cache import move_cache
from dpo_jax.models.layer_embedding import TABLES
from dpo_jax.records import Array
from dpo_jax.sampling.choose import BLOCK, choose_tokens
from dpo_jax.sampling.quantize import quantize_layer

# Parameters outside the layers that decoding reads.
TOP = {*TABLES, "embedding_norm", "positions", "final_norm", "layer_embedding_projection", "layer_embedding_norm"}


class Sampler(NamedTuple):
    """What a program is compiled for.

    Attributes:
      prefill, unstack, decode, head: functions of the model.
      compute: its dtype.
      vocab: its tokens.
      cap: soft cap of its logits; None for none.
      new_tokens: N.
      ends: ids of the tokens that end a text.
      random: sample at random; False is greedy.
      int8: decode with kernels in 8 bits.
    """

    prefill: Callable[..., Any]
    unstack: Callable[[Any], Any]
    decode: Callable[..., Any]
    head: Callable[[Any], Array]
    compute: str
    vocab: int
    cap: float | None
    new_tokens: int
    ends: tuple[int, ...]
    random: bool
    int8: bool = False


class Draw(NamedTuple):
    """How tokens are drawn, as for `generate`: run-time values, None where they do nothing."""

    temperature: Array | float
    top_k: Array | int | None
    top_p: Array | float | None

    @classmethod
    def of(cls, temperature: float, top_k: int | None, top_p: float | None) -> "Draw":
        """Returns the options without those that keep all tokens."""
        return cls(temperature, top_k, None if top_p == 1 else top_p)


class Weights(NamedTuple):
    """Parameters as decoding reads them, made once for all batches.

    Attributes:
      tree: from `Model.unstack`: a list of layers, with kernels in the compute dtype, and the others of `TOP`.
      head: [V, D] in the compute dtype, divided by the temperature.
    """

    tree: Any
    head: Array


def _same(x: Any) -> Any:
    return x


class Gathering(NamedTuple):
    """How devices gather parameters of which each has a part.

    Attributes:
      prefill, decode: keywords of `Model.prefill` and `Model.decode`.
      layer: one layer -> the same, whole.
      top: parameters outside the layers, by name -> the same, whole.
      head: `Weights.head` -> the same, whole.
      agree: a device's wish to go on -> the wish of all that keep step with it.
      hold: the head and the state of a loop over tokens -> the same; XLA gathers the head after it, in the loop.
    """

    prefill: dict[str, Any]
    decode: dict[str, Any]
    layer: Callable[[Any], Any] = _same
    top: Callable[[Any], Any] = _same
    head: Callable[[Array], Array] = _same
    agree: Callable[[Array], Array] = _same
    hold: Callable[[Any], Any] = _same


AS_THEY_ARE = Gathering({}, {})


class Rows(NamedTuple):
    """What is the same for all tokens of a batch.

    Attributes:
      lengths: int32[B], tokens of the row's prompt.
      mask: int32[P, T] of the left-padded prompts.
      keys: random keys [B].
    """

    lengths: Array
    mask: Array
    keys: Array


class SamplingState(NamedTuple):
    """The state between two tokens.

    Attributes:
      made: int32[1], tokens sampled per row so far.
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


def decode_weights(sampler: Sampler, params: Any, with_head: Any, temperature: Array | float) -> Weights:
    """Returns parameters as decoding reads them, with the head of `with_head`, whose last tokens fill a block up."""
    tree = {key: leaf for key, leaf in sampler.unstack(params).items() if key in TOP or key == "layers"}
    if sampler.int8:
        tree["layers"] = [quantize_layer(layer) for layer in tree["layers"]]
    head = sampler.head(with_head)
    if sampler.random:  # divide the head once instead of the logits of every token
        head = head / temperature
    return Weights(tree, jnp.pad(head, ((0, -sampler.vocab % BLOCK), (0, 0))).astype(sampler.compute))


def first_token(
    sampler: Sampler, room: int, use: Gathering, weights: tuple[Any, Weights], rows: tuple[Array, ...], draw: Any
) -> tuple[Rows, SamplingState]:
    """Returns the constants of a batch, and the state after its first token.

    Args:
      sampler: what is compiled.
      room: tokens that the cache has room for.
      use: how parameters are gathered.
      weights: the model's layers, stacked, and the parameters of decoding.
      rows: tokens and mask of left-padded prompts int32[P, T], and indices int32[P, C] of their continuations.
      draw: random key, and a `Draw`.
    """
    (layers, weights), (tokens, mask, indices), (key, draw) = weights, rows, draw
    copies, indices = indices.shape[1], indices.ravel()
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    params = {**weights.tree, "layers": layers}
    hidden, cache = sampler.prefill(params, tokens, positions, mask, copies, room, **use.prefill)
    keys = jax.vmap(partial(jax.random.fold_in, key))(indices)
    rows = Rows(jnp.repeat(mask.sum(-1), copies), mask, keys)
    zeros, out = jnp.zeros_like(indices), jnp.zeros((len(indices), sampler.new_tokens), jnp.int32)
    state = SamplingState(jnp.zeros(1, jnp.int32), out, zeros, indices >= 0, zeros, None)
    hidden = jnp.repeat(hidden[:, -1], copies, axis=0)
    return rows, _pick_token(sampler, use.head(weights.head), rows, draw, state, hidden, cache)


def next_token(
    sampler: Sampler, use: Gathering, weights: Weights, rows: Rows, draw: Draw, state: SamplingState
) -> SamplingState:
    """Returns the state after one more token of each row."""
    before = state.made[0] - 1  # the newest token is not yet in the cache
    place = rows.lengths + before
    hidden, cache = sampler.decode(weights.tree, state.last, place, state.cache, rows.mask > 0, before, **use.decode)
    return _pick_token(sampler, use.head(weights.head), rows, draw, state, hidden, cache)


def _pick_token(
    sampler: Sampler, head: Array, rows: Rows, draw: Draw, state: SamplingState, hidden: Array, cache: Any
) -> SamplingState:
    """Returns the state with a token chosen by the hidden states [B, D] of the newest tokens."""
    logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
    cap = sampler.cap / draw.temperature if sampler.cap and sampler.random else sampler.cap
    logits = capped(logits, cap)
    if padding := logits.shape[1] - sampler.vocab:  # written in place: `where` would read and write all logits
        impossible = jnp.full((len(logits), padding), -jnp.inf)
        logits = jax.lax.dynamic_update_slice_in_dim(logits, impossible, sampler.vocab, axis=1)
    keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, state.made[0])
    token = choose_tokens(logits, keys, sampler.random, draw.top_k, draw.top_p)
    ended = (token[:, None] == jnp.asarray(sampler.ends, jnp.int32)).any(-1)
    out = jax.lax.dynamic_update_slice_in_dim(state.out, token[:, None], state.made[0], axis=1)
    return SamplingState(state.made + 1, out, state.lengths + state.alive, state.alive & ~ended, token, cache)


def add_tokens(
    sampler: Sampler,
    use: Gathering,
    weights: Weights,
    batch: tuple[Rows, SamplingState],
    others: tuple[Draw, Array, Array],
) -> SamplingState:
    """Returns the state when its rows have `limit` tokens, or when those still alive fit into fewer rows.

    Args:
      sampler: what is compiled.
      use: how parameters are gathered.
      weights: the parameters.
      batch: constants and state.
      others: a `Draw`, the limit, and int32[2]: P and C of the smaller batch; P is 0 without one.
    """
    (rows, state), (draw, limit, smaller) = batch, others

    def going(s: SamplingState) -> Array:
        living = s.alive.reshape(len(rows.mask), -1).sum(-1)
        return use.agree((s.made[0] < limit) & ((-(-living // smaller[1])).sum() > smaller[0]))

    def one(carry: tuple[SamplingState, Array]) -> tuple[SamplingState, Array]:
        head, s = use.hold((weights.head, carry[0]))
        s = next_token(sampler, use, weights._replace(head=head), rows, draw, s)
        return s, going(s)

    return jax.lax.while_loop(lambda carry: carry[1], one, (state, going(state)))[0]


def move_rows(
    capacity: int, batch: tuple[Rows, SamplingState], moves: tuple[Array, Array]
) -> tuple[Rows, SamplingState]:
    """Returns a batch with other rows, and room for `capacity` new tokens in its cache.

    Args:
      capacity: tokens.
      batch: constants and state.
      moves: the former places of prompts int32[P] and of rows int32[P, C], -1 for none.
    """
    (rows, state), (prompts, places) = batch, moves
    places, there = jnp.maximum(places.ravel(), 0), places.ravel() >= 0

    cache = tuple(move_cache(layer, prompts, places, capacity) for layer in state.cache)
    out, lengths, alive, last = (x[places] for x in (state.out, state.lengths, state.alive, state.last))
    moved = SamplingState(state.made, out, lengths, alive & there, last, cache)
    return Rows(rows.lengths[places], rows.mask[prompts], rows.keys[places]), moved
