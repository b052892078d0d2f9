"""Progress display of a run: a bar on a terminal, else a line every few seconds."""

import datetime
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import rich.console
import rich.progress

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "eval_loss", "eval_rewards/accuracies")


class Progress:
    """Shows steps, rate, time left and some metrics.

    The rate is that of the last 20 updates, so that the compilation of the first one is not included.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        *,
        console: rich.console.Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        every: float = 10.0,
    ):
        """Creates the display.

        Args:
          total: number of steps of the run.
          batch_size: comparisons per step.
          console: console to print to; by default standard error, because standard output is for results.
          quiet: show nothing.
          clock: returns seconds.
          every: seconds between lines if there is no terminal.
        """
        self._total, self._batch_size, self._clock, self._every = total, batch_size, clock, every
        self._console = console or rich.console.Console(stderr=True, quiet=quiet)
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._printed = -math.inf
        columns = ("{task.completed}/{task.total}", rich.progress.BarColumn(), "{task.fields[shown]}")
        self._bar = rich.progress.Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("", total=total, shown="") if self._bar else None

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a step; `step` is the number of updates done."""
        now = self._clock()
        self._recent.append((now, step))
        shown = "  ".join([*_shown_metrics(metrics), *self._pace()])
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif now - self._printed >= self._every or step >= self._total:
            self._printed = now
            self._console.print(f"step {step}/{self._total}  {shown}", markup=False, highlight=False, soft_wrap=True)

    def _pace(self) -> list[str]:
        """Returns the rate and the time left as texts; [] before the second step."""
        (before, first), (now, last) = self._recent[0], self._recent[-1]
        if last <= first or now <= before:
            return []
        rate = (last - first) / (now - before)
        left = datetime.timedelta(seconds=round((self._total - last) / rate))
        return [f"{rate * self._batch_size:.3g} comparisons/s", f"{left} left"]

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()


def _shown_metrics(metrics: Mapping[str, Any]) -> Iterable[str]:
    """Returns `name value` for the metrics in `SHOWN`, without rewards that are NaN (no comparison has them)."""
    shown = {name: metrics[name] for name in SHOWN if metrics.get(name) is not None}
    return [f"{k} {v:.4g}" for k, v in shown.items() if not (math.isnan(v) and "rewards/" in k)]
