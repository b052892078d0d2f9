"""The only place with effects in sequence: step, log, evaluate, save, resume."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import evaluate, journal, optim, processes, sharding, track, watch
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
    return train_together([run], say)[0]


def train_together(runs: Sequence[Run], say: Callable[[str], None] = print) -> list[Path]:
    """Trains runs that differ in `prepare.numbers` only, as `train` does each, in one program and on the same batches;
    returns the folders of the exported models."""
    with contextlib.ExitStack() as held:
        for run in runs:
            held.enter_context(run.lock)
        held.enter_context(watch.memory(runs[0].config))
        prepared = prepare(runs, say)
        with contextlib.ExitStack() as saving:
            members = [_member(run, evaluator) for run, evaluator in zip(runs, prepared.evaluators, strict=True)]
            for member in members:
                saving.callback(member.checkpoints.close)
                saving.callback(member.tracker.close)
            asked = saving.enter_context(watch.asked_to_end())
            alive = saving.enter_context(watch.hang(runs[0].config.hang_seconds))
            states = _steps(members, prepared, _begin(members, prepared, say), asked, alive)
        for run, state in zip(runs, states, strict=True):
            _export(run, state)
    return [run.folder / "model" for run in runs]


class Member(NamedTuple):
    """One of the runs that train together, with what is its own."""

    run: Run
    evaluator: evaluate.Evaluator
    checkpoints: Checkpoints
    tracker: track.Tracker
    write: journal.Write


def _member(run: Run, evaluator: evaluate.Evaluator) -> Member:
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.config.keep, best=run.config.keep_best)
    tracker = track.tracker(run.config.track, run.folder, dataclasses.asdict(run.config))
    return Member(run, evaluator, checkpoints, tracker, journal.writer(run.folder, tracker))


def _export(run: Run, state: TrainState) -> None:
    """Writes the policy as a model folder."""
    params = processes.fetch(state.params)
    if processes.first():
        for torn in run.folder.glob(".model.*"):  # by a process that was killed while it wrote
            shutil.rmtree(torn)
        run.export(params, run.folder / "model")
    processes.meet("exported")


def _begin(members: Sequence[Member], prepared: Prepared, say: Callable[[str], None]) -> list[TrainState]:
    """Returns the states to go on from: the newest whole checkpoints of one step, or the start, which is evaluated."""
    found = [m.checkpoints.restore(prepared.like) for m in members]
    steps = {-1 if state is None else int(state.step) for state in found}
    if len(steps) > 1:  # killed while they were saved, one after another: those of the step before are there still
        found = [m.checkpoints.restore(prepared.like, min(steps)) for m in members]
    states = [state for state in found if state is not None]
    if len(states) < len(members):
        if max(steps) >= 0:
            say("the runs have no checkpoint of one step in common: they start again")
        return [_first(member, prepared) for member in members]
    say(f"resuming at step {min(steps)} of {prepared.total_steps}")
    for member in members:
        _forget(member.run, min(steps))
    return states


def _forget(run: Run, step: int) -> None:
    """Drops what a run wrote after a step, since it will be written again."""
    if processes.first():
        for name in ("metrics.jsonl", "samples.jsonl"):
            truncate(run.folder / name, step)


def _first(member: Member, prepared: Prepared) -> TrainState:
    """Returns the state before the first update, evaluated."""
    _forget(member.run, -1)
    state = _first_state(member.run, prepared)
    member.checkpoints.check_room(state)
    known, best = _evaluate(member, prepared, state), member.run.config.keep_best
    if best not in ("", *known):
        raise UserError(f"keep_best: no evaluation has {best!r}; known: {', '.join(sorted(known))}")
    return state


def _steps(
    members: Sequence[Member], prepared: Prepared, states: list[TrainState], asked: Callable, alive: Callable
) -> list[TrainState]:
    """Returns the states after the last step; ends the process after a step during which it was asked to end."""
    run, total, start = members[0].run, prepared.total_steps, int(states[0].step)
    config = run.config
    eval_steps = max(1, config.eval_every // config.batch_size) if config.eval_every else total
    alive()
    with Progress(total, config.batch_size, quiet=not processes.first()) as progress:
        rows = partial(rows_of, run, prepared)
        logs = [
            Journal(m.run.config, m.run.folder, m.write, run.train, progress, rows, m.checkpoints.taken)
            for m in members
        ]
        for step, (batch, count) in enumerate(batches(run, prepared, start), start + 1):
            if prepared.frozen.fill is not None:
                batch = prepared.frozen.fill(states[0], batch, count)
            states, metrics = prepared.step(states, batch, np.int32(count))
            for log, values in zip(logs, metrics, strict=True):
                log.step(step, values)
            alive()
            why, now = asked(), step % eval_steps == 0 or step == total
            save = step % config.save_every == 0 or step == total or why or (now and config.keep_best)
            for member, log, state in zip(members, logs, states, strict=True):
                if now or save:
                    log.flush()
                found = _evaluate(member, prepared, state) if now else None
                alive()
                if save:
                    member.checkpoints.save(state, step, found)
            if why and step < total:
                for member in members:
                    member.checkpoints.wait()
                _ended(why, step)
        for log in logs:
            log.flush()
    return states


def _ended(why: str, step: int) -> None:
    """Ends a run that was asked to."""
    if processes.first():
        print(f"asked to end ({why}): saved at step {step}; the same command goes on from there", flush=True)
    raise SystemExit(watch.AGAIN)


def _evaluate(member: Member, prepared: Prepared, state: TrainState) -> dict[str, float]:
    """Evaluates the policy on the held-out data and writes its samples; returns the metrics."""
    run, step = member.run, int(state.step)
    examples = step * run.config.batch_size
    evaluator = member.evaluator
    if prepared.frozen.again is not None:
        evaluator = evaluator._replace(reference=prepared.frozen.again(state))
    params = state.params, prepared.base
    summary = evaluate.summary(evaluate.values(evaluator, params, state.running))
    means = {name: entry["mean"] for name, entry in summary.items()}
    member.write(step, examples, means)
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
