"""Samples of the reference (pairs to train on, rewards for the optimum) and the measurement of policies."""

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
from dpo_jax.experiments.points import Point
from dpo_jax.intervals import mean_interval
from dpo_jax.logprobs import batch_logps
from dpo_jax.models.interface import Model
from dpo_jax.paths import written
from dpo_jax.records import Array, Tokens
from dpo_jax.rewards.labels import label_pairs
from dpo_jax.rewards.words import Reward
from dpo_jax.sampling import generate
from dpo_jax.training.abstract import microbatch_tokens
from dpo_jax.training.metrics_file import read_metrics
from dpo_jax.training.shard import gather_on_use
from dpo_jax.training.tables import decode_texts

MAX_ENUMERATED = 4096  # with more possible responses, the optimum is estimated from samples
LOGPS_BATCH = 64  # comparisons per forward pass for log-probs


class World(NamedTuple):
    """Model, reference and reward of an experiment, shared by all policies.

    Attributes:
      model: pure functions of every policy's parameters.
      mesh: the device mesh.
      shardings: tree of the parameters' shardings.
      start: host arrays, the reference's parameters; every policy starts from them.
      reference: the same parameters on the devices.
      tokenizer: tokenizer of the model.
      reward: the true reward.
      max_new_tokens: length of the longest completion.
      sample_batch: completions sampled at a time; one value for all uses, so that sampling compiles once.
      seed: seed of all random numbers.
      ends: ids of the tokens that end a completion.
    """

    model: Model
    mesh: Any
    shardings: Any
    start: Any
    reference: Any
    tokenizer: Any
    reward: Reward
    max_new_tokens: int
    sample_batch: int
    seed: int
    ends: tuple[int, ...]


TableLogps = Callable[[Any, Table, pack.Layout], Array]
"""(parameters on the devices, table of N comparisons, layout) -> float32[N, P, 2], log-probs as `Batch.ref_logps`."""


def sample_completions(
    world: World, params: Any, prompts: Sequence[Array], copies: int = 1, seed: int = 0
) -> list[Array]:
    """Returns `copies` completions of each prompt at temperature 1, as ids; completions of one prompt are adjacent.

    Each copy reads its prompt again: prompts are short, and so all uses share one compiled program.
    """
    repeated = [prompt for prompt in prompts for _ in range(copies)]
    options = {"eos_id": world.ends, "batch_size": world.sample_batch, "seed": world.seed + seed}
    return generate(world.model, params, repeated, max_new_tokens=world.max_new_tokens, **options)


def score_completions(world: World, reward: Reward, prompts: Sequence[Array], completions: Sequence[Array]) -> Array:
    """Returns float64[n], the rewards of n completions; prompts and completions are ids."""
    return reward(decode_texts(world.tokenizer, prompts), decode_texts(world.tokenizer, completions, world.ends))


def make_table_logps(world: World) -> TableLogps:
    """Returns the function that computes the log-probs of a table; it compiles once per layout."""
    collectives = sharding.mesh_collectives(world.mesh, world.shardings)
    logps = partial(batch_logps, gather_on_use(world.model, collectives, world.shardings))
    ref_logps = reference.make_ref_logps_fn(logps, collectives)
    put = partial(sharding.put_batch, world.mesh)
    return lambda params, table, layout: reference.table_ref_logps(ref_logps, params, table, layout, LOGPS_BATCH, put)


def table_layout(world: World, table: Table, batch_size: int = LOGPS_BATCH) -> pack.Layout:
    """Returns the layout of a table's batches, with the rows that this process builds."""
    longest = int(table.lengths().max())
    devices = sharding.row_devices(world.mesh)
    parts, most_tokens = sharding.token_devices(world.mesh), microbatch_tokens(jax.default_backend())
    layout = pack.choose_layout(
        table, max_length=longest, batch_size=batch_size, multiple_of=devices, parts=parts, most_tokens=most_tokens
    )
    blocks, size = sharding.local_row_blocks(world.mesh), layout.rows // devices
    return layout._replace(own=(blocks.start * size, blocks.stop * size))


def make_measurer(
    world: World, prompts: Sequence[Array], pairs: Table, pairs_layout: pack.Layout, table_logps: TableLogps
) -> Callable[..., Point]:
    """Returns `(params, method, strength, step) -> Point`, compiled once for all policies.

    All policies are sampled with the same random numbers, which lowers the variance of their differences.

    Args:
      world: model, reference and reward.
      prompts: held-out prompts; each gets one completion.
      pairs: held-out pairs.
      pairs_layout: layout of the pairs' batches.
      table_logps: from `make_table_logps`.
    """
    longest = np.full(world.max_new_tokens, 3, np.int32)  # a layout for completions of any length
    layout = table_layout(world, Table.of(Tokens(p, (longest,)) for p in prompts))

    def measure(params: Any, method: str, strength: float, step: int) -> Point:
        params = jax.device_put(params, world.shardings)
        completions = sample_completions(world, params, prompts)
        table = Table.of(Tokens(p, (c,)) for p, c in zip(prompts, completions, strict=True))
        kl = (table_logps(params, table, layout) - table_logps(world.reference, table, layout))[:, 0, 0]
        chosen, rejected = table_logps(params, pairs, pairs_layout)[..., 0].mean(axis=0)
        reward = score_completions(world, world.reward, prompts, completions)
        return Point(
            method, strength, step, *mean_interval(reward), *mean_interval(kl), float(chosen), float(rejected),
            float(np.mean([len(c) for c in completions])),
            float(np.mean([c[-1] not in world.ends for c in completions])), world.seed,
        )  # fmt: skip

    return measure


def sample_pairs(path: Path, world: World, prompts: Sequence[Array], copies: int, how: str, seed: int) -> Table:
    """Returns pairs of completions of the reference, labelled by the true reward, and keeps them in a file.

    A file that exists is read instead. Each line holds a pair as `dpo-jax pairs` writes it, and the sampled ids.
    Training uses the ids: a text may be tokenized differently, and a cut completion has no EOS.

    Args:
      path: the file, JSON lines.
      world: model, reference and reward.
      prompts: ids of the prompts.
      copies: completions of each prompt.
      how: how scores make pairs, as in `rewards.labels`.
      seed: added to the seed of the experiment.

    Raises:
      UserError: no pair, for example because all completions of a prompt are equal.
    """
    if not path.is_file():
        completions = sample_completions(world, world.reference, prompts, copies, seed)
        groups = [completions[i * copies :][:copies] for i in range(len(prompts))]
        rows = [row for p, group in zip(prompts, groups, strict=True) for row in _pair_rows(world, p, group, how)]
        if not rows:
            raise UserError(f"{path}: {copies} completions of each prompt make no pair; increase completions")
        with written(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Table.of(_row_tokens(row) for row in read_metrics(path))


def _pair_rows(world: World, prompt: Array, completions: Sequence[Array], how: str) -> list[dict]:
    """Returns the labelled pairs of one prompt as rows of the file."""
    (text,), texts = decode_texts(world.tokenizer, [prompt]), decode_texts(world.tokenizer, completions, world.ends)
    ids = dict(zip(texts, completions, strict=True))
    scores = world.reward([text] * len(texts), texts)
    return [
        {"prompt": text, "chosen": c, "rejected": r, "ids": [x.tolist() for x in (np.asarray(prompt), ids[c], ids[r])]}
        for c, r in label_pairs(text, texts, scores, how, world.seed)
    ]


def _row_tokens(row: dict) -> Tokens:
    prompt, *responses = (np.array(ids, np.int32) for ids in row["ids"])
    return Tokens(prompt, tuple(responses), prompt_key=prompt_key(row["prompt"]))


def sample_rewards(path: Path, world: World, prompts: Sequence[Array], copies: int) -> Array:
    """Returns float64[prompts, copies], the true rewards of completions of the reference, and keeps them in a file.

    A file that exists is read instead.
    """
    if path.is_file():
        return np.load(path, allow_pickle=False)
    completions = sample_completions(world, world.reference, prompts, copies, seed=2)
    repeated = [p for p in prompts for _ in range(copies)]
    rewards = score_completions(world, world.reward, repeated, completions).reshape(-1, copies)
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.save(file, rewards)
    temporary.replace(path)
    return rewards


def enumerate_responses(vocab: int, ends: Sequence[int], longest: int) -> list[tuple[int, ...]]:
    """Returns every response: ids up to the first of `ends`, or `longest` ids without one."""
    others = [token for token in range(vocab) if token not in ends]
    ended = [(*r, end) for n in range(longest) for r in itertools.product(others, repeat=n) for end in ends]
    return ended + list(itertools.product(others, repeat=longest))


def enumerate_rewards(world: World, prompts: Sequence[Array], table_logps: TableLogps) -> tuple[Array, Array] | None:
    """Returns the true reward and the reference's log-prob of every response to each prompt.

    Both are float64[prompts, K]. Returns None if there are more than `MAX_ENUMERATED` responses.
    """
    vocab = world.model.architecture.vocab
    if vocab**world.max_new_tokens > MAX_ENUMERATED:
        return None
    every = enumerate_responses(vocab, world.ends, world.max_new_tokens)
    responses = [np.array(r, np.int32) for r in every]
    table = Table.of(Tokens(p, (r,)) for p in prompts for r in responses)
    logps = table_logps(world.reference, table, table_layout(world, table))[:, 0, 0]
    repeated = [p for p in prompts for _ in responses]
    rewards = score_completions(world, world.reward, repeated, responses * len(prompts))
    return rewards.reshape(len(prompts), -1), logps.astype(np.float64).reshape(len(prompts), -1)
