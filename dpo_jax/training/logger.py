"""Logs step metrics one step late, so that the device never waits for the host."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed
from dpo_jax.errors import UserError
from dpo_jax.optim import Schedule
from dpo_jax.paths import written
from dpo_jax.training.metrics_file import append_metrics
from dpo_jax.training.progress import Progress
from dpo_jax.training.run import Run
from dpo_jax.training.trackers import Tracker

log = logging.getLogger(__name__)
WriteMetrics = Callable[[int, int, dict[str, Any]], None]  # (step, comparisons trained on, metrics)


class StepLogger:
    """Writes the metrics of a step while the next one runs."""

    def __init__(
        self,
        run: Run,
        write: WriteMetrics,
        progress: Progress,
        examples: Callable[[int], np.ndarray],
        save_seconds: Callable[[], dict[str, float]],
        learning_rate: Schedule | None,
    ):
        """Opens nothing.

        Args:
          run: the run, for its config, folder and training table.
          write: writes a line of metrics.
          progress: the display.
          examples: step, from 0 -> the indices of its training examples.
          save_seconds: metrics of the saves since it was last called.
          learning_rate: the optimizer's schedule; None if unknown, and then not logged.
        """
        self.config, self.folder, self.table = run.config, run.folder, run.train_table
        self.write, self.progress, self.examples = write, progress, examples
        self.save_seconds, self.learning_rate = save_seconds, learning_rate
        self.pending: tuple[int, Any] | None = None
        self.bad, self.clock = 0, (time.perf_counter(), 0)

    def step(self, step: int, values: Any) -> None:
        """Keeps the metrics of update number `step` on the device and writes those of the step before."""
        self.flush()
        self.pending = (step, values)

    def flush(self) -> None:
        """Writes the pending metrics.

        Raises:
          UserError: `max_nonfinite` steps in a row were not finite.
        """
        if self.pending is None:
            return
        (step, arrays), self.pending = self.pending, None
        config, values = self.config, {k: float(v) for k, v in jax.device_get(arrays).items()}
        now, done = time.perf_counter(), step * config.batch_size
        rate = (done - self.clock[1]) / (now - self.clock[0]) if self.clock[1] else None
        self.clock = (now, done)
        self.bad = self.bad + 1 if values["nonfinite"] else 0
        if values["unweighted"]:
            log.warning("step %s: all weights are 0, so it changed nothing", step)
        if step % config.log_every == 0 or self.bad:
            known = {} if self.learning_rate is None else {"learning_rate": float(self.learning_rate(step - 1))}
            self.write(step, done, values | known | {"examples_per_second": rate} | self.save_seconds())
        self.progress.update(step, values)
        if self.bad >= config.max_nonfinite:
            raise UserError(
                f"step {step}: loss or gradient not finite {self.bad} times in a row, updates skipped; "
                f"{self._save_batch(step)}; lower optim.learning_rate or inspect that batch"
            )

    def _save_batch(self, step: int) -> str:
        """Writes the comparisons of update number `step` as token ids; returns a message that names the file."""
        path, indices = self.folder / f"batch-{step}.jsonl", self.examples(step - 1).tolist()
        if distributed.is_primary():
            with written(path) as file:
                for index in indices:
                    tokens = self.table[index]
                    ids = {"prompt": tokens.prompt.tolist(), "responses": [r.tolist() for r in tokens.responses]}
                    file.write(json.dumps({"comparison": index, "weight": float(tokens.weight)} | ids) + "\n")
        return f"the token ids of its comparisons {indices} are in {path}"


def metrics_writer(folder: Path, tracker: Tracker) -> WriteMetrics:
    """Returns the function that writes metrics from process 0 to metrics.jsonl and the tracker."""

    def write(step: int, examples: int, values: dict[str, Any]) -> None:
        append_from_primary(folder / "metrics.jsonl", step, examples, values)
        if distributed.is_primary():
            tracker.log(step, values)

    return write


def append_from_primary(path: Path, step: int, examples: int, values: Any) -> None:
    """Appends a line to a file of the run, from process 0 only."""
    if distributed.is_primary():
        append_metrics(path, step, examples, values)
