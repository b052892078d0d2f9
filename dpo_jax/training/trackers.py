"""Trackers of a run: TensorBoard, wandb, MLflow and Trackio. `metrics.jsonl` stays the complete record."""

import html
import importlib.util
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.config.yaml import as_lists, flatten
from dpo_jax.errors import UserError, printable
from dpo_jax.paths import written

log = logging.getLogger(__name__)
SampleRows = Sequence[Mapping[str, str | None]]
Intervals = Mapping[str, Mapping[str, float]]  # metric -> mean, low, high (95%), n
PROJECT = "dpo_jax"
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
FIXES = {
    "tensorboard": "check the run folder",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI and its login",
    "trackio": "check TRACKIO_SPACE_ID and `hf auth login`, or unset it to log on this machine",
}


class Tracker(NamedTuple):
    """A destination of metrics and samples.

    Attributes:
      log: (step, metrics) -> None; values that are not finite numbers are dropped.
      table: (step, samples) -> None, samples as mappings with the same keys.
      final: (step, intervals) -> None, the evaluation at the end of the run.
      close: () -> None, called at the end.
    """

    log: Callable[[int, Mapping[str, Any]], None]
    table: Callable[[int, SampleRows], None]
    final: Callable[[int, Intervals], None]
    close: Callable[[], None]


NO_TRACKER = Tracker(lambda *_: None, lambda *_: None, lambda *_: None, lambda: None)


def check_tracker(name: str) -> None:
    """Refuses a tracker whose package is not installed."""
    if name and importlib.util.find_spec(PACKAGES[name]) is None:
        raise UserError(f"track: {PACKAGES[name]} is not installed; pip install 'dpo_jax[track]'")


def make_tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """Returns the tracker of a new or resumed run.

    It starts at the first call. A resumed run goes on in the tracker's run of its folder: tensorboard replaces what an
    earlier process logged from that step on; for the others a repeated step has the same values. If anything fails,
    such as the network or the login, one warning says so and the run goes on without it.

    Args:
      name: "tensorboard" (writes into the run folder), "wandb", "mlflow", "trackio" (configured by their environment
        variables), or "".
      folder: the run folder; its name is the name of the run.
      settings: the run's config, shown beside the metrics.
    """
    begun = [] if name else [NO_TRACKER]

    def call(action: Callable[[Tracker], None], step: int) -> None:
        try:
            if not begun:
                begun.append(TRACKERS[name](folder, settings, step))
            action(begun[0])
        except Exception as e:  # a package with a server behind it may raise anything
            begun[:] = [NO_TRACKER]
            why = printable(" ".join(f"{type(e).__name__}: {e}".split()))
            log.warning(f"track: {name}: {why:.500}; the run goes on without it; {FIXES[name]}")

    def log_metrics(step: int, metrics: Mapping[str, Any]) -> None:
        finite = {k: v for k, v in metrics.items() if isinstance(v, float | int) and math.isfinite(v)}
        call(lambda tracker: tracker.log(step, finite), step)

    def table(step: int, rows: SampleRows) -> None:
        if rows:
            call(lambda tracker: tracker.table(step, rows), step)

    def final(step: int, found: Intervals) -> None:
        call(lambda tracker: tracker.final(step, found), step)

    def close() -> None:
        if begun:
            call(lambda tracker: tracker.close(), 0)

    return Tracker(log_metrics, table, final, close)


def _run_id(folder: Path, name: str, make: Callable[[], str]) -> tuple[str, bool]:
    """Returns the tracker's id of the run in a folder, and whether it was made just now; it is kept in `<name>_id`."""
    known = folder / f"{name}_id"
    if known.is_file():
        return known.read_text(encoding="utf-8"), False
    made = make()
    with written(known) as file:
        file.write(made)
    return made, True


def _rows(found: Intervals) -> list[dict[str, Any]]:
    return [{"metric": name, **entry} for name, entry in found.items()]


def _final_values(found: Intervals) -> dict[str, float]:
    """Returns means and ends of the intervals as metrics `final/NAME`, without those that are not finite.

    They have names of their own, since the exported policy may be of an earlier step than the last values.
    """
    ends = {"": "mean", "_low": "low", "_high": "high"}
    values = {f"final/{name}{end}": entry.get(key) for name, entry in found.items() for end, key in ends.items()}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _tensorboard(folder: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """Returns a tracker that writes event files; its first event purges earlier files from `step` on."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
    config = {key: " ".join(values) for key, values in flatten(settings)}
    writer.add_text("config", _markdown([{"key": key, "value": value} for key, value in config.items()]), step)

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def table(step: int, rows: SampleRows) -> None:
        writer.add_text("samples", _markdown(rows), step)
        writer.flush()

    def final(step: int, found: Intervals) -> None:
        writer.add_text("evaluation", _markdown([{k: str(v) for k, v in row.items()} for row in _rows(found)]), step)
        means = {f"final/{name}": entry["mean"] for name, entry in found.items()}
        writer.add_hparams({key: _number(value) for key, value in config.items()}, means, "hparams", step)

    return Tracker(log, table, final, writer.close)


def _number(text: str) -> float | str:
    """Returns a text as a number if it is one, so that TensorBoard sorts by it."""
    try:
        return float(text)
    except ValueError:
        return text


def _markdown(rows: SampleRows) -> str:
    """Returns samples as a Markdown table, which TensorBoard renders."""

    def line(cells: Any) -> str:
        texts = ("" if cell is None else html.escape(cell).replace("|", "&#124;") for cell in cells)
        return f"| {' | '.join('<br>'.join(text.splitlines()) for text in texts)} |"

    return "\n".join([line(rows[0]), line("-" * 3 for _ in rows[0]), *(line(row.values()) for row in rows)])


def _wandb(folder: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """Returns a tracker of a wandb run.

    WANDB_PROJECT and WANDB_NAME replace `PROJECT` and the name of the folder; wandb reads its other variables, but
    WANDB_MODE only once in a process. It keeps the first value of a step.
    """
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or None
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT, name=os.environ.get("WANDB_NAME") or folder.name,
        id=_run_id(folder, "wandb", lambda: secrets.token_hex(8))[0], resume="allow", dir=str(folder),
        config=dict(settings), reinit="create_new", mode=mode,
    )  # fmt: skip

    def log_table(name: str, step: int | None, rows: Sequence[Mapping[str, Any]]) -> None:
        shown = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log({name: shown}, step=step)

    def final(step: int, found: Intervals) -> None:
        log_table("evaluation", None, _rows(found))  # wandb refuses a step before the last one
        run.summary.update(_final_values(found))

    return Tracker(
        lambda step, metrics: run.log(_with_originals(metrics), step=step),
        lambda step, rows: log_table("samples", step, rows),
        final,
        run.finish,
    )


def _mlflow(folder: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """Returns a tracker of an MLflow run at MLFLOW_TRACKING_URI; without one, in a database in the run folder.

    MLFLOW_EXPERIMENT_NAME replaces `PROJECT`; mlflow reads its other variables.
    """
    import mlflow
    from mlflow.entities import Metric, Param

    # By default mlflow asks a server that does not answer for four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    local = None if mlflow.is_tracking_uri_set() else (folder / "mlflow").resolve()
    if local:
        local.mkdir(exist_ok=True)
    client = mlflow.MlflowClient(f"sqlite:///{local}/mlflow.db" if local else None)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT

    def make() -> str:
        found = client.get_experiment_by_name(experiment)
        where = local.as_uri() if local else None
        number = found.experiment_id if found else client.create_experiment(experiment, artifact_location=where)
        return client.create_run(number, run_name=folder.name).info.run_id

    run, is_new = _run_id(folder, "mlflow", make)
    client.update_run(run, status="RUNNING")
    if is_new:  # parameters cannot change
        client.log_batch(run, params=[Param(key, " ".join(values)) for key, values in flatten(settings)])
        client.log_dict(run, as_lists(dict(settings)), "config.yaml")

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])

    def final(step: int, found: Intervals) -> None:
        log(step, _final_values(found))
        client.log_dict(run, as_lists(dict(found)), "evaluation.json")

    return Tracker(
        log,
        lambda step, rows: client.log_dict(run, {"step": step, "samples": list(rows)}, f"samples/{step}.json"),
        final,
        lambda: client.set_terminated(run),
    )


def _trackio(folder: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """Returns a tracker of a Trackio run, on this machine or in the Space of TRACKIO_SPACE_ID.

    TRACKIO_PROJECT replaces `PROJECT`. Trackio resumes a run by its name, so that a name is made to occur once.
    """
    trackio = importlib.import_module("trackio")
    name, is_new = _run_id(folder, "trackio", lambda: f"{folder.name}-{secrets.token_hex(2)}")
    project, resume = os.environ.get("TRACKIO_PROJECT") or PROJECT, "never" if is_new else "allow"
    run = trackio.init(project, name, config=as_lists(dict(settings)), resume=resume, embed=False)

    def log_table(name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        run.log({name: trackio.Table(data=[list(r.values()) for r in rows], columns=list(rows[0]))}, step=step)

    def final(step: int, found: Intervals) -> None:
        run.log(_final_values(found), step=step)
        log_table("evaluation", step, _rows(found))

    return Tracker(
        lambda step, metrics: run.log(dict(metrics), step=step),
        lambda step, rows: log_table("samples", step, rows),
        final,
        trackio.finish,
    )


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
    "mlflow": _mlflow,
    "trackio": _trackio,
}
