"""The training loop: the only module with effects in sequence. Step, log, evaluate, save, resume."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed, evaluation, optim, sharding
from dpo_jax.data import order, pack
from dpo_jax.errors import UserError
from dpo_jax.records import Batch, TrainState
from dpo_jax.step import init_state
from dpo_jax.training import interrupts, logger, trackers
from dpo_jax.training.best import evaluated_values, evaluations_since_best, keep_evaluation, means, run_evaluation
from dpo_jax.training.checkpoint import EVALUATION, Checkpoints, best_checkpoint, write_evaluation
from dpo_jax.training.compile import PreparedRun, prepare_run
from dpo_jax.training.metrics_file import truncate_metrics
from dpo_jax.training.progress import Progress
from dpo_jax.training.run import Run, eval_interval

log = logging.getLogger(__name__)

KL = "eval_kl"  # of samples; its interval is drawn along the run
Callback = Callable[[int, dict[str, float], TrainState], Any]
"""(updates done, metrics, state) -> True to stop the run, which is then saved and exported. Called after every step and
after every evaluation, whose metrics have names in `eval_`. The next step donates the state: copy what you keep."""


def step_examples(run: Run, prepared: PreparedRun, step: int) -> np.ndarray:
    """Returns the indices of the training examples of a step, counted from 0."""
    return order.example_indices(
        step, prepared.order, rows=len(run.train_table), batch_size=run.config.batch_size
    )  # fmt: skip


def batches(run: Run, prepared: PreparedRun, start: int) -> Iterator[tuple[Batch, int]]:
    """Yields the batch of every step from `start` and its microbatch count; a thread builds two batches ahead."""

    def build(step: int) -> tuple[Batch, int]:
        indices = step_examples(run, prepared, step)
        batch, count, _ = pack.build_batch(run.train_table, indices, prepared.layout, prepared.reference.ref_logps)
        return prepared.put(batch), count

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(build, s) for s in range(start, min(start + 2, prepared.total_steps))]
        for step in range(start, prepared.total_steps):
            batch = ahead.pop(0).result()
            if step + 2 < prepared.total_steps:
                ahead.append(pool.submit(build, step + 2))
            yield batch


def train_run(run: Run, prepared: PreparedRun | None = None, callbacks: Sequence[Callback] = ()) -> Any:
    """Trains a run, resuming from the newest intact checkpoint, and exports the model.

    Killed at any instant and called again, it ends with bit-identical parameters and the same metrics. Call it from
    every process; only process 0 writes files and logs.

    Args:
      run: from `setup.setup_run`; its folder is released at the end.
      prepared: the run on its devices, if another run has prepared it already (`compile.with_hparams`).
      callbacks: called after every step and evaluation; they make each step wait for its metrics.

    Returns:
      The parameters of the exported policy, with adapters attached: those of the best checkpoint with `keep_best`, else
      the last ones.

    Raises:
      UserError: the loss is not finite; a checkpoint folder that cannot be used; the disk is full.
      SystemExit: with `interrupts.EXIT_AGAIN` after a request to stop, with everything saved.
    """
    with run.lock, interrupts.explain_out_of_memory(run.config.model, run.config.data):
        prepared = prepared or prepare_run(run)
        with contextlib.ExitStack() as stack:
            loop = _Loop(run, prepared, stack, callbacks)
            state = loop.start()
            if int(state.step):
                log.info(f"resuming at step {int(state.step)} of {prepared.total_steps}")
            state = loop.best(loop.steps(state)._replace(opt_state=()))
            loop.finish(int(state.step))
        _export(run, state)
    return prepared.shardings.policy(state.params, prepared.base)


def _export(run: Run, state: TrainState) -> None:
    """Writes the policy as a model folder."""
    if distributed.is_primary():
        for torn in run.folder.glob(".model.*"):  # left by a process that was killed while it wrote
            shutil.rmtree(torn)
    run.export(run.config, state.params, run.folder / "model", int(state.step))
    if distributed.is_primary():
        keep_evaluation(run.folder, int(state.step))
    distributed.barrier("exported")


class _Loop:
    """The open files and handlers of a run in training."""

    def __init__(self, run: Run, prepared: PreparedRun, stack: contextlib.ExitStack, callbacks: Sequence[Callback]):
        config = run.config
        self.run, self.prepared, self.callbacks = run, prepared, callbacks
        self.values: list[float | None] = []  # of keep_best, an evaluation each, in process 0
        self.stop_requested = stack.enter_context(interrupts.stop_requests())
        self.alive = stack.enter_context(interrupts.hang_watchdog(config.hang_seconds))
        self.tracker = trackers.make_tracker(config.track, run.folder, dataclasses.asdict(config))
        stack.callback(self.tracker.close)
        self.checkpoints = Checkpoints(run.folder / "checkpoints", keep=config.keep, best=config.keep_best)
        stack.callback(self.checkpoints.close)
        quiet = not distributed.is_primary() or logging.getLogger("dpo_jax").level > logging.INFO
        progress = Progress(prepared.total_steps, config.batch_size, quiet=quiet)
        stack.enter_context(progress)
        self.write = logger.metrics_writer(run.folder, self.tracker)
        learning_rate = optim.build(**config.optim).learning_rate
        examples = partial(step_examples, run, prepared)
        self.logger = logger.StepLogger(run, self.write, progress, examples, self.checkpoints.taken, learning_rate)

    def start(self) -> TrainState:
        """Returns the state of the newest intact checkpoint, or the first one, which is evaluated."""
        run, state = self.run, self.checkpoints.restore(self.prepared.abstract_state)
        if distributed.is_primary():
            for name in ("metrics.jsonl", "samples.jsonl"):  # lines after that checkpoint will be written again
                truncate_metrics(run.folder / name, -1 if state is None else int(state.step))
        if state is None:
            state = _first_state(run, self.prepared)
            self.checkpoints.check_room(state)
            self.evaluate(state)
        elif distributed.is_primary():
            self.values = evaluated_values(run.folder, run.config.keep_best)
        return state

    def steps(self, state: TrainState) -> TrainState:
        """Trains to the last step or until a callback stops the run; ends the process when asked to stop."""
        prepared, total, config, start = self.prepared, self.prepared.total_steps, self.run.config, int(state.step)
        eval_steps = eval_interval(config, len(self.run.train_table)) or total
        self.alive()
        if start < total and self.out_of_patience(start):
            return state
        for step, (batch, count) in enumerate(batches(self.run, prepared, start), start + 1):
            if prepared.reference.fill is not None:
                batch = prepared.reference.fill(state, batch, count)
            state, metrics = prepared.step(state, batch, np.int32(count), prepared.base, prepared.hparams)
            self.logger.step(step, metrics)
            self.alive()
            stop, why, found = self.call(step, metrics, state), self.stop_requested(), None
            if step == total or stop or step % eval_steps == 0:
                self.logger.flush()
                found = self.evaluate(state)
                self.alive()
                stop = self.call(step, means(found), state) or stop
                self.values.append(found.get(config.keep_best, {}).get("mean"))
            if step == total or stop or why or step % config.save_every == 0 or (found and config.keep_best):
                self.logger.flush()
                self.checkpoints.save(state, step, found)
            if stop and step < total:
                log.info(f"stopped by a callback at step {step} of {total}")
                return state
            if found and step < total and self.out_of_patience(step):
                return state
            if why and step < total:
                self.checkpoints.wait()
                interrupts.end_run(why, f"saved at step {step}")
        return state

    def finish(self, step: int) -> None:
        """Sends the evaluation of the exported policy to the tracker, with its intervals."""
        if distributed.is_primary() and (found := run_evaluation(self.run.folder, step)):
            self.tracker.final(step, found)

    def call(self, step: int, metrics: Any, state: TrainState) -> bool:
        """Calls the callbacks; returns whether one of process 0 stops the run."""
        if not self.callbacks:
            return False
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        answers = [callback(step, values, state) for callback in self.callbacks]  # all are called, whatever one says
        return bool(distributed.broadcast_from_primary(int(any(map(_is_true, answers)))))

    def out_of_patience(self, step: int) -> bool:
        """Returns whether the run ends early: `patience` evaluations had no better value than the one before them."""
        config = self.run.config
        if not config.patience:
            return False
        worse = evaluations_since_best(config.keep_best, self.values)
        if not (stop := bool(distributed.broadcast_from_primary(int(worse >= config.patience)))):
            return False
        why = f"{config.keep_best} was no better in the last {worse} evaluations (patience {config.patience})"
        log.info(f"stopped at step {step} of {self.prepared.total_steps}: {why}")
        return stop

    def best(self, state: TrainState) -> TrainState:
        """Returns the state to export: that of the best checkpoint if the run keeps it, else the last one, as given."""
        metric, like = self.run.config.keep_best, self.prepared.abstract_state._replace(opt_state=())
        self.checkpoints.wait()
        while metric:
            found = best_checkpoint(self.checkpoints.folder, metric) if distributed.is_primary() else None
            step = distributed.broadcast_from_primary(-1 if found is None else found)
            if step < 0:
                log.warning(f"keep_best: no checkpoint has {metric}; model/ is the policy of step {int(state.step)}")
                return state
            best = state if step == int(state.step) else self.checkpoints.restore(like, step, optimizer=False)
            if best is not None:  # else it was damaged and has been moved; the next best one follows
                log.info(f"model/ is the policy of step {step}, the best by {metric}")
                return best
        return state

    def evaluate(self, state: TrainState) -> dict[str, dict[str, float]]:
        """Evaluates the policy on the held-out data and writes its samples.

        Returns:
          Metric -> mean, low and high (95% interval) and n.
        """
        run, prepared, step = self.run, self.prepared, int(state.step)
        evaluator, examples, params = prepared.evaluator, step * run.config.batch_size, (state.params, prepared.base)
        if prepared.reference.recompute is not None:
            evaluator = evaluator._replace(ref_logps=prepared.reference.recompute(state))
        found = evaluation.evaluate_table(evaluator, params, state.running)
        summary = evaluation.summarize(found, evaluator.table.weights)
        completions = run.complete(prepared.shardings.policy(*params)) if run.complete else None
        if completions and prepared.reference.log_ratios is not None:
            summary[KL] = evaluation.mean_with_interval(prepared.reference.log_ratios(state, completions.ids))
        if run.config.keep_best not in ("", *summary):
            known = ", ".join(sorted(summary))
            raise UserError(f"keep_best: no evaluation has {run.config.keep_best!r}; known: {known}")
        ends = [summary[KL][end] for end in ("low", "high")] if "low" in summary.get(KL, {}) else []
        self.write(step, examples, means(summary) | ({f"{KL}/half": (ends[1] - ends[0]) / 2} if ends else {}))
        if distributed.is_primary():
            write_evaluation(run.folder / EVALUATION, step, summary)
        if completions:
            self._write_samples(step, examples, completions.texts)
        return summary

    def _write_samples(self, step: int, examples: int, completions: Sequence[str]) -> None:
        reference = self.prepared.reference.samples or [None] * len(completions)
        texts = zip(self.run.prompts, completions, reference, strict=True)
        samples = [{"prompt": prompt, "policy": ours, "reference": theirs} for prompt, ours, theirs in texts]
        for sample in samples:
            logger.append_from_primary(self.run.folder / "samples.jsonl", step, examples, sample)
        if distributed.is_primary():
            self.tracker.table(step, samples)


def _first_state(run: Run, prepared: PreparedRun) -> TrainState:
    """Returns the sharded state before the first update."""
    tx = optim.build(**run.config.optim)
    where = jax.tree.map(lambda x: x.sharding, prepared.abstract_state)
    params = sharding.put_params(run.params, where.params)

    def own(params: Any, moving: Any) -> TrainState:
        # The step donates its state. device_put may share the host's memory, which must not be overwritten: copy.
        params, moving = jax.tree.map(lambda x: x + 0, (params, moving))
        return init_state(params, tx, run.loss, moving)

    return jax.jit(own, out_shardings=where)(params, prepared.reference.moving)


def _is_true(answer: Any) -> bool:
    """Returns whether a callback says True: Python's, or a boolean of numpy or JAX."""
    # A dtype of booleans equals bool. What has another one may be on many devices, and is not looked at.
    return np.ndim(answer) == 0 and getattr(answer, "dtype", type(answer)) in (bool,) and bool(answer)
