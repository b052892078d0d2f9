"""Trackers of a run's metrics: TensorBoard and wandb. `metrics.jsonl` stays the complete record."""

import html
import importlib.util
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.paths import written

SampleRows = Sequence[Mapping[str, str | None]]
PROJECT = "dpo_jax"
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(NamedTuple):
    """A destination of metrics and samples.

    Attributes:
      log: (step, metrics) -> None; values that are not finite numbers are dropped.
      table: (step, samples) -> None, samples as mappings with the same keys.
      close: () -> None, called at the end.
    """

    log: Callable[[int, Mapping[str, Any]], None]
    table: Callable[[int, SampleRows], None]
    close: Callable[[], None]


def check_tracker(name: str) -> None:
    """Refuses a tracker whose package is not installed."""
    if name and importlib.util.find_spec(PACKAGES[name]) is None:
        raise UserError(f"track: {PACKAGES[name]} is not installed; pip install 'dpo_jax[track]'")


def make_tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """Returns the tracker of a new or resumed run.

    It starts at the first call of `log` or `table`; values that an earlier process logged from that step on are
    replaced.

    Args:
      name: "tensorboard" (writes into the run folder), "wandb" (configured by its environment variables), or "".
      folder: the run folder; its name is the name of the run.
      settings: the run's config, shown beside the metrics.
    """
    begun: list[Tracker] = []

    def start(step: int) -> list[Tracker]:
        if name and not begun:
            begun.append(TRACKERS[name](folder, settings, step))
        return begun

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        for one in start(step):
            one.log(step, {k: v for k, v in metrics.items() if isinstance(v, float | int) and math.isfinite(v)})

    def table(step: int, rows: SampleRows) -> None:
        for one in start(step) if rows else ():
            one.table(step, rows)

    def close() -> None:
        for one in begun:
            one.close()

    return Tracker(log, table, close)


def _tensorboard(folder: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """Returns a tracker that writes event files; its first event purges earlier files from `step` on."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def table(step: int, rows: SampleRows) -> None:
        writer.add_text("samples", _markdown(rows), step)
        writer.flush()

    return Tracker(log, table, writer.close)


def _markdown(rows: SampleRows) -> str:
    """Returns samples as a Markdown table, which TensorBoard renders."""

    def line(cells: Any) -> str:
        texts = ("" if cell is None else html.escape(cell).replace("|", "&#124;") for cell in cells)
        return f"| {' | '.join('<br>'.join(text.splitlines()) for text in texts)} |"

    return "\n".join([line(rows[0]), line("-" * 3 for _ in rows[0]), *(line(row.values()) for row in rows)])


def _wandb(folder: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """Returns a tracker of a wandb run. Its id is kept in the run folder, so that resuming continues it.

    WANDB_PROJECT and WANDB_NAME replace `PROJECT` and the name of the folder; wandb reads its other variables. It keeps
    the first value of a step; a repeated step has the same values.
    """
    import wandb

    known = folder / "wandb_id"
    if not known.is_file():
        with written(known) as file:
            file.write(secrets.token_hex(8))
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=os.environ.get("WANDB_NAME") or folder.name,
            id=known.read_text(), resume="allow", dir=str(folder), config=dict(settings), reinit="create_new",
        )  # fmt: skip
    except wandb.Error as e:
        why = " ".join(str(e).split())
        raise UserError(f"track: wandb: {why}; log in with `wandb login`, or set WANDB_MODE=offline") from e

    def table(step: int, rows: SampleRows) -> None:
        shown = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log({"samples": shown}, step=step)

    return Tracker(lambda step, metrics: run.log(_with_originals(metrics), step=step), table, run.finish)


def _with_originals(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metrics under our names (those of TRL) and also under those of the original DPO code.

    The latter are rewards_train/*, logps_train/*, loss/train, rewards_eval/*, logps_eval/* and loss/eval, so that runs
    can be plotted together with its runs.
    """
    found = dict(metrics)
    for name, value in metrics.items():
        kind, slash, which = name.removeprefix("eval_").partition("/")
        split = "eval" if name.startswith("eval_") else "train"
        if kind in ("rewards", "logps"):
            found[f"{kind}_{split}/{which}"] = value
        elif kind == "loss" and not slash:
            found[f"loss/{split}"] = value
    return found


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
