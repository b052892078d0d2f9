"""What `dpo-jax data` found, as one page without scripts or anything from a network; all text is escaped."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.audit import Piece
from dpo_jax.data.shortcuts import Shortcut
from dpo_jax.intervals import wilson
from dpo_jax.pages import figure
from dpo_jax.pages.run import STYLE, TEMPLATE

BINS = 60


class DataPage(NamedTuple):
    """What there is to show.

    Attributes:
      name: of the config.
      lines: counts in words, by side (training, held-out).
      shortcuts: classifiers of one kind of feature; None where a label is nothing to be found.
      rows: comparisons, each a prompt and its responses in pieces, by their names.
      lengths: in tokens, by what they are lengths of.
      max_length: the limit of a prompt with one response.
    """

    name: str
    lines: Mapping[str, Sequence[str]]
    shortcuts: Sequence[Shortcut] | None
    rows: Sequence[Mapping[str, Sequence[Piece]]]
    lengths: Mapping[str, Any]
    max_length: int


def render_data(found: DataPage) -> str:
    """Returns the whole page as HTML."""
    title = f"The data of {found.name}"
    parts = [
        f"<h1>{_escape(title)}</h1>",
        *(_list(side, lines) for side, lines in found.lines.items()),
        f'<h2>Lengths</h2><div class="figures"><figure>{_histogram(found)}<figcaption>Tokens, EOS included, after the '
        f"cut; at most {found.max_length} in a prompt with one response.</figcaption></figure></div>",
        "" if found.shortcuts is None else _shortcuts(found.shortcuts),
        f"<h2>As the model sees them</h2>{_LEGEND}" + "".join(map(_row, found.rows)),
    ]
    style = STYLE + _STYLE
    return TEMPLATE.format(title=_escape(title), style=style, body="\n".join(filter(None, parts)))


def _escape(value: object) -> str:
    """Returns any text so that a browser shows it and never obeys it."""
    return html.escape(str(value))


def _list(side: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_escape(line)}</li>" for line in lines)
    return f"<h2>{_escape(side.capitalize())} data</h2><ul>{items}</ul>"


def _histogram(found: DataPage) -> str:
    """Returns how many prompts and responses have which length, as SVG."""
    fig = figure.new_figure(7, 3.3)
    axes = fig.add_subplot()
    most = max(int(np.max(lengths)) for lengths in found.lengths.values() if len(lengths))
    edges = np.linspace(0, most + 1, min(BINS, most + 1) + 1).tolist()
    for i, (name, lengths) in enumerate(found.lengths.items()):
        axes.hist(lengths, edges, histtype="step", lw=1.6, label=name, color=figure.COLOURS[i % len(figure.COLOURS)])
    axes.legend(frameon=False, labelcolor=figure.INK, fontsize=9)
    return figure.figure_svg(fig, axes, "tokens")


def _shortcuts(found: Sequence[Shortcut]) -> str:
    """Returns what predicts the label without understanding, as a table."""
    if not found:
        return "<h2>Shortcuts</h2><p>Too few comparisons to tell.</p>"
    rows = []
    for shortcut in found:
        low, high = wilson(shortcut.right, shortcut.total)
        top = ", ".join(f"{_escape(name)} <small>{weight:+.2f}</small>" for name, weight in shortcut.top)
        accuracy = f"{shortcut.right / shortcut.total:.3f} [{low:.3f}, {high:.3f}] n {shortcut.total}"
        rows.append(
            f"<tr><td>{_escape(shortcut.name)}</td><td>{accuracy}</td><td>{shortcut.chance:.3f}</td><td>{top}</td></tr>"
        )
    note = (
        "What a logistic regression that sees nothing else gets right on held-out prompts (95% confidence intervals). "
        "Where it is far above chance, a model can learn that instead of the preference. Weights above 0 are for the "
        "preferred response."
    )
    head = "<tr><th>it sees</th><th>accuracy</th><th>chance</th><th>what weighs most</th></tr>"
    table = f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    return f'<h2>Shortcuts</h2><p class="note">{note}</p>{table}'


def _row(parts: Mapping[str, Sequence[Piece]]) -> str:
    """Returns one comparison: its prompt, and each response with its scored tokens marked."""
    texts = []
    for name, part in parts.items():
        spans = "".join(
            f'<span class="t{place % 2}">{_escape(piece.text)}</span>' if piece.scored else _escape(piece.text)
            for place, piece in enumerate(part)
        )
        texts.append(f"<tr><td>{name}</td><td>{spans}</td></tr>")
    return f'<div class="scroll"><table class="tokens">{"".join(texts)}</table></div>'


_LEGEND = '<p class="note"><span class="t0">Scored</span><span class="t1"> tokens</span> are marked in turn.</p>'
_STYLE = """
.t0 { background: #3a9d5d55; } .t1 { background: #3b7dd855; }
.tokens { margin-bottom: 1.5rem; } .tokens td:first-child { white-space: nowrap; }
"""
