"""What a run writes down of its steps: their metrics, and the batch that it could not learn from."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed, optim
from dpo_jax.config.schema import Config
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.training.metrics_file import Progress, append_metrics
from dpo_jax.training.trackers import Tracker

WriteMetrics = Callable[[int, int, dict[str, Any]], None]  # (step, comparisons trained on, metrics)


class StepLogger:
    """Writes the metrics of a step when the next one is under way, so that the device never waits for the host."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        write: WriteMetrics,
        table: Table,
        progress: Progress,
        rows: Callable[[int], np.ndarray],
        taken: Callable[[], dict[str, float]],
    ):
        """Prepares to write.

        Args:
          config: of the run.
          folder: where the run is.
          write: writes a line of metrics.
          table: what it trains on.
          progress: where it is shown too.
          rows: step, from 0 -> the rows of the training table that it takes.
          taken: what saving took since this was asked last.
        """
        self.config, self.folder, self.write, self.table = config, folder, write, table
        self.progress, self.rows, self.taken = progress, rows, taken
        self.pending: tuple[int, Any] | None = None
        self.bad, self.clock = 0, (time.perf_counter(), 0)

    def step(self, step: int, values: Any) -> None:
        """Takes the metrics of update number `step`, still on the device."""
        self.flush()
        self.pending = (step, values)

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if self.pending is None:
            return
        (step, arrays), self.pending = self.pending, None
        config, values = self.config, {k: float(v) for k, v in jax.device_get(arrays).items()}
        now, done = time.perf_counter(), step * config.batch_size
        rate = (done - self.clock[1]) / (now - self.clock[0]) if self.clock[1] else None
        self.clock = (now, done)
        self.bad = self.bad + 1 if values["nonfinite"] else 0
        if step % config.log_every == 0 or self.bad:
            learning_rate = float(
                optim.linear_warmup(config.optim["learning_rate"], config.optim["warmup_steps"])(step - 1)
            )
            extra = {"learning_rate": learning_rate, "examples_per_second": rate} | self.taken()
            self.write(step, done, values | extra)
        self.progress.update(step, values)
        if self.bad >= config.max_nonfinite:
            raise UserError(
                f"step {step}: loss or gradient not finite {self.bad} times in a row, none of them applied; "
                f"{self._save_batch(step)}; lower optim.learning_rate or look at those"
            )

    def _save_batch(self, step: int) -> str:
        """Writes the comparisons of update number `step` as token ids; returns what they are and where."""
        path, rows = self.folder / f"batch-{step}.jsonl", self.rows(step - 1).tolist()
        if distributed.is_primary():
            with path.open("w", encoding="utf-8") as file:
                for row in rows:
                    tokens = self.table[row]
                    ids = {"prompt": tokens.prompt.tolist(), "responses": [r.tolist() for r in tokens.responses]}
                    file.write(json.dumps({"comparison": row, "weight": float(tokens.weight)} | ids) + "\n")
        return f"the last batch held comparisons {rows}, whose token ids are in {path}"


def metrics_writer(folder: Path, tracker: Tracker) -> WriteMetrics:
    """Returns what writes metrics, once and not once a process: a line of the run, which the tracker is shown too."""

    def write(step: int, examples: int, values: dict[str, Any]) -> None:
        append_from_primary(folder / "metrics.jsonl", step, examples, values)
        if distributed.is_primary():
            tracker.log(step, values)

    return write


def append_from_primary(path: Path, step: int, examples: int, values: Any) -> None:
    """Appends a line to a file of the run, once and not once a process."""
    if distributed.is_primary():
        append_metrics(path, step, examples, values)
