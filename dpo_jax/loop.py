"""The only place with effects in sequence: step, log, evaluate, save, resume."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import evaluate, journal, optim, processes, sharding, watch
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.data import order, pack
from dpo_jax.journal import Journal
from dpo_jax.metrics import Progress, truncate
from dpo_jax.prepare import Prepared, Run, prepare
from dpo_jax.records import Batch, TrainState, UserError
from dpo_jax.step import init_state


def rows_of(run: Run, prepared: Prepared, step: int) -> np.ndarray:
    """Returns the rows of the training table that a step takes."""
    return order.rows_of(step, prepared.order, rows=len(run.train), batch_size=run.config.batch_size)


def batches(run: Run, prepared: Prepared, start: int) -> Iterator[tuple[Batch, int]]:
    """Yields the batch of every step from `start` and its number of microbatches, built ahead by a thread."""

    def build(step: int) -> tuple[Batch, int]:
        batch, count, _ = pack.build(run.train, rows_of(run, prepared, step), prepared.shape, prepared.frozen.column)
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

    def own(params: Any, moving: Any) -> TrainState:
        # The step donates its state, so it must own its arrays: what device_put returns may share the host's memory.
        params, moving = jax.tree.map(lambda x: x + 0, (params, moving))
        return init_state(params, tx, run.loss.terms, moving)

    return jax.jit(own, out_shardings=where)(params, prepared.frozen.moving)


def train(run: Run, say: Callable[[str], None] = print) -> Path:
    """Trains, resuming from the newest whole checkpoint; returns the folder of the exported model.

    Killed at any instant and called again, it ends with the same parameters, bit for bit, and the same metrics.

    Several processes call it alike; what is written and said, only the first of them writes and says.

    Raises:
      UserError: the loss is not finite; a checkpoint folder that cannot be used; the disk is full.
      SystemExit: code `watch.AGAIN`, after it was asked to end, with everything saved.
    """
    with run.lock, watch.memory(run.config):
        prepared = prepare(run, say)
        checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.config.keep, best=run.config.keep_best)
        try:
            with watch.asked_to_end() as asked, watch.hang(run.config.hang_seconds) as alive:
                state = _begin(run, prepared, checkpoints, say)
                state = _steps(run, prepared, checkpoints, state, asked, alive)
        finally:
            checkpoints.close()
        _export(run, state)
    return run.folder / "model"


def _export(run: Run, state: TrainState) -> None:
    """Writes the policy as a model folder."""
    params = processes.fetch(state.params)
    if processes.first():
        for torn in run.folder.glob(".model.*"):  # by a process that was killed while it wrote
            shutil.rmtree(torn)
        run.export(params, run.folder / "model")
    processes.meet("exported")


def _begin(run: Run, prepared: Prepared, checkpoints: Checkpoints, say: Callable[[str], None]) -> TrainState:
    """Returns the state to go on from: the newest whole checkpoint, or the start, which is evaluated."""
    state = checkpoints.restore(prepared.like)
    if processes.first():
        for name in ("metrics.jsonl", "samples.jsonl"):  # what came after that checkpoint will be written again
            truncate(run.folder / name, -1 if state is None else int(state.step))
    if state is None:
        state = _first_state(run, prepared)
        checkpoints.check_room(state)
        known = _evaluate(run, prepared, state)
        if run.config.keep_best not in ("", *known):
            raise UserError(f"keep_best: no evaluation has {run.config.keep_best!r}; known: {', '.join(sorted(known))}")
    else:
        say(f"resuming at step {int(state.step)} of {prepared.total_steps}")
    return state


def _steps(
    run: Run, prepared: Prepared, checkpoints: Checkpoints, state: TrainState, asked: Callable, alive: Callable
) -> TrainState:
    """Returns the state after the last step; ends the process after a step during which it was asked to end."""
    config, total, start = run.config, prepared.total_steps, int(state.step)
    eval_steps = max(1, config.eval_every // config.batch_size) if config.eval_every else total
    alive()
    with Progress(total, config.batch_size, quiet=not processes.first()) as progress:
        rows = partial(rows_of, run, prepared)
        log = Journal(config, run.folder, run.train, progress, rows, checkpoints.taken)
        for step, (batch, count) in enumerate(batches(run, prepared, start), start + 1):
            if prepared.frozen.fill is not None:
                batch = prepared.frozen.fill(state, batch, count)
            state, metrics = prepared.step(state, batch, np.int32(count))
            log.step(step, metrics)
            alive()
            why, found = asked(), None
            if step % eval_steps == 0 or step == total:
                log.flush()
                found = _evaluate(run, prepared, state)
                alive()
            if step % config.save_every == 0 or step == total or why or (found and config.keep_best):
                log.flush()
                checkpoints.save(state, step, found)
            if why and step < total:
                checkpoints.wait()
                _ended(why, step)
        log.flush()
    return state


def _ended(why: str, step: int) -> None:
    """Ends a run that was asked to."""
    if processes.first():
        print(f"asked to end ({why}): saved at step {step}; the same command goes on from there", flush=True)
    raise SystemExit(watch.AGAIN)


def _evaluate(run: Run, prepared: Prepared, state: TrainState) -> dict[str, float]:
    """Evaluates the policy on the held-out data and writes its samples; returns the metrics."""
    step = int(state.step)
    examples = step * run.config.batch_size
    evaluator = prepared.evaluator
    if prepared.frozen.again is not None:
        evaluator = evaluator._replace(reference=prepared.frozen.again(state))
    params = state.params, prepared.base
    summary = evaluate.summary(evaluate.values(evaluator, params, state.running))
    means = {name: entry["mean"] for name, entry in summary.items()}
    journal.append(run.folder / "metrics.jsonl", step, examples, means)
    if processes.first():
        (run.folder / "eval.json").write_text(json.dumps({"step": step, "metrics": summary}, indent=1))
    if run.complete is None:
        return means
    policy = run.complete(prepared.parts.policy(*params))
    other = prepared.frozen.samples or [None] * len(policy)
    for prompt, ours, theirs in zip(run.prompts, policy, other, strict=True):
        sample = {"prompt": prompt, "policy": ours, "reference": theirs}
        journal.append(run.folder / "samples.jsonl", step, examples, sample)
    return means
