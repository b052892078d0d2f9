"""The only place with effects in sequence: step, log, evaluate, save, resume."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed, evaluation, optim, sharding
from dpo_jax.data import order, pack
from dpo_jax.errors import UserError
from dpo_jax.records import Batch, TrainState
from dpo_jax.step import init_state
from dpo_jax.training import interrupts, trackers
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.compile import prepare
from dpo_jax.training.logger import StepLogger, WriteMetrics, append_from_primary, metrics_writer
from dpo_jax.training.metrics_file import Progress, truncate_metrics
from dpo_jax.training.run import PreparedRun, Run


def step_examples(run: Run, prepared: PreparedRun, step: int) -> np.ndarray:
    """Returns the rows of the training table that a step takes."""
    return order.example_indices(step, prepared.order, rows=len(run.train), batch_size=run.config.batch_size)


def batches(run: Run, prepared: PreparedRun, start: int) -> Iterator[tuple[Batch, int]]:
    """Yields the batch of every step from `start` and its number of microbatches, built ahead by a thread."""

    def build(step: int) -> tuple[Batch, int]:
        batch, count, _ = pack.build_batch(
            run.train, step_examples(run, prepared, step), prepared.shape, prepared.frozen.column
        )
        return prepared.put(batch), count

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(build, s) for s in range(start, min(start + 2, prepared.total_steps))]
        for step in range(start, prepared.total_steps):
            batch = ahead.pop(0).result()
            if step + 2 < prepared.total_steps:
                ahead.append(pool.submit(build, step + 2))
            yield batch


def _first_state(run: Run, prepared: PreparedRun) -> TrainState:
    """Returns the state before the first update, laid out over the devices."""
    tx = optim.build(**run.config.optim)
    where = jax.tree.map(lambda x: x.sharding, prepared.like)
    params = sharding.put_params(run.params, where.params)

    def own(params: Any, moving: Any) -> TrainState:
        # The step donates its state, so it must own its arrays: what device_put returns may share the host's memory.
        params, moving = jax.tree.map(lambda x: x + 0, (params, moving))
        return init_state(params, tx, run.loss.terms, moving)

    return jax.jit(own, out_shardings=where)(params, prepared.frozen.moving)


def train_run(run: Run, say: Callable[[str], None] = print) -> Path:
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
    returns the folders of the exported models. Those whose checkpoints are at different steps go on one after another.

    Raises:
      UserError: as `train`; of several runs, after those that have not failed are whole.
    """
    with contextlib.ExitStack() as held:
        for run in runs:
            held.enter_context(run.lock)
        held.enter_context(interrupts.explain_out_of_memory(runs[0].config))
        prepared = prepare(runs, say)
        with contextlib.ExitStack() as saving:
            asked = saving.enter_context(interrupts.stop_requests())
            alive = saving.enter_context(interrupts.hang_watchdog(runs[0].config.hang_seconds))
            members = [_member(*both, saving) for both in zip(runs, prepared.evaluators, strict=True)]
            alike: dict[int, list[RunMember]] = {}
            for member in members:
                member.state = _begin(member, prepared)
                alike.setdefault(int(member.state.step), []).append(member)
            for step, group in sorted(alike.items()):
                if step:
                    names = ", ".join(m.run.folder.name for m in group) if len(runs) > 1 else ""
                    say(f"resuming at step {step} of {prepared.total_steps}{names and ': '}{names}")
                _steps(group, prepared, asked, alive)
        for member in members:
            if not member.failed:
                _export(member.run, member.state)
    if failed := [m for m in members if m.failed]:
        raise UserError("; ".join(f"{m.run.folder.name}: {m.failed}" if len(runs) > 1 else m.failed for m in failed))
    return [run.folder / "model" for run in runs]


@dataclasses.dataclass
class RunMember:
    """One of the runs that train together, with what is its own.

    Attributes:
      show: (step, samples) -> where they are watched.
      state: as it stands.
      failed: why it learns nothing any more, if so; the others go on.
    """

    run: Run
    evaluator: evaluation.Evaluator
    checkpoints: Checkpoints
    write: WriteMetrics
    show: Callable[[int, trackers.SampleRows], None]
    state: Any = None
    failed: str = ""

    def tell(self, told: Callable[[], None]) -> None:
        """Has its journal told something, which may find that the run has failed."""
        try:
            if not self.failed:
                told()
        except UserError as e:
            self.failed = str(e)


def _member(run: Run, evaluator: evaluation.Evaluator, saving: contextlib.ExitStack) -> RunMember:
    tracker = trackers.make_tracker(run.config.track, run.folder, dataclasses.asdict(run.config))
    saving.callback(tracker.close)
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.config.keep, best=run.config.keep_best)
    saving.callback(checkpoints.close)
    return RunMember(run, evaluator, checkpoints, metrics_writer(run.folder, tracker), tracker.table)


def _export(run: Run, state: TrainState) -> None:
    """Writes the policy as a model folder."""
    if distributed.is_primary():
        for torn in run.folder.glob(".model.*"):  # by a process that was killed while it wrote
            shutil.rmtree(torn)
    run.export(state.params, run.folder / "model")
    distributed.barrier("exported")


def _begin(member: RunMember, prepared: PreparedRun) -> TrainState:
    """Returns the state to go on from: the newest whole checkpoint, or the start, which is evaluated."""
    run, state = member.run, member.checkpoints.restore(prepared.like)
    if distributed.is_primary():
        for name in ("metrics.jsonl", "samples.jsonl"):  # what came after that checkpoint will be written again
            truncate_metrics(run.folder / name, -1 if state is None else int(state.step))
    if state is None:
        state = _first_state(run, prepared)
        member.checkpoints.check_room(state)
        known = _evaluate(member, prepared, state)
        if run.config.keep_best not in ("", *known):
            raise UserError(f"keep_best: no evaluation has {run.config.keep_best!r}; known: {', '.join(sorted(known))}")
    return state


def _steps(members: Sequence[RunMember], prepared: PreparedRun, asked: Callable, alive: Callable) -> None:
    """Trains to the last step, or until all have failed; ends the process after a step during which it was asked to."""
    run, total, start = members[0].run, prepared.total_steps, int(members[0].state.step)
    config, numbers = run.config, [m.evaluator.numbers for m in members]
    eval_steps = max(1, config.eval_every // config.batch_size) if config.eval_every else total
    alive()
    with contextlib.ExitStack() as shown:
        logs = [_journal(member, prepared, shown, member is members[0]) for member in members]
        for step, (batch, count) in enumerate(batches(run, prepared, start), start + 1):
            if prepared.frozen.fill is not None:
                batch = prepared.frozen.fill(members[0].state, batch, count)
            states, metrics = prepared.step([m.state for m in members], batch, np.int32(count), numbers)
            for member, log, state, values in zip(members, logs, states, metrics, strict=True):
                member.state = state
                member.tell(partial(log.step, step, values))
            alive()
            why, now = asked(), step % eval_steps == 0 or step == total
            save = step % config.save_every == 0 or step == total or why or (now and config.keep_best)
            for member, log in zip(members, logs, strict=True) if now or save else ():
                member.tell(log.flush)
                if member.failed:
                    continue
                found = _evaluate(member, prepared, member.state) if now else None
                alive()
                if save:
                    member.checkpoints.save(member.state, step, found)
            if why and step < total:
                for member in members:
                    member.checkpoints.wait()
                _ended(why, step)
            if all(member.failed for member in members):
                return


def _journal(member: RunMember, prepared: PreparedRun, shown: contextlib.ExitStack, watched: bool) -> StepLogger:
    """Returns the journal of a run; of several runs the progress of one is shown."""
    run, total = member.run, prepared.total_steps
    progress = Progress(total, run.config.batch_size, quiet=not (watched and distributed.is_primary()))
    shown.enter_context(progress)
    rows = partial(step_examples, run, prepared)
    return StepLogger(run.config, run.folder, member.write, run.train, progress, rows, member.checkpoints.taken)


def _ended(why: str, step: int) -> None:
    """Ends a run that was asked to."""
    if distributed.is_primary():
        print(f"asked to end ({why}): saved at step {step}; the same command goes on from there", flush=True)
    raise SystemExit(interrupts.EXIT_AGAIN)


def _evaluate(member: RunMember, prepared: PreparedRun, state: TrainState) -> dict[str, float]:
    """Evaluates the policy on the held-out data and writes its samples; returns the metrics."""
    run, step = member.run, int(state.step)
    examples = step * run.config.batch_size
    evaluator = member.evaluator
    if prepared.frozen.again is not None:
        evaluator = evaluator._replace(reference=prepared.frozen.again(state))
    params = state.params, prepared.base
    summary = evaluation.summarize(evaluation.evaluate_table(evaluator, params, state.running), evaluator.table.weights)
    means = {name: entry["mean"] for name, entry in summary.items()}
    member.write(step, examples, means)
    if distributed.is_primary():
        (run.folder / "eval.json").write_text(json.dumps({"step": step, "metrics": summary}, indent=1))
    if run.complete is None:
        return means
    policy = run.complete(prepared.parts.policy(*params))
    other = prepared.frozen.samples or [None] * len(policy)
    texts = zip(run.prompts, policy, other, strict=True)
    samples = [{"prompt": prompt, "policy": ours, "reference": theirs} for prompt, ours, theirs in texts]
    for sample in samples:
        append_from_primary(run.folder / "samples.jsonl", step, examples, sample)
    if distributed.is_primary():
        member.show(step, samples)
    return means
