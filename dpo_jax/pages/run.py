"""Page of run folders: headline, curves, samples, metrics, data and config of one run, or of several side by side."""

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.config.yaml import flatten, read_yaml
from dpo_jax.errors import UserError
from dpo_jax.pages.curves import curve_panels, run_color
from dpo_jax.pages.figure import Panel
from dpo_jax.pages.headline import headlines
from dpo_jax.pages.metrics import (
    LOGRATIO,
    Measured,
    last_values,
    metric_wording,
    read_intervals,
    read_meanings,
    with_minutes,
)
from dpo_jax.pages.output import render_page
from dpo_jax.pages.tradeoff import tradeoff_panels
from dpo_jax.paths import load_json, written
from dpo_jax.training.metrics_file import read_metrics, with_current_names

SAMPLES = 12
SECTIONS = ("model", "reference", "data", "loss", "optim")
PACKAGES = ("dpo_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
NONE = "–"  # a cell without a value


class ReportedRun(NamedTuple):
    """Content of a run folder.

    Attributes:
      name: name of the folder.
      config: dotted key -> text.
      lines: lines of metrics.jsonl, under present names and with `minutes`.
      final: name -> metric on held-out data at the end; without an evaluation, of the last training step.
      measured: step of the policy, and data, loss or reference of `final` if not the run's; "" if unknown.
      suites: SUITE/METRIC -> result of a standard evaluation in the folder.
      data: the data report.
      samples: samples of the last step with samples, one for each prompt: step, prompt, policy, reference.
      meanings: SUITE/METRIC -> what it says, of those that a suite explains.
    """

    name: str
    config: dict[str, str]
    lines: list[dict[str, Any]]
    final: dict[str, Measured]
    measured: str
    suites: dict[str, Measured]
    data: list[str]
    samples: list[dict[str, Any]]
    meanings: Mapping[str, str] = {}


def write_report(runs: Sequence[Path], out: Path, losses: Sequence[Panel] = ()) -> Path:
    """Writes a page on runs and returns its path.

    Args:
      runs: run folders, at least one; several are compared.
      out: the page; missing folders are created.
      losses: figures of the runs' losses.

    Raises:
      UserError: a folder is not a run folder, or one of its files is damaged.
    """
    loaded = [read_run(Path(folder)) for folder in runs]
    with written(out) as file:
        file.write(render_runs(loaded, losses))
    return Path(out)


def read_run(folder: Path) -> ReportedRun:
    """Reads a run folder; only `metrics.jsonl` is required."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no run folder (it has no metrics.jsonl); give a folder made by `dpo-jax train`")
    lines = _checked_lines(folder / "metrics.jsonl", (int, float, type(None)))
    settings = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    samples, file = [], folder / "samples.jsonl"
    if file.exists():
        samples = _checked_lines(file, (int, str, type(None)))
    last = max((s["step"] for s in samples), default=0)
    final, data = folder / "eval.json", folder / "data.json"
    lines = [with_current_names(line) for line in with_minutes(lines)]
    return ReportedRun(
        name=folder.resolve().name,
        config={key: " ".join(values) for key, values in flatten(settings)},
        lines=lines,
        final=(final.exists() and read_intervals(final)) or last_values(lines),
        measured=_measured_on(load_json(final, dict)) if final.exists() else "",
        suites=_of_suites(folder, read_intervals),
        meanings=_of_suites(folder, read_meanings),
        data=[str(line) for line in load_json(data, list)] if data.exists() else [],
        samples=_distinct_samples(s for s in samples if s["step"] == last),
    )


def _of_suites(folder: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns SUITE/METRIC -> what a function reads of it in every `eval_SUITE.json` of a run folder."""
    files = {file.stem.removeprefix("eval_"): read(file) for file in sorted(folder.glob("eval_*.json"))}
    return {f"{suite}/{name}": value for suite, found in files.items() for name, value in found.items()}


def _measured_on(stored: Mapping[str, Any]) -> str:
    """Returns the step, data, loss and reference of an eval.json in words; the last three if they are not the run's."""
    if "step" not in stored:
        return ""
    data = [f"on other data than the run's ({', '.join(map(str, stored['data']))})"] if "data" in stored else []
    other = [f"with another {key} than the run's" for key in ("loss", "reference") if key in stored]
    return ", ".join([f"the policy of step {stored['step']}", *(data or ["on held-out data"]), *other])


def _distinct_samples(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the first sample of each prompt, `SAMPLES` at most."""
    found: dict[Any, dict[str, Any]] = {}
    for sample in samples:
        found.setdefault(sample.get("prompt"), sample)
    return list(found.values())[:SAMPLES]


def _checked_lines(path: Path, kinds: tuple[type, ...]) -> list[dict[str, Any]]:
    """Returns the lines of a file of metrics or samples; refuses a line with a value of another kind."""
    lines = read_metrics(path)
    for line in lines:
        if type(line.setdefault("step", 0)) is not int:
            raise UserError(f"{path}: the step {line['step']!r} is no number; remove that line")
        if bad := next((key for key, value in line.items() if not isinstance(value, kinds)), None):
            raise UserError(f"{path}: step {line['step']}: {bad} is {line[bad]!r:.60}; remove that line")
    return lines


def render_runs(runs: Sequence[ReportedRun], losses: Sequence[Panel] = ()) -> str:
    """Returns the page as HTML; several runs show the keys in which their configs differ instead of the config."""
    names = [run.name for run in runs]
    config = _aligned([run.config for run in runs])
    metrics, suites = (
        _aligned([{name: _measured_text(value) for name, value in found.items()} for found in columns])
        for columns in ([run.final for run in runs], [run.suites for run in runs])
    )
    tops = headlines([run.final for run in runs], [run.suites for run in runs])
    sample_head, sample_rows = sample_table(runs)
    return render_page(
        "run.html",
        title=" · ".join(names),
        runs=runs,
        head=["", *names],
        colors=[run_color(i) for i in range(len(runs))],
        headlines=tops,
        cards={card.name: card for top in tops for card in top.cards},
        trained=[_trained(run) for run in runs],
        summary=_summary(runs[0]),
        metrics=metrics,
        suites=suites,
        meanings={row[0]: metric_wording(row[0]).meaning for row in metrics},
        suite_meanings={name: text for run in runs for name, text in run.meanings.items()},
        intervals=any(value.interval for run in runs for value in run.final.values()),
        config=config if len(runs) == 1 else [row for row in config if len(set(row[1:])) > 1],
        panels=curve_panels([run.lines for run in runs]),
        losses=losses,
        tradeoffs=tradeoff_panels([(run.config, run.final) for run in runs]),
        compared=any(LOGRATIO in line for run in runs for line in run.lines),
        data=_data(runs),
        sample_head=sample_head,
        sample_rows=sample_rows,
        sample_steps=", ".join(f"step {run.samples[0]['step']} of {run.name}" for run in runs if run.samples),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    )


def _data(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Returns heading -> data report of each run that has one; a single one if they are the same."""
    if all(run.data == runs[0].data for run in runs):
        return {"Data": runs[0].data} if runs[0].data else {}
    return {f"Data of {run.name}": run.data for run in runs if run.data}


def _measured_text(value: Measured) -> str:
    """Returns a metric with four digits and, if known, its interval and the number of values."""
    if value.interval is None:
        return f"{value.mean:.4g}"
    count = "" if value.n is None else f"  n {value.n:.0f}"
    return f"{value.mean:.4g}  [{value.interval[0]:.4g}, {value.interval[1]:.4g}]{count}"


def _trained(run: ReportedRun) -> str:
    """Returns the names and betas of the loss terms of a run, and for how long it was trained."""
    loss = [item for item in _section(run, "loss") if item.split()[0].split(".")[-1] in ("name", "beta")]
    loss = [re.sub(r"^(\d+\.)?(name )?", "", item) for item in loss]
    last = {key: max((line.get(key) or 0 for line in run.lines), default=0) for key in ("examples", "step")}
    return ", ".join([*loss, f"{last['examples']:,} comparisons in {last['step']:,} steps"])


def _section(run: ReportedRun, section: str) -> list[str]:
    """Returns the keys of a section of the config with their values, without the empty ones."""
    keys = [(*key.split(".", 1), value) for key, value in run.config.items() if "." in key]
    return [f"{key} {value}" for name, key, value in keys if name == section and value not in ("", "None")]


def _summary(run: ReportedRun) -> list[list[str]]:
    """Returns a row for each section of the config that is not empty: its name, and its keys with their values."""
    texts = {section: ", ".join(_section(run, section)) for section in SECTIONS}
    return [[section, text] for section, text in texts.items() if text]


def _aligned(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Returns a row for each key, in the order of first appearance: the key, then its value in every column."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key, NONE) for column in columns)] for key in keys]


def sample_table(runs: Sequence[ReportedRun]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the samples: a row for each prompt; columns prompt, reference, policy of each run.

    Runs whose references wrote different texts have a column for each reference. Empty columns are left out.
    """
    references = [_texts(run, "reference") for run in runs]
    merged = {prompt: text for texts in references for prompt, text in texts.items()}
    columns = [("reference", merged)]
    if not all(texts.items() <= merged.items() for texts in references):
        columns = [(f"reference of {run.name}", texts) for run, texts in zip(runs, references, strict=True)]
    columns += [("policy" if len(runs) == 1 else f"policy {run.name}", _texts(run, "policy")) for run in runs]
    columns = [column for column in columns if column[1]]
    prompts = list(dict.fromkeys(str(sample.get("prompt") or "") for run in runs for sample in run.samples))
    head = ["prompt", *(name for name, _ in columns)]
    return head, [[prompt, *(texts.get(prompt, NONE) for _, texts in columns)] for prompt in prompts]


def _texts(run: ReportedRun, key: str) -> dict[str, str]:
    """Returns prompt -> the text under a key of the samples of a run, without missing and empty texts."""
    found = {str(sample.get("prompt") or ""): str(sample.get(key) or "").strip() for sample in run.samples}
    return {prompt: text for prompt, text in found.items() if text}
