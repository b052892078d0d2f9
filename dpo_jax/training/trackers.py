"""Metrics shown where people watch them while a run goes on; `metrics.jsonl` stays the record of truth."""

import html
import importlib.util
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError

SampleRows = Sequence[Mapping[str, str | None]]
PROJECT = "dpo_jax"
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(NamedTuple):
    """Where metrics go: `log(step, metrics)`, where a value may be no number; where samples go, a table of them:
    `table(step, rows)`, which have the same keys; and `close()` at the end."""

    log: Callable[[int, Mapping[str, Any]], None]
    table: Callable[[int, SampleRows], None]
    close: Callable[[], None]


def check_tracker(name: str) -> None:
    """Refuses a tracker whose package is not installed."""
    if name and importlib.util.find_spec(PACKAGES[name]) is None:
        raise UserError(f"track: {PACKAGES[name]} is not installed; pip install 'dpo_jax[track]'")


def make_tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """Returns a tracker of a run, new or taken up again, which starts when something is first logged; that step, and
    what was logged after it before, is logged anew.

    Args:
      name: tensorboard, which writes into the run folder; wandb, as its environment says; "" for none.
      folder: of the run, whose name it has there.
      settings: the run's config, to be shown beside the metrics.
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
    """Event files, of which a later one says from which step on it stands for the earlier ones."""
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
    """Returns a table as the text that TensorBoard shows as one."""

    def line(cells: Any) -> str:
        texts = ("" if cell is None else html.escape(cell).replace("|", "&#124;") for cell in cells)
        return f"| {' | '.join('<br>'.join(text.splitlines()) for text in texts)} |"

    return "\n".join([line(rows[0]), line("-" * 3 for _ in rows[0]), *(line(row.values()) for row in rows)])


def _wandb(folder: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """A run whose id stays in the folder, so that it is taken up again; it keeps the first value of a step, and a step
    that is done again has the same."""
    import wandb

    known = folder / "wandb_id"
    if not known.is_file():
        known.write_text(secrets.token_hex(8))
    try:
        run = wandb.init(
            project=PROJECT, name=folder.name, id=known.read_text(), resume="allow", dir=str(folder),
            config=dict(settings), reinit="create_new",
        )  # fmt: skip
    except wandb.Error as e:
        why = " ".join(str(e).split())
        raise UserError(f"track: wandb: {why}; log in with `wandb login`, or set WANDB_MODE=offline") from e

    def table(step: int, rows: SampleRows) -> None:
        shown = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log({"samples": shown}, step=step)

    return Tracker(lambda step, metrics: run.log(_with_originals(metrics), step=step), table, run.finish)


def _with_originals(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metrics and, beside TRL's names, those of DPO's original code, which wandb has of runs of it:
    rewards_train/*, logps_train/*, loss/train, and rewards_eval/*, logps_eval/*, loss/eval."""
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
