"""Page of run folders: the tables, figures and samples of one run, or of several runs side by side."""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.config.yaml import flatten, read_yaml
from dpo_jax.errors import UserError
from dpo_jax.pages import figure
from dpo_jax.pages.figure import COLOURS, INK
from dpo_jax.pages.output import render_page
from dpo_jax.paths import load_json, written
from dpo_jax.training.metrics_file import read_metrics, with_current_names

POINTS = 80  # a longer curve is drawn as the means of this many bins, with a band from minimum to maximum
SAMPLES = 12
LARGEST = 1e100  # a larger number of a damaged file is not drawn: axes overflow
MARGINS = {"left": 0.11, "right": 0.99, "bottom": 0.14, "top": 0.97}  # room for labels of nine characters
SECTIONS = ("model", "reference", "data", "loss", "optim")
PACKAGES = ("dpo_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


class ReportedRun(NamedTuple):
    """Content of a run folder."""

    name: str
    config: dict[str, str]  # dotted key -> text
    lines: list[dict[str, Any]]  # metrics.jsonl
    final: dict[str, str]  # metric -> text, on held-out data at the end
    data: list[str]  # the data report
    samples: list[dict[str, Any]]  # of the last step with samples: step, prompt, policy, reference


class Plot(NamedTuple):
    """A figure: title, series (label -> metric) and caption."""

    title: str
    series: Mapping[str, str]
    note: str = ""


class Curve(NamedTuple):
    """A curve: label in the legend, x and y as float[n], and matplotlib's line style."""

    label: str
    x: np.ndarray
    y: np.ndarray
    style: dict[str, Any]


PLOTS = (
    Plot("Loss", {"loss": "loss"}),
    Plot("Reward accuracy", {"accuracy": "rewards/accuracies"}, "How often the chosen response has the higher reward."),
    Plot("Reward margin", {"margin": "rewards/margins"}, "Reward of the chosen minus reward of the rejected response."),
    Plot(
        "Rewards",
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
        "beta * (log pi - log ref): how far the policy has moved from the reference on each response.",
    ),
    Plot(
        "Log-probability of chosen responses",
        {"chosen": "logps/chosen"},
        "It may well fall: the loss only asks it to fall less than the log-probability of the rejected responses, with "
        "which the chosen ones share many words. If it falls by much, raise beta, lower the learning rate, or add an "
        "SFT term.",
    ),
    Plot("Log-probability of rejected responses", {"rejected": "logps/rejected"}),
    Plot("KL(policy || reference)", {"KL": "kl"}, "In nats per response, on responses that the policy has sampled."),
    Plot("Gradient norm", {"norm": "grad_norm"}, "Before clipping."),
    Plot("Learning rate", {"rate": "learning_rate"}),
)


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes a page on runs and returns its path.

    Args:
      runs: run folders, at least one; several are compared.
      out: the page; missing folders are created.

    Raises:
      UserError: a folder is not a run folder, or one of its files is damaged.
    """
    loaded = [read_run(Path(folder)) for folder in runs]
    with written(out) as file:
        file.write(render_runs(loaded))
    return Path(out)


def read_run(folder: Path) -> ReportedRun:
    """Reads a run folder; only `metrics.jsonl` is required."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no run folder (it has no metrics.jsonl); give a folder made by `dpo-jax train`")
    lines = [with_current_names(line) for line in _checked_lines(folder / "metrics.jsonl", (int, float, type(None)))]
    settings = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    samples, file = [], folder / "samples.jsonl"
    if file.exists():
        samples = _checked_lines(file, (int, str, type(None)))
    last = max((s["step"] for s in samples), default=0)
    final, data = folder / "eval.json", folder / "data.json"
    return ReportedRun(
        name=folder.resolve().name,
        config={key: " ".join(values) for key, values in flatten(settings)},
        lines=lines,
        final=(final.exists() and _interval_texts(final)) or _last_values(lines),
        data=[str(line) for line in load_json(data, list)] if data.exists() else [],
        samples=[s for s in samples if s["step"] == last][:SAMPLES],
    )


def _checked_lines(path: Path, kinds: tuple[type, ...]) -> list[dict[str, Any]]:
    """Returns the lines of a file of metrics or samples; refuses a line with a value of another kind."""
    lines = read_metrics(path)
    for line in lines:
        if type(line.setdefault("step", 0)) is not int:
            raise UserError(f"{path}: the step {line['step']!r} is no number; remove that line")
        if bad := next((key for key, value in line.items() if not isinstance(value, kinds)), None):
            raise UserError(f"{path}: step {line['step']}: {bad} is {line[bad]!r:.60}; remove that line")
    return lines


def _interval_texts(path: Path) -> dict[str, str]:
    """Returns each metric of `eval.json` (mean, low, high, n) as a text with its 95% interval."""
    try:
        return {
            name: f"{_text(m['mean'])}  [{_text(m['low'])}, {_text(m['high'])}]  n {_text(m['n'])}"
            for name, m in with_current_names(load_json(path, dict).get("metrics", {})).items()
        }
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: metrics must hold mean, low, high and n; remove the file or write it again") from e


def _last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the last value of every evaluation metric, or of every metric if there was no evaluation."""
    newest = {key: value for line in lines for key, value in line.items()}
    evaluated = {key: value for key, value in newest.items() if key.startswith("eval_")}
    return {key: _text(value) for key, value in (evaluated or newest).items()}


def _text(value: Any) -> str:
    """Returns a float with four digits, another value unchanged, and null, which JSON has for NaN, as nan."""
    return "nan" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def render_runs(runs: Sequence[ReportedRun]) -> str:
    """Returns the page as HTML; several runs show the keys in which their configs differ instead of the config."""
    names = [run.name for run in runs]
    config = _aligned([run.config for run in runs])
    return render_page(
        "run.html",
        title=" · ".join(names),
        runs=runs,
        head=["", *names],
        colors=[_color(i) for i in range(len(runs))],
        summary=_summary(runs[0]),
        final=_aligned([run.final for run in runs]),
        intervals=any("  [" in text for run in runs for text in run.final.values()),
        config=config if len(runs) == 1 else [row for row in config if len(set(row[1:])) > 1],
        panels=_panels(runs),
        sample_tables=[_sample_table(run) for run in runs if run.samples],
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    )


def _summary(run: ReportedRun) -> list[list[str]]:
    """Returns a row for each section of the config that is not empty: its name, and its keys with their values."""
    keys = [(*key.split(".", 1), value) for key, value in run.config.items() if "." in key]
    given = [key for key in keys if key[2] not in ("", "None")]
    texts = {section: ", ".join(f"{key} {value}" for s, key, value in given if s == section) for section in SECTIONS}
    return [[section, text] for section, text in texts.items() if text]


def _aligned(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Returns a row for each key, in the order of first appearance: the key, then its value in every column."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key, "–") for column in columns)] for key in keys]


def _sample_table(run: ReportedRun) -> dict[str, Any]:
    """Returns the samples of a run as a table, without columns that are empty in all of them."""
    head = [key for key in ("prompt", "policy", "reference") if any(sample.get(key) for sample in run.samples)]
    rows = [[str(sample.get(key) or "").strip() for key in head] for sample in run.samples]
    return {"name": run.name, "step": run.samples[0].get("step", 0), "head": head, "rows": rows}


def _panels(runs: Sequence[ReportedRun]) -> list[figure.Panel]:
    """Returns the figures for which at least one run has data."""
    drawn = ((plot, run_figure(runs, plot)) for plot in PLOTS)
    return [figure.Panel(svg, plot.title, plot.note, _missing(runs, plot)) for plot, svg in drawn if svg]


def _missing(runs: Sequence[ReportedRun], plot: Plot) -> str:
    """Returns a warning if values of a figure are not finite; "" otherwise."""
    names = [prefix + metric for metric in plot.series.values() for prefix in ("", "eval_")]
    values = (line[name] for run in runs for line in run.lines for name in names if name in line)
    count = sum(value is None or not abs(value) < LARGEST for value in values)
    return f"Not finite, so not drawn: {count} of the values." if count else ""


def run_figure(runs: Sequence[ReportedRun], plot: Plot) -> str:
    """Returns a figure as SVG, or "" if no run has any of its metrics."""
    fig = figure.new_figure(6, 3.3, MARGINS)
    axes = fig.add_subplot()
    legend: dict[str, Any] = {}
    for curve in _curves(runs, plot):
        _draw_curve(axes, curve)
        style = curve.style | {"color": INK} if len(runs) > 1 else curve.style
        legend.setdefault(curve.label, figure.draw_line(**style))
    if not legend:
        return ""
    if len(legend) > 1:
        figure.add_legend(axes, legend)
    return figure.figure_svg(fig, axes, "examples")


def _curves(runs: Sequence[ReportedRun], plot: Plot) -> Iterator[Curve]:
    """Yields the curves of a figure: training as a line, evaluation as a dotted line with markers.

    Several runs have a color each and the series a dash pattern; in a single run the series have the colors.
    """
    for i, run in enumerate(runs):
        for j, (label, metric) in enumerate(plot.series.items()):
            color, dash = (_color(i), ("-", "--")[j]) if len(runs) > 1 else (_color(j), "-")
            training = Curve(label, *polyline_points(run.lines, metric), {"color": color, "ls": dash, "lw": 1.6})
            style = {"color": color, "ls": ":", "marker": "os"[j], "ms": 4}
            evaluation = Curve(f"{label} (eval)", *polyline_points(run.lines, f"eval_{metric}"), style)
            yield from (curve for curve in (training, evaluation) if len(curve.x))


def polyline_points(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples seen and the finite values of a metric, float[n] each."""
    pairs = [(line.get("examples"), line.get(metric)) for line in lines]
    pairs = [pair for pair in pairs if all(value is not None and abs(value) < LARGEST for value in pair)]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    return x, y


def _draw_curve(axes: "figure.Axes", curve: Curve) -> None:
    """Draws a curve; a curve of more than `POINTS` points as the means of bins, with a band of minimum and maximum."""
    x, y = curve.x, curve.y
    if len(x) > POINTS:
        bins = [np.split(v, np.linspace(0, len(x), POINTS + 1).astype(int)[1:-1]) for v in (x, y)]
        low, high = ([f(b) for b in bins[1]] for f in (np.min, np.max))
        x, y = (np.array([b.mean() for b in v]) for v in bins)
        axes.fill_between(x, low, high, color=curve.style["color"], alpha=0.14, lw=0)
    axes.plot(x, y, **curve.style)


def _color(i: int) -> str:
    """Returns the color of run or series i."""
    return COLOURS[i % len(COLOURS)]
