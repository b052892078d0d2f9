"""Curves of the metrics of runs against the comparisons trained on, one figure for each `Plot`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.pages import figure, metrics
from dpo_jax.pages.figure import COLOURS, INK
from dpo_jax.pages.metrics import HALF, HELD_OUT, LARGEST, metric_wording

POINTS = 80  # a longer curve is drawn as the means of this many bins, with a band from minimum to maximum
MARGINS = {"left": 0.17, "right": 0.97, "bottom": 0.17, "top": 0.95}  # room for labels of nine characters
Lines = Sequence[Mapping[str, Any]]


class Plot(NamedTuple):
    """A figure.

    Attributes:
      title: the title.
      series: label -> metric.
      advice: text after the meaning of the first metric.
      level: value of the reference, drawn as a line; None if there is none.
    """

    title: str
    series: Mapping[str, str]
    advice: str = ""
    level: float | None = None


class Curve(NamedTuple):
    """A curve: label in the legend, x, y and half the 95% interval (NaN if unknown) as float[n], and its line style."""

    label: str
    x: np.ndarray
    y: np.ndarray
    half: np.ndarray
    style: dict[str, Any]


PLOTS = (
    Plot("Loss", {"loss": "loss"}),
    Plot("Accuracy", {"accuracy": metrics.ACCURACY}, level=0.5),
    Plot("Margin", {"margin": metrics.MARGIN}, level=0.0),
    Plot("Rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}, level=0.0),
    Plot(
        "Log-probabilities",
        {"chosen": "logps/chosen", "rejected": "logps/rejected"},
        "Both may well fall: the loss only asks that of the chosen responses to fall less than that of the rejected "
        "ones, with which they share many words. If it falls by much, raise beta, lower the learning rate, or add an "
        "SFT term.",
    ),
    Plot("KL from the reference", {"KL": metrics.SAMPLED_KL}, level=0.0),
    Plot("Log-ratio", {"log-ratio": metrics.LOGRATIO}, level=0.0),
    Plot("Gradient norm", {"norm": "grad_norm"}),
    Plot("Learning rate", {"rate": "learning_rate"}),
    Plot("Throughput", {"comparisons/s": "examples_per_second"}),
    Plot("Time", {"minutes": "minutes"}),
)


def curve_panels(runs: Sequence[Lines]) -> list[figure.Panel]:
    """Returns the figures for which at least one run has data; a run is its lines of metrics.jsonl."""
    drawn = ((plot, run_figure(runs, plot)) for plot in PLOTS)
    return [figure.Panel(svg, _title(plot), _caption(runs, plot), _missing(runs, plot)) for plot, svg in drawn if svg]


def _title(plot: Plot) -> str:
    """Returns the title of a figure with the unit of its metrics."""
    unit = metric_wording(next(iter(plot.series.values()))).unit
    return f"{plot.title}, {unit}" if unit not in ("", "%") else plot.title


def _caption(runs: Sequence[Lines], plot: Plot) -> str:
    """Returns the meaning of the first metric of a figure and, if it has all of its curves, the advice."""
    present = {name.removeprefix(HELD_OUT) for lines in runs for line in lines for name in line}
    advice = plot.advice if set(plot.series.values()) <= present else ""
    return f"{metric_wording(next(iter(plot.series.values()))).meaning} {advice}".rstrip()


def _missing(runs: Sequence[Lines], plot: Plot) -> str:
    """Returns a warning if values of a figure are not finite; "" otherwise."""
    names = [prefix + metric for metric in plot.series.values() for prefix in ("", HELD_OUT)]
    values = (line[name] for lines in runs for line in lines for name in names if name in line)
    count = sum(value is None or not abs(value) < LARGEST for value in values)
    return f"Not finite, so not drawn: {count} of the values." if count else ""


def run_figure(runs: Sequence[Lines], plot: Plot) -> str:
    """Returns a figure as SVG, or "" if no run has any of its metrics."""
    curves = list(_curves(runs, plot))
    if not curves:
        return ""
    fig = figure.new_figure(4.4, 2.9, MARGINS)
    axes = fig.add_subplot()
    legend: dict[str, Any] = {}
    for curve in curves:
        _draw_curve(axes, curve)
        style = curve.style | ({"color": INK} if len(runs) > 1 else {})
        legend.setdefault(curve.label, figure.draw_line(**style))
    if plot.level is not None:
        axes.axhline(plot.level, color=INK, alpha=0.5, lw=0.8, ls=(0, (1, 2)))
    if len(plot.series) > 1:
        figure.add_legend(axes, legend)
    figure.shorten_ticks(axes)
    return figure.figure_svg(fig, axes, "comparisons trained on")


def _curves(runs: Sequence[Lines], plot: Plot) -> Iterator[Curve]:
    """Yields the curves of a figure: training as a line, evaluation as a dotted line with markers.

    Several runs have a color each and the series a dash pattern; in a single run the series have the colors.
    """
    for i, lines in enumerate(runs):
        for j, (label, metric) in enumerate(plot.series.items()):
            color, dash = (run_color(i), ("-", "--")[j]) if len(runs) > 1 else (run_color(j), "-")
            training = {"color": color, "ls": dash, "lw": 1.6}
            evaluation = {"color": color, "ls": ":", "marker": "os"[j], "ms": 4}
            for prefix, text, style in (("", label, training), (HELD_OUT, f"{label} (held-out)", evaluation)):
                curve = Curve(text, *polyline_points(lines, prefix + metric), style)
                if len(curve.x):
                    yield curve


def polyline_points(lines: Lines, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the comparisons seen, the finite values of a metric, and half their intervals (or NaN), float[n] each."""
    rows = [(line.get("examples"), line.get(metric), line.get(metric + HALF)) for line in lines]
    rows = [row for row in rows if all(value is not None and abs(value) < LARGEST for value in row[:2])]
    x, y, half = np.array(rows, float).reshape(-1, 3).T
    return x, y, half


def _draw_curve(axes: "figure.Axes", curve: Curve) -> None:
    """Draws a curve; a curve of more than `POINTS` points as the means of bins, with a band of minimum and maximum."""
    x, y = curve.x, curve.y
    if len(x) > POINTS:
        bins = [np.split(v, np.linspace(0, len(x), POINTS + 1).astype(int)[1:-1]) for v in (x, y)]
        low, high = ([f(b) for b in bins[1]] for f in (np.min, np.max))
        x, y = (np.array([b.mean() for b in v]) for v in bins)
        axes.fill_between(x, low, high, color=curve.style["color"], alpha=0.14, lw=0)
    elif np.isfinite(curve.half).any():
        axes.errorbar(x, y, curve.half, fmt="none", ecolor=curve.style["color"], elinewidth=1, capsize=2)
    axes.plot(x, y, **curve.style)


def run_color(i: int) -> str:
    """Returns the color of run or series i."""
    return COLOURS[i % len(COLOURS)]
