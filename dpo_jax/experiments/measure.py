"""What every policy of an experiment is measured by: true reward and KL of its own completions of held-out prompts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import assemble, reference, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import batch_logps
from dpo_jax.metrics import mean_interval
from dpo_jax.models import Model
from dpo_jax.prepare import in_parts
from dpo_jax.records import Array, Tokens
from dpo_jax.rewards import Reward
from dpo_jax.sample import sample

AT_A_TIME = 64  # comparisons whose log-probs are computed together


class World(NamedTuple):
    """What the policies of an experiment share.

    Attributes:
      model: pure functions of all of them.
      mesh: of the devices.
      where: tree of the parameters' shardings.
      start: host arrays, the reference's parameters, from which every policy starts.
      reference: the same on the devices.
      tokenizer: of all of them.
      reward: the true one.
      max_new_tokens: longest completion.
      draws: completions that are sampled at a time, in one program whatever they are for.
      seed: of everything random.
    """

    model: Model
    mesh: Any
    where: Any
    start: Any
    reference: Any
    tokenizer: Any
    reward: Reward
    max_new_tokens: int
    draws: int
    seed: int


class Point(NamedTuple):
    """A policy at one step of one run.

    Attributes:
      method: sft, dpo, ...
      strength: what holds it to the reference, beta, alpha or a target KL; of preferred-FT the seed; 0 of sft.
      step: updates done.
      reward: mean true reward; `reward_half` is half its 95% interval.
      kl: mean of log pi - log pi_ref over whole completions, nats; `kl_half` likewise.
      chosen: mean log-prob of the chosen responses of held-out pairs; `rejected` likewise.
      tokens: mean length of a completion.
      cut: the share of completions that were cut, not ended.
    """

    method: str
    strength: float
    step: int
    reward: float
    reward_half: float
    kl: float
    kl_half: float
    chosen: float
    rejected: float
    tokens: float
    cut: float


Column = Callable[[Any, Table, pack.Shape], Array]
"""(parameters on the devices, N comparisons, the layout) -> float32[N, P, 2], log-probs as `Batch.ref_logps`."""


def draw(world: World, params: Any, prompts: Sequence[Array], copies: int = 1, seed: int = 0) -> list[Array]:
    """Returns `copies` completions of each prompt at temperature 1, as ids, those of a prompt together.

    Prompts are short, so that reading one again for each of its completions costs less than a program of its own.
    """
    every = [prompt for prompt in prompts for _ in range(copies)]
    options = {"eos_id": world.tokenizer.eos_token_id, "batch_size": world.draws, "seed": world.seed + seed}
    return sample(world.model, params, every, max_new_tokens=world.max_new_tokens, **options)


def score(world: World, reward: Reward, prompts: Sequence[Array], completions: Sequence[Array]) -> Array:
    """Returns the reward of completions, both given as ids; float64[n]."""
    return reward(assemble.decoded(world.tokenizer, prompts), assemble.decoded(world.tokenizer, completions))


def column_of(world: World) -> Column:
    """Returns what computes log-probs, compiled once for each layout."""
    rows = sharding.split_rows(world.mesh, world.where)
    column = reference.make_column(partial(batch_logps, in_parts(world.model, rows, world.where)), rows)
    put = partial(sharding.put_batch, world.mesh)
    return lambda params, table, shape: reference.one_pass(column, params, table, shape, AT_A_TIME, put)


def shape_of(world: World, table: Table, batch_size: int = AT_A_TIME) -> pack.Shape:
    """Returns the layout of batches of a table."""
    longest = int(table.lengths().max())
    devices = sharding.row_devices(world.mesh)
    shape = pack.choose(table, max_length=longest, batch_size=batch_size, multiple_of=devices)
    parts, size = sharding.own_parts(world.mesh), shape.rows // devices
    return shape._replace(own=(parts.start * size, parts.stop * size))


def measurer(
    world: World, prompts: Sequence[Array], pairs: Table, pairs_shape: pack.Shape, column: Column
) -> Callable[..., Point]:
    """Returns `(params, method, strength, step) -> Point`, compiled once for all policies.

    All are sampled with the same random numbers, which takes some of the chance out of comparing them.

    Args:
      world: what they share.
      prompts: held-out prompts; one completion of each.
      pairs: held-out pairs.
      pairs_shape: their layout.
      column: from `column_of`.
    """
    full = np.full(world.max_new_tokens, 3, np.int32)  # the longest there may be, so that one layout serves all
    shape = shape_of(world, Table.of(Tokens(p, (full,)) for p in prompts))

    def measure(params: Any, method: str, strength: float, step: int) -> Point:
        params = jax.device_put(params, world.where)
        found = draw(world, params, prompts)
        table = Table.of(Tokens(p, (c,)) for p, c in zip(prompts, found, strict=True))
        kl = (column(params, table, shape) - column(world.reference, table, shape))[:, 0, 0]
        chosen, rejected = column(params, pairs, pairs_shape)[..., 0].mean(axis=0)
        reward = score(world, world.reward, prompts, found)
        return Point(
            method, strength, step, *mean_interval(reward), *mean_interval(kl), float(chosen), float(rejected),
            float(np.mean([len(c) for c in found])),
            float(np.mean([c[-1] != world.tokenizer.eos_token_id for c in found])),
        )  # fmt: skip

    return measure
