"""The only place with effects in sequence: compile once, then step, log, evaluate, save, resume."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import evaluate, optim, reference, sharding
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.data import order, pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import batch_logps
from dpo_jax.losses import Loss
from dpo_jax.metrics import Progress, append, truncate
from dpo_jax.models import Model, lora
from dpo_jax.models.lora import Lora
from dpo_jax.records import Array, Batch, Logps, TrainState, UserError
from dpo_jax.step import init_state, make_train_step


class Run(NamedTuple):
    """All that a run is made of, assembled.

    Attributes:
      config: as resolved.
      folder: where everything is written.
      cache: folder of reference columns.
      model: pure functions of the architecture.
      loss: bound.
      params: host or stored arrays, what is trained, at the start: all of the policy, or its adapters.
      frozen: returns (host or stored arrays of the reference, their hash); None for a loss without a reference.
      train: table of comparisons.
      held_out: table of comparisons to evaluate on.
      complete: (params) -> completions of the sample prompts as text; None for no samples.
      prompts: the sample prompts as text.
      export: (params, folder) writes the model.
      base: host or stored arrays of the model that adapters are for; None where all of the policy is trained.
      lora: what the adapters are; None likewise.
    """

    config: Config
    folder: Path
    cache: Path
    model: Model
    loss: Loss
    params: Any
    frozen: Callable[[], tuple[Any, str]] | None
    train: Table
    held_out: Table
    complete: Callable[[Any], list[str]] | None
    prompts: list[str]
    export: Callable[[Any, Path], None]
    base: Any = None
    lora: Lora | None = None


class Prepared(NamedTuple):
    """A run on its devices: compiled functions, layouts, columns.

    `policy` makes the policy's parameters of what is trained.
    """

    mesh: Any
    shape: pack.Shape
    put: Callable
    step: Callable
    policy: Callable[[Any], Any]
    like: TrainState
    fill: Callable[[Batch, int], Batch] | None
    column: np.ndarray | None
    evaluator: evaluate.Evaluator
    reference_samples: list[str] | None
    total_steps: int
    order: order.Order


def total_steps(config: Config, rows: int) -> int:
    """Returns the number of updates of a run over a table of `rows` comparisons."""
    steps = config.epochs * order.steps_per_epoch(rows, config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def initialise(model: Model, seed: int) -> Any:
    """Returns random parameters as host arrays."""
    return jax.device_get(jax.jit(model.init)(jax.random.key(seed)))


def put_batch(batch: Batch, mesh: Any) -> Batch:
    """Returns a host batch on the devices, its rows split over them."""
    return jax.device_put(batch, sharding.of_batch(mesh))


def shardings_of(run: Run, tx: Any, mesh: Any) -> tuple[Any, TrainState]:
    """Returns the parameters' shardings, and the shapes and shardings of the whole state; allocates nothing."""
    shapes = jax.eval_shape(lambda p: init_state(p, tx), run.params)
    axes = run.model.axes if run.lora is None else lora.axes(run.model.axes, run.params)
    params = sharding.of_params(mesh, axes, shapes.params)
    where = sharding.of_state(mesh, params, shapes)
    like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return params, like


def policy_of(run: Run, base: Any, params: Any) -> Any:
    """Returns the policy's parameters from what is trained and, where that is adapters, the base on the devices."""
    return params if run.lora is None else lora.joined(base, params, run.lora)


def compiled_step(run: Run, tx: Any, mesh: Any, like: TrainState, base: Any) -> Callable:
    """Returns the compiled train step; the base of adapters is an argument, so that the program does not hold it."""

    def step(state: TrainState, batch: Batch, count: Array, base: Any) -> tuple[TrainState, Any]:
        def logps(params: Any, micro: Batch) -> Logps:
            return batch_logps(run.model, policy_of(run, base, params), micro)

        return make_train_step(logps, run.loss, tx)(state, batch, count)

    where = jax.tree.map(lambda x: x.sharding, like), sharding.replicated(mesh)
    return partial(jax.jit(step, donate_argnums=0, out_shardings=where), base=base)


def prepare(run: Run, say: Callable[[str], None]) -> Prepared:
    """Returns the run on its devices: everything that is done once, before the first step."""
    config = run.config
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    choose = partial(
        pack.choose,
        max_length=config.data.max_length,
        batch_size=config.batch_size,
        length=config.data.row_length,
        rows=config.data.rows,
        multiple_of=sharding.row_devices(mesh),
    )
    shape, eval_shape = choose(run.train), choose(run.held_out)
    put, logps = partial(put_batch, mesh=mesh), partial(batch_logps, run.model)
    tx = optim.build(**config.optim)
    trained, like = shardings_of(run, tx, mesh)
    params = trained if run.lora is None else sharding.of_params(mesh, run.model.axes, run.base)
    base = None if run.lora is None else sharding.put(run.base, params)
    fill = column = eval_column = samples = None
    if run.frozen is not None:
        weights, name = run.frozen()
        weights = base if weights is run.base else sharding.put(weights, params)
        make = reference.make_column(logps, sharding.of_batch(mesh))
        columns = partial(_column, run, make, weights, name, put, say)
        eval_column = columns(run.held_out, eval_shape, "held-out")
        if config.reference.mode == "cache":
            column = columns(run.train, shape, "training")
        else:
            fill = partial(_fill, make, weights)
        samples = run.complete(weights) if run.complete else None
    evaluator = evaluate.Evaluator(
        evaluate.make_step(logps, run.loss), run.held_out, eval_column, eval_shape, config.batch_size, put
    )
    steps = total_steps(config, len(run.train))
    say(
        f"{steps} steps of {config.batch_size} comparisons; microbatches of {shape.rows} rows x {shape.length} tokens "
        f"on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    rows = order.bind(config.data.order, run.train.prompts, config.seed)
    policy = partial(policy_of, run, base)
    step = compiled_step(run, tx, mesh, like, base)
    return Prepared(mesh, shape, put, step, policy, like, fill, column, evaluator, samples, steps, rows)


def rows_of(run: Run, prepared: Prepared, step: int) -> np.ndarray:
    """Returns the rows of the training table that a step takes."""
    return order.rows_of(step, prepared.order, rows=len(run.train), batch_size=run.config.batch_size)


def _column(run: Run, make: Any, weights: Any, name: str, put: Any, say: Any, table: Table, shape: Any, what: str):
    """Returns the reference column of a table, from the cache or by one pass over it."""
    start = time.perf_counter()
    compute = partial(reference.one_pass, make, weights, table, shape, run.config.batch_size, put)
    key = reference.key(table, name, run.config.model.compute)
    values, hit = reference.cached(run.cache / "reference", key, compute, (len(table), run.loss.responses))
    how = "from the cache" if hit else f"computed in {time.perf_counter() - start:.1f} s"
    say(f"reference log-probs of the {what} data: {how}")
    return values


def _fill(column: Callable, weights: Any, batch: Batch, count: int) -> Batch:
    """Returns the batch with its reference column filled in just in time."""
    return batch._replace(ref_logps=column(weights, batch, count))


def batches(run: Run, prepared: Prepared, start: int) -> Iterator[tuple[Batch, int]]:
    """Yields the batch of every step from `start` and its number of microbatches, built ahead by a thread."""

    def build(step: int) -> tuple[Batch, int]:
        batch, count, _ = pack.build(run.train, rows_of(run, prepared, step), prepared.shape, prepared.column)
        return prepared.put(batch), count

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(build, s) for s in range(start, min(start + 2, prepared.total_steps))]
        for step in range(start, prepared.total_steps):
            batch = ahead.pop(0).result()
            if step + 2 < prepared.total_steps:
                ahead.append(pool.submit(build, step + 2))
            yield batch


def _first_state(run: Run, prepared: Prepared) -> TrainState:
    """Returns the state before the first update, laid out over the devices."""
    tx = optim.build(**run.config.optim)
    where = jax.tree.map(lambda x: x.sharding, prepared.like)
    params = sharding.put(run.params, where.params)
    # The step donates its state, so it must own its arrays: what device_put returns may share the host's memory.
    return jax.jit(lambda p: init_state(jax.tree.map(lambda x: x + 0, p), tx), out_shardings=where)(params)


@contextlib.contextmanager
def _terminated() -> Iterator[list[int]]:
    """Yields a list that is not empty once the process was asked to end (SIGTERM)."""
    asked: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    except ValueError:  # not the main thread: signals are somebody else's
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


class _Log:
    """Writes the metrics of a step when the next one is under way, so that the device never waits for the host."""

    def __init__(self, run: Run, progress: Progress, rows: Callable[[int], np.ndarray]):
        self.run, self.progress, self.rows = run, progress, rows
        self.pending: tuple[int, Any] | None = None
        self.bad, self.clock = 0, (time.perf_counter(), 0)

    def step(self, step: int, metrics: Any) -> None:
        """Takes the metrics of update number `step`, still on the device."""
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        config, values = self.run.config, {k: float(v) for k, v in jax.device_get(metrics).items()}
        now, done = time.perf_counter(), step * config.batch_size
        rate = (done - self.clock[1]) / (now - self.clock[0]) if self.clock[1] else None
        self.clock = (now, done)
        self.bad = self.bad + 1 if values["nonfinite"] else 0
        if step % config.log_every == 0 or self.bad:
            learning_rate = float(optim.warm_up(config.optim["learning_rate"], config.optim["warmup_steps"])(step - 1))
            extra = {"learning_rate": learning_rate, "examples_per_second": rate}
            append(self.run.folder / "metrics.jsonl", step, done, values | extra)
        self.progress.update(step, values)
        if self.bad >= config.max_nonfinite:
            rows = self.rows(step - 1)
            raise UserError(
                f"step {step}: loss or gradient not finite {self.bad} times in a row, none of them applied; the last "
                f"batch held comparisons {rows.tolist()}; lower optim.learning_rate or look at those"
            )


def train(run: Run, say: Callable[[str], None] = print) -> Path:
    """Trains, resuming from the newest whole checkpoint; returns the folder of the exported model.

    Killed at any instant and called again, it ends with the same parameters, bit for bit, and the same metrics.

    Raises:
      UserError: the loss is not finite; a checkpoint folder that cannot be used.
      SystemExit: code 0, after SIGTERM, with everything saved.
    """
    prepared = prepare(run, say)
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.config.keep)
    try:
        with _terminated() as asked:
            state = _steps(run, prepared, checkpoints, _begin(run, prepared, checkpoints, say), asked)
    finally:
        checkpoints.close()
    run.export(state.params, run.folder / "model")
    return run.folder / "model"


def _begin(run: Run, prepared: Prepared, checkpoints: Checkpoints, say: Callable[[str], None]) -> TrainState:
    """Returns the state to go on from: the newest whole checkpoint, or the start, which is evaluated."""
    state = checkpoints.restore(prepared.like)
    for name in ("metrics.jsonl", "samples.jsonl"):  # what came after that checkpoint will be written again
        truncate(run.folder / name, -1 if state is None else int(state.step))
    if state is None:
        state = _first_state(run, prepared)
        _evaluate(run, prepared, state)
    else:
        say(f"resuming at step {int(state.step)} of {prepared.total_steps}")
    return state


def _steps(run: Run, prepared: Prepared, checkpoints: Checkpoints, state: TrainState, asked: list[int]) -> TrainState:
    """Returns the state after the last step; ends the process after a step during which it was asked to end."""
    config, total, start = run.config, prepared.total_steps, int(state.step)
    eval_steps = max(1, config.eval_every // config.batch_size) if config.eval_every else total
    with Progress(total, config.batch_size) as progress:
        log = _Log(run, progress, partial(rows_of, run, prepared))
        for step, (batch, count) in enumerate(batches(run, prepared, start), start + 1):
            if prepared.fill is not None:
                batch = prepared.fill(batch, count)
            state, metrics = prepared.step(state, batch, np.int32(count))
            log.step(step, metrics)
            if step % eval_steps == 0 or step == total:
                log.flush()
                _evaluate(run, prepared, state)
            if step % config.save_every == 0 or step == total or asked:
                log.flush()
                checkpoints.save(state, step)
            if asked:
                checkpoints.wait()
                print(f"asked to end (SIGTERM): saved at step {step}; the same command goes on from there")
                raise SystemExit(0)
        log.flush()
    return state


def _evaluate(run: Run, prepared: Prepared, state: TrainState) -> None:
    """Evaluates the policy on the held-out data and writes its samples."""
    step = int(state.step)
    examples = step * run.config.batch_size
    params = prepared.policy(state.params)
    summary = evaluate.summary(evaluate.values(prepared.evaluator, params))
    append(run.folder / "metrics.jsonl", step, examples, {name: entry["mean"] for name, entry in summary.items()})
    (run.folder / "eval.json").write_text(json.dumps({"step": step, "metrics": summary}, indent=1))
    if run.complete is None:
        return
    policy = run.complete(params)
    other = prepared.reference_samples or [None] * len(policy)
    for prompt, ours, theirs in zip(run.prompts, policy, other, strict=True):
        sample = {"prompt": prompt, "policy": ours, "reference": theirs}
        append(run.folder / "samples.jsonl", step, examples, sample)
