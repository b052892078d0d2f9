"""Figures of the pages: SVG without embedded fonts or a date, in the text color of the page.

matplotlib is imported when the first figure is made, so that importing a page stays fast.
"""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
COLOURS = ("#3b7dd8", "#e0802b", "#3a9d5d", "#c94f4f", "#8a63c9", "#9a7b4f", "#d06fa8", "#7f7f7f", "#a5a52f", "#2fa5a5")
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


def add_legend(axes: "Axes", entries: Mapping[str, Any] | None = None, size: int = 9) -> None:
    """Adds a legend to axes.

    Args:
      axes: the axes.
      entries: label -> what was drawn; None takes the labels that were given when drawing. Labels that come from
        users belong here: matplotlib hides drawn labels that start with an underscore.
      size: font size in points.
    """
    chosen = () if entries is None else (list(entries.values()), list(entries))
    legend = axes.legend(*chosen, frameon=False, labelcolor=INK, fontsize=size)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may contain $


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
