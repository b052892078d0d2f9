"""The paper's first experiment (section 6.1, figure 2 left): the reward that each method reaches at each KL.

From one reference, each method is trained at several strengths of what holds it there, and measured every so many
steps. What methods share is made once: pairs, the reference's log-probs, compiled programs. Everything is kept in the
run folder as it is found, so that a run that was killed goes on with what is missing.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax import assemble, config, data, folders, keys, loop, metrics, optim, rewards, sharding, watch
from dpo_jax.config import Config, Data, Model
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.experiments import draws, offline, optimum
from dpo_jax.experiments.measure import Column, Point, World, column_of, measurer, shape_of
from dpo_jax.experiments.optimum import Optimum
from dpo_jax.metrics import mean_interval
from dpo_jax.models import hf
from dpo_jax.records import Array, UserError

DRAWS = 256  # completions that are sampled at a time, at most
LAST = 2**31  # no step is later
FREE = ("run", "optimum.betas", "best_of")  # may change when a frontier goes on: they are worked out anew


@dataclass(frozen=True)
class Best:
    """The exact optimum, from the reference's own completions."""

    samples: int = 256
    """Completions of each held-out prompt, from which the best of N are too."""
    betas: tuple[float, ...] = (8.0, 4.0, 2.0, 1.5, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2)
    """The betas at which it is wanted."""


@dataclass(frozen=True)
class Frontier:
    """The paper's figure 2 (left): reward against KL, of each method at several strengths."""

    reward: str
    """The true reward of a completion: synthetic, happy, vader, words:FILE, logistic:FILE or module:function."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: dict[str, Any] = field(default_factory=lambda: {"name": "rmsprop"})
    prompts: int | None = None
    """Distinct training prompts of whose completions the pairs are made (None: all)."""
    completions: int = 4
    """Completions of each of them; 4 make 6 pairs (paper, appendix C.1)."""
    label: Literal["bradley_terry", "ranked", "best_worst"] = "bradley_terry"
    """How a pair is labelled, as in dpo-jax pairs."""
    max_new_tokens: int = 64
    """Longest completion; all are drawn at temperature 1."""
    dpo: tuple[float, ...] = (0.05, 0.1, 1.0, 5.0)
    """Betas of DPO."""
    unlikelihood: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)
    """Alphas of unlikelihood."""
    preferred_ft: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Seeds of fine-tuning on the chosen responses."""
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """The best of so many completions of the reference."""
    optimum: Best = field(default_factory=Best)
    batch_size: int = 64
    """Pairs in a step."""
    max_steps: int = 100
    """Steps of each run."""
    eval_every: int = 25
    """Steps between measurements."""
    eval_prompts: int = 256
    """Distinct held-out prompts, from each of which every policy is sampled once."""
    run: str = ""
    """The folder of what is found; by default runs/<name of the config>."""
    seed: int = 0
    """Of everything random."""


class Job(NamedTuple):
    """One run: a method at one strength, and the steps at which it is measured."""

    method: str
    strength: float
    steps: tuple[int, ...]


class BestOf(NamedTuple):
    """The best of n completions: mean reward and half its 95% interval; its KL is at most `winrate.kl_bound(n)`."""

    n: int
    reward: float
    reward_half: float


class Found(NamedTuple):
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


class Shared(NamedTuple):
    """What every run of an experiment uses, beside the world.

    Attributes:
      train: pairs.
      column: computes log-probs.
      shape: of batches of pairs, for `column`.
      prompts: training prompts.
      held_out: held-out prompts.
      measure: (params, method, strength, step) -> Point.
    """

    train: Table
    column: Column
    shape: pack.Shape
    prompts: list[Array]
    held_out: list[Array]
    measure: Callable[..., Point]


def jobs(settings: Frontier) -> list[Job]:
    """Returns the runs; one measures every `eval_every` steps and at its end."""
    every = (*range(settings.eval_every, settings.max_steps, settings.eval_every), settings.max_steps)
    strengths = {"dpo": settings.dpo, "unlikelihood": settings.unlikelihood, "preferred_ft": settings.preferred_ft}
    return [Job(method, float(s), every) for method, values in strengths.items() for s in values]


def run(settings: Frontier, say: Callable[[str], None]) -> Found:
    """Runs what is missing of an experiment, and returns all of it.

    Raises:
      UserError: settings that no experiment can have; the folder belongs to another one.
    """
    check(settings)
    folder = Path(settings.run)
    with _claimed(folder, settings):
        world = world_of(settings, say)
        shared = _shared(settings, folder, world, say)
        path = folder / "points.jsonl"
        metrics.truncate(path, LAST)  # which drops a line that a kill has torn
        known = points(path)
        if not known:
            _keep(path, settings, shared.measure(world.reference, "sft", 0.0, 0))
        done = {point[:3] for point in known}
        for method in dict.fromkeys(job.method for job in jobs(settings)):
            missing = [j for j in jobs(settings) if j.method == method and not {(*j[:2], s) for s in j.steps} <= done]
            for job, point in _measured(settings, world, shared, method, missing):
                if point[:3] not in done:
                    _keep(path, settings, point)
                if point.step == job.steps[-1]:
                    say(f"{method} {job.strength:g}: reward {point.reward:.3f} at KL {point.kl:.3f}")
        return found(settings, folder, world, shared, points(path))


def check(settings: Frontier) -> None:
    """Refuses values that no experiment can have, by key."""
    for key in ("batch_size", "max_steps", "eval_every", "eval_prompts", "max_new_tokens", "optimum.samples"):
        value = settings.optimum.samples if "." in key else getattr(settings, key)
        if value < 1:
            raise UserError(f"{key}: {value} is less than 1")
    if not settings.model.path:
        raise UserError("model.path: name the reference: a model's folder, a run, or the YAML of a run")
    if settings.completions < 2:
        raise UserError(f"completions: {settings.completions} is less than 2, so there are no pairs")
    if settings.best_of and not 1 <= min(settings.best_of) <= max(settings.best_of) <= settings.optimum.samples:
        raise UserError(f"best_of: numbers from 1 to optimum.samples, {settings.optimum.samples}")
    if min(settings.optimum.betas, default=1.0) <= 0 or min(settings.dpo, default=1.0) <= 0:
        raise UserError("optimum.betas and dpo: a beta is above 0")
    unused = ("responses", "flip_labels", "draw_labels", "duplicate")
    for key in unused:
        if getattr(settings.data, key) != getattr(Data(), key):
            raise UserError(f"data.{key}: pairs are made of the reference's completions, so it has no meaning here")
    optim.build(**settings.optim)
    rewards.get(settings.reward)


def _claimed(folder: Path, settings: Frontier) -> Any:
    """Makes the run folder, or takes it up again if it belongs to the same settings; returns the hold on it."""
    old = folders.config_of(folder, kind=Frontier) if folders.is_run(folder) else settings
    if changed := keys.difference(old, settings, FREE):
        raise UserError(f"{folder} belongs to another config ({'; '.join(changed)}); give another --run")
    lock = watch.locked(folder)
    with folders.written(folder / "config.yaml") as file:
        file.write(keys.dump(settings))
    return lock


def _start(settings: Frontier, say: Callable[[str], None]) -> Model:
    """Returns the reference's model section; one that is named by the YAML of a run is trained first if need be."""
    path = settings.model.path
    if path.endswith((".yaml", ".yml")):
        parsed = config.parse(Config, path, [], prog="dpo-jax frontier CONFIG.yaml", variants=folders.VARIANTS)
        stage = assemble.named(parsed, path)
        say(f"the reference is that of {path}")
        loop.train(assemble.run_of(stage, say), say)
        path = stage.run
    return Model(path, tokenizer=settings.model.tokenizer, compute=settings.model.compute, remat=settings.model.remat)


def world_of(settings: Frontier, say: Callable[[str], None]) -> World:
    """Returns what all policies share, the reference on the devices."""
    section = _start(settings, say)
    tokenizer = assemble.tokenizer_of(section)
    loaded = assemble.load_model(section, tokenizer, settings.seed)
    start, mesh = hf.whole(loaded.params), sharding.make_mesh()
    where = sharding.of_params(mesh, loaded.model.axes, start)
    reward = rewards.get(settings.reward)
    placed = sharding.put(start, where)
    rows = min(settings.eval_prompts, DRAWS)
    return World(
        loaded.model, mesh, where, start, placed, tokenizer, reward, settings.max_new_tokens, rows, settings.seed
    )  # fmt: skip


def _shared(settings: Frontier, folder: Path, world: World, say: Callable[[str], None]) -> Shared:
    """Returns pairs and prompts, drawn and labelled unless they are kept."""
    train, held_out = (
        _prompts(rows, count, settings, world)
        for rows, count in zip(
            assemble.comparisons(settings.data, 0), (settings.prompts, settings.eval_prompts), strict=True
        )
    )
    make, start = partial(draws.pairs, world=world, how=settings.label), time.perf_counter()
    pairs = make(folder / "pairs.jsonl", prompts=train, copies=settings.completions, seed=0)
    test = make(folder / "held_out.jsonl", prompts=held_out, copies=2, seed=1)
    say(
        f"{len(pairs):,} pairs from {len(train):,} prompts with {settings.completions} completions each, {len(test):,} "
        f"held out, {len(held_out):,} prompts to measure on ({time.perf_counter() - start:.0f} s)"
    )
    both = Table.of(table[i] for table in (pairs, test) for i in range(len(table)))
    column, shape = column_of(world), shape_of(world, both)
    return Shared(pairs, column, shape, train, held_out, measurer(world, held_out, test, shape, column))


def _prompts(rows: Any, count: int | None, settings: Frontier, world: World) -> list[Array]:
    """Returns the first distinct prompts as ids, all that are wanted or as many as there are."""
    found: dict[int, Any] = {}
    for row in data.comparisons(rows):
        if count is not None and len(found) == count:
            break
        found.setdefault(data.prompt_key(row.prompt), row.prompt)
    ids = assemble.prompt_ids(list(found.values()), world.tokenizer, settings.data)
    longest = max(map(len, ids))
    if longest > settings.data.max_prompt_length:
        raise UserError(f"data.max_prompt_length: a prompt has {longest} tokens, more than it says")
    return [np.array(prompt, np.int32) for prompt in ids]


def _measured(
    settings: Frontier, world: World, shared: Shared, method: str, missing: Sequence[Job]
) -> Iterator[tuple[Job, Point]]:
    """Yields the points of runs of one method, which share a compiled step; a run is trained from its start."""
    if not missing:
        return
    build = partial(_config, settings, method)
    table = shared.train if method != "preferred_ft" else _chosen(shared.train)
    column = None
    if method == "dpo":
        column = shared.column(world.reference, table, shared.shape)
    program = offline.program(world, build(missing[0].strength), table, column)
    for job in missing:
        seed = settings.seed + (int(job.strength) if method == "preferred_ft" else 0)
        for step, params in offline.steps(program, build(job.strength), seed):
            if step in job.steps:
                yield job, shared.measure(params, method, job.strength, step)


def _config(settings: Frontier, method: str, strength: float) -> Config:
    """Returns the config of one run."""
    losses = {"dpo": {"beta": strength}, "unlikelihood": {"alpha": strength}, "preferred_ft": {}}
    loss = {"name": method if method != "preferred_ft" else "sft", **losses[method]}
    return Config(loss=loss, optim=settings.optim, batch_size=settings.batch_size, max_steps=settings.max_steps)


def _chosen(pairs: Table) -> Table:
    """Returns the chosen responses of pairs alone."""
    return Table.of(pairs[i]._replace(responses=pairs[i].responses[:1], scores=()) for i in range(len(pairs)))


def points(path: Path) -> list[Point]:
    """Returns the points in a file, which may be absent."""
    rows = metrics.read(path) if path.is_file() else []
    fields = [{name: math.nan if row[name] is None else row[name] for name in Point._fields} for row in rows]
    return [Point(**values) for values in fields]


def _keep(path: Path, settings: Frontier, point: Point) -> None:
    values = point._asdict()
    step = values.pop("step")
    metrics.append(path, step, step * settings.batch_size, values)


def found(settings: Frontier, folder: Path, world: World, shared: Shared, known: list[Point]) -> Found:
    """Returns all that is known, with the optimum and the best of N."""
    samples = draws.rewards(folder / "reference.npy", world, shared.held_out, settings.optimum.samples)
    every = draws.listed(world, shared.held_out, shared.column)
    if every is not None:
        curve, left_out = optimum.from_list(*every, settings.optimum.betas), []
    else:
        curve, left_out = optimum.from_samples(samples, settings.optimum.betas, settings.seed)
    best = [BestOf(n, *mean_interval(optimum.best_of(samples, n))) for n in settings.best_of]
    return Found(known, curve, left_out, best, every is not None, len(shared.held_out), len(shared.train))
