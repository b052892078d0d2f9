"""What an experiment is set to, and what is made once for all of its runs: reference, prompts, pairs."""

import logging
import time
from collections.abc import Callable
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
from dpo_jax.experiments.world import Column, Point, World, draw_pairs, eval_layout, make_measurer, make_ref_logps
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.records import Array
from dpo_jax.rewards.registry import get_reward
from dpo_jax.training.load import load_policy, load_run_tokenizer
from dpo_jax.training.tables import comparison_streams, prompt_ids

log = logging.getLogger(__name__)

DRAWS = 256  # completions that are sampled at a time, at most
UNUSED = ("responses", "flip_labels", "draw_labels", "duplicate")  # of Data, in which pairs are read


class SharedSetup(NamedTuple):
    """What every run of an experiment uses.

    Attributes:
      settings: of the experiment.
      world: what policies are made and measured with.
      train: pairs.
      column: computes log-probs.
      shape: of batches of pairs, for `column`.
      prompts: training prompts.
      held_out: held-out prompts.
      measure: (params, method, strength, step) -> Point.
    """

    settings: FrontierConfig
    world: World
    train: Table
    column: Column
    shape: pack.Layout
    prompts: list[Array]
    held_out: list[Array]
    measure: Callable[..., Point]


def check_frontier(settings: FrontierConfig) -> None:
    """Refuses values that no experiment can have, by key."""
    sizes = {key: getattr(settings, key) for key in ("batch_size", "max_steps", "eval_every", "eval_prompts")}
    sizes |= {"max_new_tokens": settings.max_new_tokens, "optimum.samples": settings.optimum.samples}
    sizes |= {f"online.{key}": getattr(settings.online, key) for key in ("rollouts", "max_steps", "eval_every")}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"{key}: {value} is less than 1")
    if not settings.model.path:
        raise UserError(
            "model.path: name the reference, from which all start: a model's folder, a run, or a run's YAML"
        )
    if settings.completions < 2:
        raise UserError(f"completions: {settings.completions} is less than 2, so there are no pairs")
    if settings.best_of and not 1 <= min(settings.best_of) <= max(settings.best_of) <= settings.optimum.samples:
        raise UserError(f"best_of: numbers from 1 to optimum.samples, {settings.optimum.samples}")
    strengths = {key: getattr(settings, key) for key in ("dpo", "ppo", "ppo_gt", "online_dpo")}
    for key, values in {"optimum.betas": settings.optimum.betas, **strengths}.items():
        if min(values, default=1.0) <= 0:
            raise UserError(f"{key}: {min(values):g} is not above 0")
    if settings.online_dpo and settings.online.rollouts % settings.completions:
        raise UserError(
            f"online.rollouts: {settings.online.rollouts} are not {settings.completions} completions of each prompt"
        )
    if settings.model.attention not in ("auto", CHUNKS):
        raise UserError(
            f"model.attention: {settings.model.attention}: experiments compute it by {CHUNKS}; leave it out"
        )
    for key in UNUSED:
        if getattr(settings.data, key) != getattr(DataConfig(), key):
            raise UserError(f"data.{key}: pairs are made of the reference's completions, so it has no meaning here")
    optim.build(**settings.optim)
    get_reward(settings.reward)


def setup_shared(settings: FrontierConfig, folder: Path) -> SharedSetup:
    """Returns what the runs share; pairs are drawn and labelled unless the folder has them."""
    world, start = _world(settings), time.perf_counter()
    counts = settings.prompts, settings.eval_prompts
    sides = zip(comparison_streams(settings.data, 0), counts, strict=True)
    prompts, held_out = (_prompts(rows, count, settings, world) for rows, count in sides)
    make = partial(draw_pairs, world=world, how=settings.label)
    train = make(folder / "pairs.jsonl", prompts=prompts, copies=settings.completions, seed=0)
    test = make(folder / "held_out.jsonl", prompts=held_out, copies=2, seed=1)
    log.info(
        f"{len(train):,} pairs from {len(prompts):,} prompts with {settings.completions} completions each, "
        f"{len(test):,} held out, {len(held_out):,} prompts to measure on ({time.perf_counter() - start:.0f} s)"
    )
    both = Table.of(table[i] for table in (train, test) for i in range(len(table)))
    column, shape = make_ref_logps(world), eval_layout(world, both)
    measure = make_measurer(world, held_out, test, shape, column)
    return SharedSetup(settings, world, train, column, shape, prompts, held_out, measure)


def _world(settings: FrontierConfig) -> World:
    """Returns what all policies are made and measured with, the reference on the devices."""
    tokenizer = load_run_tokenizer(settings.model)
    loaded = load_policy(settings.model, tokenizer, settings.seed)
    start, mesh = load_into_memory(loaded.params), sharding.make_mesh()
    where = sharding.param_shardings(mesh, loaded.model.axes, start)
    return World(
        model=loaded.model,
        mesh=mesh,
        where=where,
        start=start,
        reference=sharding.put_params(start, where),
        tokenizer=tokenizer,
        reward=get_reward(settings.reward),
        max_new_tokens=settings.max_new_tokens,
        draws=min(settings.eval_prompts, DRAWS),
        seed=settings.seed,
    )


def _prompts(rows: Any, count: int | None, settings: FrontierConfig, world: World) -> list[Array]:
    """Returns the first distinct prompts as ids, all that are wanted or as many as there are."""
    found: dict[int, Any] = {}
    for row in only_comparisons(rows):
        if count is not None and len(found) == count:
            break
        found.setdefault(prompt_key(row.prompt), row.prompt)
    ids = prompt_ids(list(found.values()), world.tokenizer, settings.data)
    longest = max(map(len, ids))
    if longest > settings.data.max_prompt_length:
        raise UserError(f"data.max_prompt_length: a prompt has {longest} tokens, more than it says")
    return [np.array(prompt, np.int32) for prompt in ids]
