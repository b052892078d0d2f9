"""The paper's first experiment (section 6.1, figure 2 left): the reward that each method reaches at each KL.

From one reference, each method is trained at several strengths of what holds it there, and measured every so many
steps. What methods share is made once: pairs, the reference's log-probs, compiled programs. Everything is kept in the
run folder as it is found, so that a run that was killed goes on with what is missing.
"""

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import distributed
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.schema import Config, SamplesConfig
from dpo_jax.config.yaml import difference, dump
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.experiments import offline, online, optimum, ppo, setup
from dpo_jax.experiments.optimum import Optimum
from dpo_jax.experiments.setup import SharedSetup
from dpo_jax.experiments.world import Point, enumerate_texts, score_completions, score_texts
from dpo_jax.intervals import mean_interval
from dpo_jax.paths import is_run, written
from dpo_jax.records import Array
from dpo_jax.rewards.registry import get_reward
from dpo_jax.rewards.words import Reward
from dpo_jax.training import interrupts, loop
from dpo_jax.training import setup as run_setup
from dpo_jax.training.metrics_file import append_metrics, read_metrics, truncate_metrics
from dpo_jax.training.run_folder import run_config

log = logging.getLogger(__name__)

LAST = 2**31  # no step is later
FREE = ("run", "optimum.betas", "best_of")  # may change when a frontier goes on: they are worked out anew
ONLINE = ("ppo", "ppo_gt", "online_dpo")


class FrontierJob(NamedTuple):
    """One run: a method at one strength, and the steps at which it is measured."""

    method: str
    strength: float
    steps: tuple[int, ...]


class BestOf(NamedTuple):
    """The best of n completions: mean reward and half its 95% interval; its KL is at most `winrate.kl_bound(n)`."""

    n: int
    reward: float
    reward_half: float


class FrontierResult(NamedTuple):
    """What an experiment comes to.

    Attributes:
      points: of every run, the reference first.
      curve: the reference and the optima, by falling beta.
      left_out: optima of which too few samples are known.
      best_of: the best of N.
      listed: whether the optima are sums over all responses there are, not over samples.
      prompts: held-out prompts.
      pairs: that were trained on.
    """

    points: list[Point]
    curve: list[Optimum]
    left_out: list[Optimum]
    best_of: list[BestOf]
    listed: bool
    prompts: int
    pairs: int


Keep = Callable[[FrontierJob, Any, int], None]
"""(job, parameters, updates done): measures and keeps the point, if it is wanted; is told of every update."""
Train = Callable[[FrontierJob], None]
"""Trains one run, from its start."""


def frontier_jobs(settings: FrontierConfig) -> list[FrontierJob]:
    """Returns the runs; one measures every `eval_every` steps and at its end."""
    methods = ("dpo", *ONLINE, "unlikelihood", "preferred_ft")
    found = []
    for method in methods:
        sizes = settings.online if method in ONLINE else settings
        every = (*range(sizes.eval_every, sizes.max_steps, sizes.eval_every), sizes.max_steps)
        found += [FrontierJob(method, float(strength), every) for strength in getattr(settings, method)]
    return found


def run_frontier(settings: FrontierConfig) -> FrontierResult:
    """Runs what is missing of an experiment, and returns all of it.

    Raises:
      UserError: settings that no experiment can have; the folder belongs to another one.
    """
    setup.check_frontier(settings)
    folder = Path(settings.run)
    with _claimed(folder, settings):
        shared, path = setup.setup_shared(settings, folder), folder / "points.jsonl"
        truncate_metrics(path, LAST)  # which drops a line that a kill has torn
        done, writing = {point[:3] for point in frontier_points(path)}, threading.Lock()

        stopped = threading.Event()

        def keep(job: FrontierJob, params: Any, step: int) -> None:
            if stopped.is_set():
                raise CancelledError
            if step in job.steps and (*job[:2], step) not in done:
                point = shared.measure(params, *job[:2], step)
                values = point._asdict()
                with writing:
                    append_metrics(path, values.pop("step"), step * settings.batch_size, values)
                if step == job.steps[-1]:
                    log.info(f"{job.method} {job.strength:g}: reward {point.reward:.3f} at KL {point.kl:.3f}")

        start, every = FrontierJob("sft", 0.0, (0,)), frontier_jobs(settings)
        keep(start, shared.world.reference, 0)
        missing = [job for job in every if not {(*job[:2], step) for step in job.steps} <= done]
        trainer = partial(_trainer, shared, folder, keep)
        distributed.run_concurrently(_tasks(missing, trainer), distributed.concurrent_programs(), stopped.set)
        places = {job[:2]: place for place, job in enumerate((start, *every))}
        return _found(shared, folder, sorted(frontier_points(path), key=lambda p: (places[p[:2]], p.step)))


def _claimed(folder: Path, settings: FrontierConfig) -> Any:
    """Makes the run folder, or takes it up again if it belongs to the same settings; returns the hold on it."""
    old = run_config(folder, kind=FrontierConfig) if is_run(folder) else settings
    if changed := difference(old, settings, FREE):
        raise UserError(f"{folder} belongs to another config ({'; '.join(changed)}); give another --run")
    lock = interrupts.lock_folder(folder)
    with written(folder / "config.yaml") as file:
        file.write(dump(settings))
    return lock


def _tasks(missing: Sequence[FrontierJob], trainer: Callable[[str], Train]) -> Iterator[Callable[[], None]]:
    """Yields what trains each run; what runs of one method share is made when the first of them is wanted."""
    for method, those in itertools.groupby(missing, key=lambda job: job.method):
        train = trainer(method)
        yield from (partial(train, job) for job in those)


def _trainer(shared: SharedSetup, folder: Path, keep: Keep, method: str) -> Train:
    """Returns what trains one run of a method."""
    if method not in ONLINE:
        return _offline(shared, method, keep)
    judge = get_reward(f"model:{_reward_model(shared, folder)}") if method == "ppo" else shared.world.reward
    return _online(shared, judge, keep)


def _offline(shared: SharedSetup, method: str, keep: Keep) -> Train:
    """Returns what trains on pairs; runs of one method share a compiled step."""
    settings, world = shared.settings, shared.world
    table = shared.train if method != "preferred_ft" else _chosen(shared.train)
    column = shared.column(world.reference, table, shared.shape) if method == "dpo" else None
    program = offline.offline_program(world, job_config(settings, method, 1.0), table, column)

    def train(job: FrontierJob) -> None:
        seed = settings.seed + (int(job.strength) if method == "preferred_ft" else 0)
        for step, params in offline.offline_steps(program, job_config(settings, method, job.strength), seed):
            keep(job, params, step)

    return train


def job_config(settings: FrontierConfig, method: str, strength: float) -> Config:
    """Returns the config of one run on pairs."""
    losses = {"dpo": {"beta": strength}, "unlikelihood": {"alpha": strength}, "preferred_ft": {}}
    loss = {"name": method if method != "preferred_ft" else "sft", **losses[method]}
    return Config(loss=loss, optim=settings.optim, batch_size=settings.batch_size, max_steps=settings.max_steps)


def _chosen(pairs: Table) -> Table:
    """Returns the chosen responses of pairs alone."""
    return Table.of(pairs[i]._replace(responses=pairs[i].responses[:1], scores=()) for i in range(len(pairs)))


def _online(shared: SharedSetup, judge: Reward, keep: Keep) -> Train:
    """Returns what trains on completions of the policy itself."""
    settings, world = shared.settings, shared.world

    def judged(prompts: list[Array], completions: list[Array]) -> np.ndarray:
        return score_completions(world, judge, prompts, completions).astype(np.float32)

    start = jax.device_put(world.start), jax.device_put(world.start)

    def train(job: FrontierJob) -> None:
        method, options = _online_options(settings, job)
        method(
            world.model, *start, shared.prompts, judged, options, steps=settings.online.max_steps, seed=settings.seed,
            eos=world.tokenizer.eos_token_id, each=lambda step, params: keep(job, params, step),
        )  # fmt: skip

    return train


def _online_options(settings: FrontierConfig, job: FrontierJob) -> tuple[Callable[..., Any], Any]:
    """Returns what trains on the policy's own completions, and its options."""
    sizes, new = settings.online, settings.max_new_tokens
    if job.method == "online_dpo":
        options = online.OnlineOptions(
            job.strength, sizes.learning_rate, sizes.rollouts // settings.completions, settings.completions, new,
            settings.label, settings.batch_size,
        )  # fmt: skip
        return online.train_online, options
    given = {"rollouts": sizes.rollouts, "init_kl_coef": sizes.init_kl_coef, "horizon": sizes.horizon}
    return ppo.train_ppo, ppo.PpoOptions(job.strength, sizes.learning_rate, max_new_tokens=new, **given)


def _reward_model(shared: SharedSetup, folder: Path) -> Path:
    """Returns the run folder of a reward model of the pairs, trained if need be."""
    settings, out = shared.settings, folder / "reward"
    paths = {"path": (str(folder / "pairs.jsonl"),), "eval_path": (str(folder / "held_out.jsonl"),)}
    data = replace(settings.data, name="files", split="train", eval_split="train", eval_examples=None, **paths)
    optim = {"name": "adamw", "learning_rate": settings.reward_model.learning_rate, "max_grad_norm": 1.0}
    config = Config(
        data=data, model=settings.model, loss={"name": "bradley_terry"}, optim={**optim, "warmup_steps": 10},
        samples=SamplesConfig(0), batch_size=settings.batch_size, epochs=settings.reward_model.epochs, eval_every=0,
        run=str(out), seed=settings.seed,
    )  # fmt: skip
    loop.train_run(run_setup.setup_run(config))
    return out


def frontier_points(path: Path) -> list[Point]:
    """Returns the points in a file, which may be absent."""
    rows = read_metrics(path) if path.is_file() else []

    def point(row: dict[str, Any]) -> Point:
        values: dict[str, Any] = {name: math.nan if row[name] is None else row[name] for name in Point._fields}
        return Point(**values)

    return [point(row) for row in rows]


def _found(shared: SharedSetup, folder: Path, known: list[Point]) -> FrontierResult:
    """Returns all that is known, with the optimum and the best of N."""
    settings, world, held_out = shared.settings, shared.world, shared.held_out
    samples = score_texts(folder / "reference.npy", world, held_out, settings.optimum.samples)
    every = enumerate_texts(world, held_out, shared.column)
    if every is not None:
        curve, left_out = optimum.optimum_from_list(*every, settings.optimum.betas), []
    else:
        curve, left_out = optimum.optimum_from_samples(samples, settings.optimum.betas, settings.seed)
    best = [BestOf(n, *mean_interval(optimum.best_of_n(samples, n))) for n in settings.best_of]
    return FrontierResult(known, curve, left_out, best, every is not None, len(held_out), len(shared.train))
