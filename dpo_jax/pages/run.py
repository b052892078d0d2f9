"""Run folders -> one page: tables, figures and samples of a run, or of several beside each other.

The page is a single file without scripts or anything from a network: figures are inline SVG in the colours of the
reader's browser, and every text that comes from data is escaped.
"""

import html
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.config.yaml import flatten, read_yaml
from dpo_jax.errors import UserError
from dpo_jax.pages import figure
from dpo_jax.pages.figure import COLOURS, INK
from dpo_jax.training.metrics_file import read_metrics

POINTS = 80  # a curve is drawn through at most so many means, its extremes as a band
SAMPLES = 12
SECTIONS = ("model", "reference", "data", "loss", "optim")
PACKAGES = ("dpo_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


class ReportedRun(NamedTuple):
    """What a run folder says."""

    name: str
    config: dict[str, str]  # dotted key -> text
    lines: list[dict[str, Any]]  # metrics.jsonl
    final: dict[str, str]  # metric -> text, on held-out data at the end
    data: list[str]  # the data report
    samples: list[dict[str, Any]]  # of the last step that has any: step, prompt, policy, reference


class Plot(NamedTuple):
    """One figure: its title, the series in it (label -> metric), and a sentence to read it by."""

    title: str
    series: Mapping[str, str]
    note: str = ""


PLOTS = (
    Plot("Loss", {"loss": "loss"}),
    Plot("Reward accuracy", {"accuracy": "rewards/accuracies"}, "How often the chosen response has the higher reward."),
    Plot("Reward margin", {"margin": "rewards/margins"}, "Reward of the chosen less that of the rejected response."),
    Plot(
        "Rewards",
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
        "beta * (log pi - log ref): how far the policy has moved from the reference on each response.",
    ),
    Plot(
        "Log-probability of chosen responses",
        {"chosen": "logps/chosen"},
        "It may well fall: the loss only asks that it fall less than that of the rejected ones, with which the chosen "
        "share many words. If it falls by much, raise beta, lower the learning rate, or add an SFT term.",
    ),
    Plot("Log-probability of rejected responses", {"rejected": "logps/rejected"}),
    Plot("Gradient norm", {"norm": "grad_norm"}, "Before clipping."),
    Plot("Learning rate", {"rate": "learning_rate"}),
)


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes one page on the runs and returns its path.

    Args:
      runs: run folders, at least one; several are overlaid and set side by side.
      out: the page; its folder is made if need be.

    Raises:
      UserError: a folder is no run, or one of its files is damaged.
    """
    loaded = [read_run(Path(folder)) for folder in runs]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".new")
    beside.write_text(render_runs(loaded), encoding="utf-8")
    return beside.replace(out)


def read_run(folder: Path) -> ReportedRun:
    """Reads a run folder; of its files only `metrics.jsonl` must be there."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no run folder (it has no metrics.jsonl); give one that `dpo-jax train` made")
    lines = read_metrics(folder / "metrics.jsonl")
    settings = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    samples = read_metrics(folder / "samples.jsonl") if (folder / "samples.jsonl").exists() else []
    last = max((s.get("step", 0) for s in samples), default=0)
    return ReportedRun(
        name=folder.resolve().name,
        config={key: " ".join(values) for key, values in flatten(settings)},
        lines=lines,
        final=_numbers(_read_json(folder / "eval.json", {}).get("metrics", {})) or _last(lines),
        data=[str(line) for line in _read_json(folder / "data.json", [])],
        samples=[s for s in samples if s.get("step", 0) == last][:SAMPLES],
    )


def _read_json(path: Path, default: Any) -> Any:
    """Returns what a JSON file holds, or the default where it is absent."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e}); remove it or make it again") from e


def _numbers(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns each metric of `eval.json` (mean, low, high, n) as a text with its 95% interval."""
    return {
        name: f"{_text(m['mean'])}  [{_text(m['low'])}, {_text(m['high'])}]  n {_text(m['n'])}"
        for name, m in found.items()
    }


def _last(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the newest value of every eval metric, or of every metric where nothing was evaluated."""
    newest = {key: value for line in lines for key, value in line.items()}
    evaluated = {key: value for key, value in newest.items() if key.startswith("eval_")}
    return {key: _text(value) for key, value in (evaluated or newest).items()}


def _text(value: Any) -> str:
    """Returns a number in four digits, anything else as it is; null is what NaN becomes in JSON."""
    return "nan" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def render_runs(runs: Sequence[ReportedRun]) -> str:
    """Returns the whole page as HTML."""
    title = " · ".join(run.name for run in runs)
    legend = "".join(f'<li><b style="background:{_colour(i)}"></b>{_escape(r.name)}</li>' for i, r in enumerate(runs))
    drawn = [(plot, svg) for plot in PLOTS if (svg := run_figure(runs, plot))]
    figures = "".join(
        f"<figure><h3>{plot.title}</h3>{svg}<figcaption>{plot.note}{_lost(runs, plot)}</figcaption></figure>"
        for plot, svg in drawn
    )
    parts = [
        f"<h1>{_escape(title)}</h1>",
        _heading(runs[0]) if len(runs) == 1 else f'<ul class="legend">{legend}</ul>',
        _final(runs),
        _configs(runs),
        f'<h2>Training</h2><div class="figures">{figures}</div>',
        *(_samples(run) for run in runs if run.samples),
        *(f"<h2>Data of {_escape(r.name)}</h2><pre>{_escape(chr(10).join(r.data))}</pre>" for r in runs if r.data),
        f"<footer>{_escape(_versions())}</footer>",
    ]
    return TEMPLATE.format(title=_escape(title), style=STYLE, body="\n".join(filter(None, parts)))


def _heading(run: ReportedRun) -> str:
    """Returns one line a section of the config: what was trained, on what, how."""
    said = [
        (*key.split(".", 1), value) for key, value in run.config.items() if "." in key and value not in ("", "None")
    ]
    named = {section: ", ".join(f"{k} {v}" for s, k, v in said if s == section) for section in SECTIONS}
    return _table([], [list(row) for row in named.items() if row[1]])


def _final(runs: Sequence[ReportedRun]) -> str:
    """Returns the final numbers of the runs side by side."""
    table = _table(["", *(run.name for run in runs)], _aligned([run.final for run in runs]))
    note = (
        '<p class="note">On held-out data; in brackets 95% confidence intervals, n values each.</p>'
        if "  [" in table
        else ""
    )
    return f"<h2>Final numbers</h2>{table}{note}"


def _configs(runs: Sequence[ReportedRun]) -> str:
    """Returns the whole config of a single run, folded away, or the keys in which several runs differ."""
    rows = _aligned([run.config for run in runs])
    if len(runs) == 1:
        return f"<details><summary>Config</summary>{_table([], rows)}</details>" if rows else ""
    differing = [row for row in rows if len(set(row[1:])) > 1]
    body = _table(["", *(r.name for r in runs)], differing) if differing else "<p>Their configs are the same.</p>"
    return f"<h2>Where the configs differ</h2>{body}"


def _aligned(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Returns one row a key, in the order of first appearance: the key, then its value in every column."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key, "–") for column in columns)] for key in keys]


def _samples(run: ReportedRun) -> str:
    """Returns the last samples of a run, the policy beside the reference."""
    head = [key for key in ("prompt", "policy", "reference") if any(sample.get(key) for sample in run.samples)]
    rows = [[str(sample.get(key) or "").strip() for key in head] for sample in run.samples]
    table = _table(head, rows, "samples")
    return f"<h2>Samples of {_escape(run.name)}, step {_escape(run.samples[0].get('step', 0))}</h2>{table}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Returns an HTML table; the first cell of a row names it."""
    top = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">' + (f"<tr>{top}</tr>" if top else "") + f"{body}</table></div>"


def _escape(value: object) -> str:
    """Returns any text so that a browser shows it and never obeys it."""
    return html.escape(str(value))


def _versions() -> str:
    """Returns the versions of the packages that made the page."""
    return "This page was made with " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def run_figure(runs: Sequence[ReportedRun], plot: Plot) -> str:
    """Returns a figure as SVG, or "" where no run has any of its metrics.

    Training is a line, evaluation dotted with markers. Several runs have a colour each and series a dash pattern; in
    a single run series have the colours.
    """
    fig = figure.new_figure(6, 3.3)
    axes = fig.add_subplot()
    legend: dict[str, Any] = {}
    for i, run in enumerate(runs):
        for j, (label, metric) in enumerate(plot.series.items()):
            colour, dash = (_colour(i), ("-", "--")[j]) if len(runs) > 1 else (_colour(j), "-")
            styles = {metric: {"ls": dash, "lw": 1.6}, f"eval_{metric}": {"ls": ":", "marker": "os"[j], "ms": 4}}
            for name, style in styles.items():
                x, y = polyline_points(run.lines, name)
                if len(x):
                    _curve(axes, x, y, {"color": colour, **style})
                    shown = f"{label} (eval)" if name.startswith("eval_") else label
                    legend.setdefault(shown, figure.draw_line(color=INK if len(runs) > 1 else colour, **style))
    if not legend:
        return ""
    if len(legend) > 1:
        axes.legend(list(legend.values()), list(legend), frameon=False, labelcolor=INK, fontsize=9)
    return figure.figure_svg(fig, axes, "comparisons")


def polyline_points(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns comparisons seen and the finite values of a metric, float[n] each."""
    pairs = [(line["examples"], line[metric]) for line in lines if line.get(metric) is not None and "examples" in line]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    return x, y


def _curve(axes: "figure.Axes", x: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
    """Draws a curve; one of many points as their means, with a band from their least to their greatest."""
    if len(x) > POINTS:
        bins = [np.split(v, np.linspace(0, len(x), POINTS + 1).astype(int)[1:-1]) for v in (x, y)]
        low, high = ([f(b) for b in bins[1]] for f in (np.min, np.max))
        x, y = (np.array([b.mean() for b in v]) for v in bins)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.14, lw=0)
    axes.plot(x, y, **style)


def _lost(runs: Sequence[ReportedRun], plot: Plot) -> str:
    """Returns a warning where values of a figure are not finite, since it cannot show them."""
    names = [prefix + metric for metric in plot.series.values() for prefix in ("", "eval_")]
    lost = sum(name in line and line[name] is None for run in runs for line in run.lines for name in names)
    return f' <strong class="bad">Not finite, so not drawn: {lost} of the values.</strong>' if lost else ""


def _colour(i: int) -> str:
    """Returns the colour of run or series i."""
    return COLOURS[i % len(COLOURS)]


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; } h3 { font-size: .95rem; margin: 0 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #8884; }
td { white-space: pre-wrap; overflow-wrap: anywhere; } td:first-child { font-weight: 600; }
.samples { table-layout: fixed; width: 100%; } .samples td:first-child { font-weight: 400; opacity: .75; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
figcaption, .note, footer { font-size: .82rem; opacity: .75; } .bad { color: #d04040; } footer { margin-top: 3rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; }
.legend b { display: inline-block; width: 1.6rem; height: .3rem; margin-right: .5rem; vertical-align: middle; }
pre { font-size: .82rem; white-space: pre-wrap; } summary { cursor: pointer; margin: .8rem 0; }
"""
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
