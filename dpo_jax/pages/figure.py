"""Figures of the pages: SVG without fonts or a date, in the text colour of whoever looks at it.

Only what draws waits for matplotlib: it is imported where the first figure is made.
"""

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
COLOURS = ("#3b7dd8", "#e0802b", "#3a9d5d", "#c94f4f", "#8a63c9", "#9a7b4f", "#d06fa8", "#7f7f7f", "#a5a52f", "#2fa5a5")
INK = "#010203"  # stands for the text colour of the page, which a figure cannot know


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_line(**style: Any) -> "Line2D":
    """Returns a line for a legend, which is on no axes."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def figure_svg(fig: "Figure", axes: "Axes", label: str) -> str:
    """Returns a figure as an SVG element in the text colour of the page, the same for the same data.

    Args:
      fig: the figure.
      axes: its only axes.
      label: of the horizontal axis.
    """
    style_axes(axes, label)
    return set_svg_id(fig)


def style_axes(axes: "Axes", label: str) -> None:
    """Gives axes the looks of a page, and their horizontal one a label."""
    axes.set_xlabel(label, color=INK, fontsize=9)
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def set_svg_id(fig: "Figure") -> str:
    """Returns a figure whose axes are dressed as an SVG element."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpo_jax", "font.family": "sans-serif"}):
        fig.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2).replace(INK, "currentColor")
