"""Page of `dpo-jax data`: counts, lengths, shortcuts and tokenized examples."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.audit import Piece
from dpo_jax.data.shortcuts import Shortcut
from dpo_jax.intervals import wilson
from dpo_jax.pages import figure
from dpo_jax.pages.output import render_page

BINS = 60


class DataPage(NamedTuple):
    """Content of the page.

    Attributes:
      name: name of the config.
      lines: counts in words, by side (training, held-out).
      shortcuts: classifiers, one for each kind of feature; None for data without a label.
      rows: examples: for the prompt and each response, by name, its pieces of text.
      lengths: lengths in tokens, int[n], by name (prompt, chosen, ...).
      max_length: maximum length of a prompt with one response.
    """

    name: str
    lines: Mapping[str, Sequence[str]]
    shortcuts: Sequence[Shortcut] | None
    rows: Sequence[Mapping[str, Sequence[Piece]]]
    lengths: Mapping[str, Any]
    max_length: int


def render_data(page: DataPage) -> str:
    """Returns the page as HTML."""
    caption = (
        f"Tokens of each prompt and response after truncation, EOS included; at most {page.max_length} in a prompt "
        "with one response."
    )
    return render_page(
        "data.html",
        title=f"The data of {page.name}",
        page=page,
        marked=any(piece.mark for row in page.rows for part in row.values() for piece in part),
        panels=[figure.Panel(length_histogram(page.lengths), caption=caption)],
        shortcuts=[_shortcut_texts(shortcut) for shortcut in page.shortcuts or ()],
    )


def length_histogram(lengths: Mapping[str, Any]) -> str:
    """Returns histograms of lengths in tokens, one for each name, as SVG."""
    fig = figure.new_figure(5.5, 3.2)
    axes = fig.add_subplot()
    longest = max(int(np.max(values)) for values in lengths.values() if len(values))
    edges = np.linspace(0, longest + 1, min(BINS, longest + 1) + 1).tolist()
    for i, (name, values) in enumerate(lengths.items()):
        axes.hist(values, edges, histtype="step", lw=1.6, label=name, color=figure.COLOURS[i % len(figure.COLOURS)])
    figure.add_legend(axes)
    return figure.figure_svg(fig, axes, "tokens", "count")


def _shortcut_texts(shortcut: Shortcut) -> dict[str, Any]:
    """Returns the cells of a classifier's row; `weights` are (feature, weight) pairs."""
    low, high = wilson(shortcut.right, shortcut.total)
    return {
        "name": shortcut.name,
        "accuracy": f"{shortcut.right / shortcut.total:.3f} [{low:.3f}, {high:.3f}] n {shortcut.total}",
        "chance": f"{shortcut.chance:.3f}",
        "weights": [(name, f"{weight:+.2f}") for name, weight in shortcut.top],
    }
