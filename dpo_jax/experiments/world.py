"""What is drawn from the reference once, and kept: preference pairs to train on, and rewards for the optimum."""

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import reference, sharding
from dpo_jax.data import pack
from dpo_jax.data.sources.base import prompt_key
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.intervals import mean_interval
from dpo_jax.logprobs import batch_logps
from dpo_jax.models.model import Model
from dpo_jax.paths import written
from dpo_jax.records import Array, Tokens
from dpo_jax.rewards.labels import label_pairs
from dpo_jax.rewards.words import Reward
from dpo_jax.sampling import generate
from dpo_jax.training.metrics_file import read_metrics
from dpo_jax.training.shard import gather_on_use
from dpo_jax.training.tables import decode_texts

ENUMERABLE = 4096  # responses that are rather listed than sampled
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


Column = Callable[[Any, Table, pack.Layout], Array]
"""(parameters on the devices, N comparisons, the layout) -> float32[N, P, 2], log-probs as `Batch.ref_logps`."""


def draw_completions(
    world: World, params: Any, prompts: Sequence[Array], copies: int = 1, seed: int = 0
) -> list[Array]:
    """Returns `copies` completions of each prompt at temperature 1, as ids, those of a prompt together.

    Prompts are short, so that reading one again for each of its completions costs less than a program of its own.
    """
    every = [prompt for prompt in prompts for _ in range(copies)]
    options = {"eos_id": world.tokenizer.eos_token_id, "batch_size": world.draws, "seed": world.seed + seed}
    return generate(world.model, params, every, max_new_tokens=world.max_new_tokens, **options)


def score_completions(world: World, reward: Reward, prompts: Sequence[Array], completions: Sequence[Array]) -> Array:
    """Returns the reward of completions, both given as ids; float64[n]."""
    return reward(decode_texts(world.tokenizer, prompts), decode_texts(world.tokenizer, completions))


def make_ref_logps(world: World) -> Column:
    """Returns what computes log-probs, compiled once for each layout."""
    rows = sharding.mesh_collectives(world.mesh, world.where)
    column = reference.make_ref_logps_fn(partial(batch_logps, gather_on_use(world.model, rows, world.where)), rows)
    put = partial(sharding.put_batch, world.mesh)
    return lambda params, table, shape: reference.table_ref_logps(column, params, table, shape, AT_A_TIME, put)


def eval_layout(world: World, table: Table, batch_size: int = AT_A_TIME) -> pack.Layout:
    """Returns the layout of batches of a table."""
    longest = int(table.lengths().max())
    devices = sharding.row_devices(world.mesh)
    shape = pack.choose_layout(table, max_length=longest, batch_size=batch_size, multiple_of=devices)
    parts, size = sharding.local_row_blocks(world.mesh), shape.rows // devices
    return shape._replace(own=(parts.start * size, parts.stop * size))


def make_measurer(
    world: World, prompts: Sequence[Array], pairs: Table, pairs_shape: pack.Layout, column: Column
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
    shape = eval_layout(world, Table.of(Tokens(p, (full,)) for p in prompts))

    def measure(params: Any, method: str, strength: float, step: int) -> Point:
        params = jax.device_put(params, world.where)
        found = draw_completions(world, params, prompts)
        table = Table.of(Tokens(p, (c,)) for p, c in zip(prompts, found, strict=True))
        kl = (column(params, table, shape) - column(world.reference, table, shape))[:, 0, 0]
        chosen, rejected = column(params, pairs, pairs_shape)[..., 0].mean(axis=0)
        reward = score_completions(world, world.reward, prompts, found)
        return Point(
            method, strength, step, *mean_interval(reward), *mean_interval(kl), float(chosen), float(rejected),
            float(np.mean([len(c) for c in found])),
            float(np.mean([c[-1] != world.tokenizer.eos_token_id for c in found])),
        )  # fmt: skip

    return measure


def draw_pairs(path: Path, world: World, prompts: Sequence[Array], copies: int, how: str, seed: int) -> Table:
    """Returns pairs of completions of the reference, labelled by the true reward, from a file, which is made if need
    be: a line for each pair, with texts as `dpo-jax pairs` writes them and the ids that were drawn.

    Training takes the ids, for the text of a completion may have other ids, and one that was cut has no end.

    Raises:
      UserError: no two completions differ.
    """
    if not path.is_file():
        found = draw_completions(world, world.reference, prompts, copies, seed)
        rows = [row for i, p in enumerate(prompts) for row in _labelled(world, p, found[i * copies :][:copies], how)]
        if not rows:
            raise UserError(f"{path}: no two of {copies} completions of a prompt differ, so there is nothing to prefer")
        with written(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Table.of(_tokens(row) for row in read_metrics(path))


def _labelled(world: World, prompt: Array, completions: Sequence[Array], how: str) -> list[dict]:
    """Returns the pairs of one prompt's completions, as rows."""
    (text,), texts = decode_texts(world.tokenizer, [prompt]), decode_texts(world.tokenizer, completions)
    ids = dict(zip(texts, completions, strict=True))
    scores = world.reward([text] * len(texts), texts)
    return [
        {"prompt": text, "chosen": c, "rejected": r, "ids": [x.tolist() for x in (np.asarray(prompt), ids[c], ids[r])]}
        for c, r in label_pairs(text, texts, scores, how, world.seed)
    ]


def _tokens(row: dict) -> Tokens:
    prompt, *responses = (np.array(ids, np.int32) for ids in row["ids"])
    return Tokens(prompt, tuple(responses), prompt_key=prompt_key(row["prompt"]))


def score_texts(path: Path, world: World, prompts: Sequence[Array], copies: int) -> Array:
    """Returns the true rewards of completions of each prompt by the reference, float64[prompts, copies], from a file,
    which is made if need be."""
    if path.is_file():
        return np.load(path, allow_pickle=False)
    found = draw_completions(world, world.reference, prompts, copies, seed=2)
    values = score_completions(world, world.reward, [p for p in prompts for _ in range(copies)], found).reshape(
        -1, copies
    )
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.save(file, values)
    temporary.replace(path)
    return values


def draw_responses(vocab: int, end: int, longest: int) -> list[tuple[int, ...]]:
    """Returns every response: tokens up to the first end-of-sequence token, or `longest` of them without one."""
    others = [token for token in range(vocab) if token != end]
    ended = [(*r, end) for n in range(longest) for r in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=longest))


def enumerate_texts(world: World, prompts: Sequence[Array], column: Column) -> tuple[Array, Array] | None:
    """Returns the true reward and the reference's log-probability of every response to each prompt,
    float64[prompts, K]; None where there are too many."""
    vocab = world.model.architecture.vocab
    if vocab**world.max_new_tokens > ENUMERABLE:
        return None
    every = [np.array(r, np.int32) for r in draw_responses(vocab, world.tokenizer.eos_token_id, world.max_new_tokens)]
    table = Table.of(Tokens(p, (r,)) for p in prompts for r in every)
    logps = column(world.reference, table, eval_layout(world, table))[:, 0, 0]
    values = score_completions(world, world.reward, [p for p in prompts for _ in every], every * len(prompts))
    return values.reshape(len(prompts), -1), logps.astype(np.float64).reshape(len(prompts), -1)
