"""Settings check of an experiment; reference, prompts and pairs that all its runs share."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import optim, sharding
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.schema import DataConfig
from dpo_jax.data import pack
from dpo_jax.data.sources.base import only_comparisons, prompt_key
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.experiments.offline import OfflineProgram
from dpo_jax.experiments.world import (
    Point,
    TableLogps,
    World,
    make_measurer,
    make_table_logps,
    sample_pairs,
    table_layout,
)
from dpo_jax.models.attention import CHUNKS
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.records import Array
from dpo_jax.rewards.registry import get_reward
from dpo_jax.training.load import load_policy, load_run_tokenizer
from dpo_jax.training.tables import comparison_streams, prompt_ids, prompt_length

log = logging.getLogger(__name__)

MAX_SAMPLE_BATCH = 256  # completions sampled at a time
UNUSED = ("responses", "flip_labels", "draw_labels", "duplicate")  # keys of data without an effect on an experiment


class SharedSetup(NamedTuple):
    """Reference, data and measurement, shared by all runs of one seed.

    Attributes:
      settings: config of the experiment, with this seed.
      folder: holds the files of this seed.
      world: model, reference and reward.
      train: training pairs.
      every: training pairs of all seeds, whose layouts hold those of each.
      programs: method -> its compiled program, shared by all seeds.
      table_logps: computes the log-probs of a table.
      pairs_layout: layout of batches of pairs, for `table_logps`.
      prompts: ids of the training prompts.
      held_out: ids of the held-out prompts.
      measure: (params, method, strength, step) -> Point.
    """

    settings: FrontierConfig
    folder: Path
    world: World
    train: Table
    every: Table
    programs: dict[str, OfflineProgram]
    table_logps: TableLogps
    pairs_layout: pack.Layout
    prompts: list[Array]
    held_out: list[Array]
    measure: Callable[..., Point]


def check_frontier(settings: FrontierConfig) -> None:
    """Rejects invalid settings.

    Raises:
      UserError: an invalid value; the message names the key.
    """
    _check_ranges(settings)
    if not settings.model.path:
        raise UserError("model.path: name the reference: a model folder, a run, or a YAML of a run")
    if settings.model.attention not in ("auto", CHUNKS):
        raise UserError(f"model.attention: {settings.model.attention}: experiments compute it by {CHUNKS}; remove it")
    for key in UNUSED:
        if getattr(settings.data, key) != getattr(DataConfig(), key):
            raise UserError(f"data.{key} has no effect on pairs of the reference's completions; remove it")
    optim.build(**optim.with_total_steps(settings.optim, settings.max_steps))
    get_reward(settings.reward)


def _check_ranges(settings: FrontierConfig) -> None:
    """Rejects numbers out of range."""
    sizes = {key: getattr(settings, key) for key in ("batch_size", "max_steps", "eval_every", "eval_prompts", "seeds")}
    sizes |= {"max_new_tokens": settings.max_new_tokens, "optimum.completions": settings.optimum.completions}
    online = ("rollouts", "max_steps", "eval_every", "ppo_epochs")
    sizes |= {f"online.{key}": getattr(settings.online, key) for key in online}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"{key} must be at least 1, got {value}")
    if settings.completions < 2:
        raise UserError(f"completions must be at least 2 to make pairs, got {settings.completions}")
    if settings.best_of and not 1 <= min(settings.best_of) <= max(settings.best_of) <= settings.optimum.completions:
        raise UserError(f"best_of must be within 1 and optimum.completions ({settings.optimum.completions})")
    strengths = {key: getattr(settings, key) for key in ("dpo", "ppo", "ppo_gt", "online_dpo")}
    for key, values in {"optimum.betas": settings.optimum.betas, **strengths}.items():
        if min(values, default=1.0) <= 0:
            raise UserError(f"{key} must be above 0, got {min(values):g}")
    if settings.online_dpo and settings.online.rollouts % settings.completions:
        rollouts = settings.online.rollouts
        raise UserError(f"online.rollouts must be a multiple of completions ({settings.completions}), got {rollouts}")


def setup_seeds(settings: FrontierConfig, folder: Path) -> list[SharedSetup]:
    """Returns the setup of each seed; reference, prompts and compiled programs are common to all.

    Samples and labels the pairs of a seed unless its folder has them. The first seed's folder is the experiment's.
    """
    world = _world(settings)
    train_rows, test_rows = comparison_streams(settings.data, 0)
    prompts = _distinct_prompts(train_rows, settings.prompts, settings, world)
    held_out = _distinct_prompts(test_rows, settings.eval_prompts, settings, world)
    of_seeds = [replace(settings, seed=settings.seed + i) for i in range(settings.seeds)]
    folders = [folder if i == 0 else folder / f"seed_{s.seed}" for i, s in enumerate(of_seeds)]
    own = [(s, place, world._replace(seed=s.seed)) for s, place in zip(of_seeds, folders, strict=True)]
    pairs = [_sampled_pairs(s, place, w, prompts, held_out) for s, place, w in own]
    trains, tests = (_joined(tables) for tables in zip(*pairs, strict=True))
    table_logps, layout, programs = make_table_logps(world), table_layout(world, _joined([trains, tests])), {}

    return [
        SharedSetup(
            s, place, w, train, trains, programs, table_logps, layout, prompts, held_out,
            make_measurer(w, held_out, test, layout, table_logps),
        )
        for (s, place, w), (train, test) in zip(own, pairs, strict=True)
    ]  # fmt: skip


def _sampled_pairs(
    settings: FrontierConfig, folder: Path, world: World, prompts: list[Array], held_out: list[Array]
) -> tuple[Table, Table]:
    """Returns the training pairs and the held-out pairs of a seed."""
    start = time.perf_counter()
    folder.mkdir(exist_ok=True)
    sample = partial(sample_pairs, world=world, how=settings.label)
    train = sample(folder / "pairs.jsonl", prompts=prompts, copies=settings.completions, seed=0)
    test = sample(folder / "held_out.jsonl", prompts=held_out, copies=2, seed=1)
    log.info(
        f"{len(train):,} training pairs from {len(prompts):,} prompts, {len(test):,} held-out pairs from "
        f"{len(held_out):,} prompts, seed {settings.seed} ({time.perf_counter() - start:.0f} s)"
    )
    return train, test


def _joined(tables: Iterable[Table]) -> Table:
    """Returns the examples of all tables."""
    return Table.of(table[i] for table in tables for i in range(len(table)))


def _world(settings: FrontierConfig) -> World:
    """Returns model, tokenizer and reward, and the reference in host memory and on the devices."""
    tokenizer = load_run_tokenizer(settings.model)
    loaded = load_policy(settings.model, tokenizer, settings.seed)
    start, mesh = load_into_memory(loaded.params), sharding.make_mesh()
    shardings = sharding.param_shardings(mesh, loaded.model.axes, start)
    return World(
        model=loaded.model,
        mesh=mesh,
        shardings=shardings,
        start=start,
        reference=sharding.put_params(start, shardings),
        tokenizer=tokenizer,
        reward=get_reward(settings.reward),
        max_new_tokens=settings.max_new_tokens,
        sample_batch=min(settings.eval_prompts, MAX_SAMPLE_BATCH),
        seed=settings.seed,
        ends=loaded.end_ids(tokenizer),
    )


def _distinct_prompts(rows: Any, count: int | None, settings: FrontierConfig, world: World) -> list[Array]:
    """Returns the ids of the first `count` distinct prompts, or of all if `count` is None or there are fewer."""
    prompts: dict[int, Any] = {}
    for row in only_comparisons(rows):
        if count is not None and len(prompts) == count:
            break
        prompts.setdefault(prompt_key(row.prompt), row.prompt)
    ids = prompt_ids(list(prompts.values()), world.tokenizer, settings.data)
    longest = max(map(len, ids))
    if longest > (limit := prompt_length(settings.data)):
        raise UserError(f"data.max_prompt_length is {limit}, but a prompt has {longest} tokens; set {longest}")
    return [np.array(prompt, np.int32) for prompt in ids]
