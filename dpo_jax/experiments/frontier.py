"""The paper's first experiment (section 6.1; figure 2, left): the reward of each method against its KL.

Every method starts from one reference and is trained at several strengths of its constraint to it; runs are measured
every `eval_every` steps. Runs share the pairs, the reference's log-probs and the compiled programs; seeds, which come
one after another, share the programs. The run folder keeps every measurement, so that an interrupted experiment resumes
with the missing ones.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import distributed, optim
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import difference, dump
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.experiments import offline, online, optimum, ppo, setup
from dpo_jax.experiments.points import BestOf, FrontierResult, Point, frontier_points
from dpo_jax.experiments.reward_model import centered, train_reward_model
from dpo_jax.experiments.rollouts import Problem
from dpo_jax.experiments.setup import SharedSetup
from dpo_jax.experiments.world import enumerate_rewards, sample_rewards, score_completions
from dpo_jax.intervals import mean_interval
from dpo_jax.paths import is_run, written
from dpo_jax.records import Array
from dpo_jax.rewards.registry import get_reward
from dpo_jax.rewards.words import Reward
from dpo_jax.training import interrupts
from dpo_jax.training.metrics_file import append_metrics, truncate_metrics
from dpo_jax.training.run_folder import run_config

log = logging.getLogger(__name__)

MAX_STEP = 2**31
# Keys that may change on resuming, because no run depends on them.
CHANGEABLE = ("run", "seeds", "optimum.betas", "best_of")
ONLINE = ("ppo", "ppo_gt", "online_dpo")


class FrontierJob(NamedTuple):
    """One run: a method at one strength, measured after some of its steps."""

    method: str
    strength: float
    steps: tuple[int, ...]


START = FrontierJob("sft", 0.0, (0,))  # the reference itself


Record = Callable[[FrontierJob, Any, int], None]
"""(job, parameters, steps done): called after every step; measures the policy after the steps of the job."""
TrainJob = Callable[[FrontierJob], None]
"""Trains one run from its start."""


def frontier_jobs(settings: FrontierConfig) -> list[FrontierJob]:
    """Returns the runs; each is measured every `eval_every` steps and after its last one."""
    jobs = []
    for method in ("dpo", *ONLINE, "unlikelihood", "preferred_ft"):
        sizes = settings.online if method in ONLINE else settings
        steps = (*range(sizes.eval_every, sizes.max_steps, sizes.eval_every), sizes.max_steps)
        jobs += [FrontierJob(method, float(strength), steps) for strength in getattr(settings, method)]
    return jobs


def run_frontier(settings: FrontierConfig) -> FrontierResult:
    """Runs the experiment, or its missing runs if the folder has some, and returns the whole result.

    Raises:
      UserError: invalid settings, or a folder with another config.
    """
    setup.check_frontier(settings)
    folder = Path(settings.run)
    with _lock_run(folder, settings):
        setups, path = setup.setup_seeds(settings, folder), folder / "points.jsonl"
        truncate_metrics(path, MAX_STEP)  # drops an incomplete last line, left by a killed process
        known = frontier_points(path, settings.seed)
        for shared in setups:
            _run_seed(shared, path, {p[:3] for p in known if p.seed == shared.settings.seed})
        every = frontier_points(path, settings.seed)
        points = [p for p in every if settings.seed <= p.seed < settings.seed + settings.seeds]
        places = {job[:2]: place for place, job in enumerate((START, *frontier_jobs(settings)))}
        found = _result(setups, sorted(points, key=lambda p: (places[p[:2]], p.step, p.seed)))
        return found._replace(other_seeds=len(every) - len(points))


def _run_seed(shared: SharedSetup, path: Path, done: set[tuple[str, float, int]]) -> None:
    """Trains and measures the runs of one seed that are missing in the file of points, which has those of `done`."""
    stopped = threading.Event()
    record = _make_recorder(shared, path, done, stopped)
    record(START, shared.world.reference, 0)
    jobs = frontier_jobs(shared.settings)
    missing = [job for job in jobs if not {(*job[:2], step) for step in job.steps} <= done]
    tasks = _tasks(missing, partial(_trainer, shared, record))
    distributed.run_concurrently(tasks, distributed.concurrent_programs(), stopped.set)


def _make_recorder(
    shared: SharedSetup, path: Path, done: set[tuple[str, float, int]], stopped: threading.Event
) -> Record:
    """Returns the function that measures runs and appends the points to a file.

    Args:
      shared: the measurement and the settings.
      path: the file; several threads may append to it.
      done: (method, strength, step) of this seed's points in the file at the start; they are not measured again.
      stopped: once set, the next step of every run raises `CancelledError`.
    """
    lock = threading.Lock()

    def record(job: FrontierJob, params: Any, step: int) -> None:
        if stopped.is_set():
            raise CancelledError
        if step in job.steps and (*job[:2], step) not in done:
            point = shared.measure(params, *job[:2], step)
            values = point._asdict()
            with lock:
                append_metrics(path, values.pop("step"), step * shared.settings.batch_size, values)
            if step == job.steps[-1]:
                name = f"{job.method} {job.strength:g}" + (f", seed {point.seed}" if shared.settings.seeds > 1 else "")
                log.info(f"{name}: reward {point.reward:.3f} at KL {point.kl:.3f}")

    return record


def _lock_run(folder: Path, settings: FrontierConfig) -> Any:
    """Locks the run folder and writes its config; returns the lock, a context manager.

    Raises:
      UserError: the folder has another config.
    """
    old = run_config(folder, kind=FrontierConfig) if is_run(folder) else settings
    if changed := difference(old, settings, CHANGEABLE):
        raise UserError(f"{folder} belongs to another config ({'; '.join(changed)}); give another --run")
    lock = interrupts.lock_folder(folder)
    with written(folder / "config.yaml") as file:
        file.write(dump(settings))
    return lock


def _tasks(missing: Sequence[FrontierJob], trainer: Callable[[str], TrainJob]) -> Iterator[Callable[[], None]]:
    """Yields a task for each run; builds the trainer of a method before the method's first run."""
    for method, jobs in itertools.groupby(missing, key=lambda job: job.method):
        train = trainer(method)
        yield from (partial(train, job) for job in jobs)


def _trainer(shared: SharedSetup, record: Record, method: str) -> TrainJob:
    """Returns the function that trains one run of a method."""
    if method not in ONLINE:
        return _offline_trainer(shared, method, record)
    if method != "ppo":
        return _online_trainer(shared, shared.world.reward, record)
    learned = get_reward(f"model:{train_reward_model(shared.settings, shared.folder)}")
    return _online_trainer(shared, centered(learned, shared.world, shared.prompts), record)


def _offline_trainer(shared: SharedSetup, method: str, record: Record) -> TrainJob:
    """Returns the function that trains a run on pairs; runs of one method share a compiled step."""
    settings, world = shared.settings, shared.world
    used = _chosen_only if method == "preferred_ft" else lambda table: table
    table = used(shared.train)
    ref_logps = shared.table_logps(world.reference, table, shared.pairs_layout) if method == "dpo" else None
    if method not in shared.programs:
        config = job_config(settings, method, 1.0)
        shared.programs[method] = offline.offline_program(world, config, used(shared.every), None)
    program = shared.programs[method]._replace(table=table, ref_logps=ref_logps)

    def train(job: FrontierJob) -> None:
        seed = settings.seed + (int(job.strength) if method == "preferred_ft" else 0)
        for step, params in offline.offline_steps(program, job_config(settings, method, job.strength), seed):
            record(job, params, step)

    return train


def job_config(settings: FrontierConfig, method: str, strength: float) -> Config:
    """Returns the config of a run on pairs."""
    losses = {"dpo": {"beta": strength}, "unlikelihood": {"alpha": strength}, "preferred_ft": {}}
    loss = {"name": method if method != "preferred_ft" else "sft", **losses[method]}
    rates = optim.with_total_steps(settings.optim, settings.max_steps)
    return Config(loss=loss, optim=rates, batch_size=settings.batch_size, max_steps=settings.max_steps)


def _chosen_only(pairs: Table) -> Table:
    """Returns the table without the rejected responses."""
    return Table.of(
        pairs[i]._replace(responses=pairs[i].responses[:1], scores=(), scored=pairs[i].scored[:1])
        for i in range(len(pairs))
    )


def _online_trainer(shared: SharedSetup, reward: Reward, record: Record) -> TrainJob:
    """Returns the function that trains a run on samples of the policy, scored by a reward of texts."""
    settings, world = shared.settings, shared.world

    def reward_of_ids(prompts: list[Array], completions: list[Array]) -> np.ndarray:
        return score_completions(world, reward, prompts, completions).astype(np.float32)

    problem = Problem(
        world.model, jax.device_put(world.start), jax.device_put(world.start), shared.prompts, reward_of_ids,
        steps=settings.online.max_steps, seed=settings.seed, ends=world.ends,
    )  # fmt: skip

    def train(job: FrontierJob) -> None:
        method, options = _online_method(settings, job)
        method(problem, options, on_step=lambda step, params: record(job, params, step))

    return train


def _online_method(settings: FrontierConfig, job: FrontierJob) -> tuple[Callable[..., Any], Any]:
    """Returns the function of a method that trains on samples of the policy, and its options."""
    sizes, new = settings.online, settings.max_new_tokens
    if job.method == "online_dpo":
        options = online.OnlineOptions(
            job.strength, sizes.learning_rate, sizes.rollouts // settings.completions, settings.completions, new,
            settings.label, settings.batch_size,
        )  # fmt: skip
        return online.train_online, options
    options = ppo.PpoOptions(
        job.strength, sizes.learning_rate, sizes.rollouts, inner_epochs=sizes.ppo_epochs, max_new_tokens=new,
        init_kl_coef=sizes.init_kl_coef, horizon=sizes.horizon,
    )  # fmt: skip
    return ppo.train_ppo, options


def _result(setups: list[SharedSetup], points: list[Point]) -> FrontierResult:
    """Returns the points with the optimum and the best of N, which are those of the first seed's samples."""
    shared = setups[0]
    settings, world, held_out = shared.settings, shared.world, shared.held_out
    samples = sample_rewards(shared.folder / "reference.npy", world, held_out, settings.optimum.completions)
    every = enumerate_rewards(world, held_out, shared.table_logps)
    if every is not None:
        curve, left_out = optimum.optimum_from_enumeration(*every, settings.optimum.betas), []
    else:
        curve, left_out = optimum.optimum_from_samples(samples, settings.optimum.betas, settings.seed)
    best = [BestOf(n, *mean_interval(optimum.best_of_n(samples, n))) for n in settings.best_of]
    return FrontierResult(points, curve, left_out, best, every is not None, len(held_out), len(shared.train))
