"""Figures of the pages: SVG without embedded fonts or a date, in the text color of the page.

matplotlib is imported when the first figure is made, so that importing a page stays fast.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
COLOURS = ("#3b7dd8", "#e0802b", "#3a9d5d", "#c94f4f", "#8a63c9", "#9a7b4f", "#d06fa8", "#7f7f7f", "#a5a52f", "#2fa5a5")
SIDES = ((4, 4), (-4, 4), (4, -11), (-4, -11))  # of a label from its point, in points
INK = "#010203"  # replaced by the text color of the page, which is unknown when the figure is drawn


class Panel(NamedTuple):
    """A figure with its texts on a page: inline SVG, heading, caption, and a warning after the caption."""

    svg: str
    title: str = ""
    caption: str = ""
    warning: str = ""


def new_figure(width: float, height: float, margins: Mapping[str, float] | None = None) -> "Figure":
    """Returns an empty figure; its size is in inches.

    Margins (left, right, bottom, top) are fractions of it; without them they are fitted, which draws the figure twice.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout=None if margins else "constrained")
    if margins:
        fig.subplots_adjust(**margins)
    return fig


def draw_line(**style: Any) -> "Line2D":
    """Returns a line for a legend; it belongs to no axes."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def add_legend(axes: "Axes", entries: Mapping[str, Any] | None = None, size: int = 9, beside: bool = False) -> None:
    """Adds a legend to axes.

    Args:
      axes: the axes.
      entries: label -> what was drawn; None takes the labels that were given when drawing. Labels that come from
        users belong here: matplotlib hides drawn labels that start with an underscore.
      size: font size in points.
      beside: to the right of the axes instead of inside.
    """
    chosen = () if entries is None else (list(entries.values()), list(entries))
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if beside else {}
    legend = axes.legend(*chosen, frameon=False, labelcolor=INK, fontsize=size, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may contain $


def label_points(
    axes: "Axes", x: Sequence[float], y: Sequence[float], labels: Sequence[str], color: str, side: int = 0
) -> None:
    """Writes labels beside points; labels of points at the same place are joined by commas.

    Args:
      axes: the axes.
      x: float[n]; `y` likewise.
      labels: n texts.
      color: color of the texts.
      side: above or below the points, to the left or right: an index of `SIDES`, modulo 4, so that sets of points that
        lie close together can have their labels on different sides.
    """
    places: dict[tuple[float, float], list[str]] = {}
    for place, label in zip(zip(x, y, strict=True), labels, strict=True):
        places.setdefault(place, []).append(label)
    offset = SIDES[side % len(SIDES)]
    style: dict[str, Any] = {"color": color, "fontsize": 8, "parse_math": False, "zorder": 5}
    style["ha"] = "left" if offset[0] > 0 else "right"
    for place, names in places.items():
        axes.annotate(", ".join(names), place, offset, textcoords="offset points", **style)


def wrap_text(text: str, width: int) -> str:
    """Returns a text in lines of at most `width` characters, broken after blanks and commas alone: words stay whole."""
    lines = [""]
    for part in re.split(r"(?<=[ ,])(?=[^ ,])", text):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def set_square_root_scale(axes: "Axes", ticks: Sequence[float]) -> None:
    """Gives the horizontal axis the scale of a square root, with ticks at 0 and at those values that are in view."""
    import numpy as np

    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.abs(x) ** 0.5, lambda x: np.sign(x) * x**2))
    low, high = axes.get_xlim()
    shown = [tick for tick in (0.0, *ticks) if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown], minor=False)


def shorten_ticks(axes: "Axes") -> None:
    """Gives the horizontal axis few ticks with short labels, as in 20k."""
    from matplotlib.ticker import EngFormatter

    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def figure_svg(fig: "Figure", axes: "Axes", x_label: str, y_label: str = "") -> str:
    """Returns a figure with one pair of axes as an SVG element; the same data give the same text."""
    style_axes(axes, x_label)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    return set_svg_id(fig)


def style_axes(axes: "Axes", label: str) -> None:
    """Gives axes the style of the pages, and a label to the horizontal axis."""
    axes.set_xlabel(label, color=INK, fontsize=9)
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def set_svg_id(fig: "Figure") -> str:
    """Returns a figure whose axes are styled as an SVG element, with the same ids in every run."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpo_jax", "font.family": "sans-serif"}):
        fig.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2).replace(INK, "currentColor")
