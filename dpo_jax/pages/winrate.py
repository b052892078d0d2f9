"""What `dpo-jax winrate` found: its table, and one page without scripts or anything from a network."""

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.pages import figure
from dpo_jax.pages.run import STYLE, TEMPLATE
from dpo_jax.rewards.winrate import WinShare, WinTally, kl_bound

HEAD = ("policy", "T", "best of", "win rate", "n", "ties", "unread", "read first", "agree", "reward", "KL <=", "words")
SHOWN = 20


class WinrateRow(NamedTuple):
    """One policy, sampled in one way.

    Attributes:
      policy: its name.
      temperature: at which it was sampled.
      best_of: of how many samples the best was judged.
      tally: what the judge says.
      reward: mean, and half its 95% interval, of the reward that chose the best; None if there is none.
      words: mean words of a response.
    """

    policy: str
    temperature: float
    best_of: int
    tally: WinTally
    reward: tuple[float, float] | None
    words: float


def winrate_cells(row: WinrateRow) -> list[str]:
    """Returns a row of the table as texts, under `HEAD`; "" is nothing."""
    tally = row.tally
    return [
        row.policy,
        f"{row.temperature:g}",
        str(row.best_of),
        _share(tally.wins),
        str(tally.wins.n),
        str(tally.ties),
        str(tally.unread or ""),
        _share(tally.first),
        _share(tally.agree),
        f"{row.reward[0]:.3f} +- {row.reward[1]:.3f}" if row.reward else "",
        f"{kl_bound(row.best_of):.2f}" if row.best_of > 1 else "",
        f"{row.words:.1f}",
    ]


def _share(share: WinShare) -> str:
    return f"{share.mean:.3f} ({share.low:.3f} .. {share.high:.3f})" if share.n else ""


def winrate_table(rows: Sequence[WinrateRow]) -> list[list[str]]:
    """Returns the table, its head first, without the columns in which nothing stands."""
    columns = zip(HEAD, *map(winrate_cells, rows), strict=True)
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def winrate_json(row: WinrateRow) -> dict[str, Any]:
    """Returns a row as JSON has it; NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, WinShare):
            return {key: plain(part) for key, part in value._asdict().items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    tally = {key: plain(value) for key, value in row.tally._asdict().items()}
    return row._asdict() | {"tally": tally, "kl_bound": kl_bound(row.best_of)}


def render_winrate(rows: Sequence[WinrateRow], lines: Sequence[str], judged: Sequence[Mapping[str, Any]]) -> str:
    """Returns the whole page as HTML.

    Args:
      rows: of the table.
      lines: what was compared, in words.
      judged: judgements, of which some are shown, from all over them.
    """
    title = "Win rates: " + ", ".join(dict.fromkeys(row.policy for row in rows))
    figures = "".join(f"<figure>{svg}</figure>" for svg in (_over(rows, "temperature"), _over(rows, "best_of")) if svg)
    note = (
        "Win rate: how often the policy's response is judged better, a tie counting half, with Wilson's 95% interval. "
        "Read first: how often the response that was read first is preferred, 0.5 without a bias. Agree: how often "
        "both orders prefer the same one. KL: a bound for the best of n from the policy as it is sampled, in nats."
    )
    head, *body = winrate_table(rows)
    parts = [
        f"<h1>{_escape(title)}</h1>",
        *(f"<p>{_escape(line)}</p>" for line in lines),
        f'<div class="figures">{figures}</div>' if figures else "",
        _table(head, body),
        f'<p class="note">{note}</p>',
        "<h2>Judgements</h2>",
        _table(("prompt", "policy's response", "other", "judged"), _shown(judged), "samples"),
    ]
    whole = "\n".join(filter(None, parts))
    return TEMPLATE.format(title=_escape(title), style=STYLE, body=whole)


def _shown(judged: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns some judgements from all over, as rows."""
    some = judged[:: max(1, -(-len(judged) // SHOWN))]
    told = [(row, "\n".join(f"{v['score']}: {v['said']}" for v in row["verdicts"])) for row in some]
    return [[row["prompt"], row["response"], row["other"], f"{row['outcome']}\n{said}"] for row, said in told]


def _over(rows: Sequence[WinrateRow], axis: str) -> str:
    """Returns win rates over temperatures or over how many samples the best is of, as SVG; "" where that is one point.

    A curve is what differs in nothing else.
    """
    if len({getattr(row, axis) for row in rows}) < 2:
        return ""
    other = "best_of" if axis == "temperature" else "temperature"
    said = {"best_of": "best of {:g}", "temperature": "temperature {:g}"}[other]
    several = len({getattr(row, other) for row in rows}) > 1
    fig = figure.new_figure(6, 3.6)
    axes = fig.add_subplot()
    ordered = sorted(rows, key=lambda row: (row.policy, getattr(row, other), getattr(row, axis)))
    for i, (key, group) in enumerate(itertools.groupby(ordered, key=lambda row: (row.policy, getattr(row, other)))):
        x, shares = zip(*((getattr(row, axis), row.tally.wins) for row in group), strict=True)
        y = [share.mean for share in shares]
        around = [[s.mean - s.low for s in shares], [s.high - s.mean for s in shares]]
        label = f"{key[0]}, {said.format(key[1])}" if several else key[0]
        colour = figure.COLOURS[i % len(figure.COLOURS)]
        axes.errorbar(x, y, around, color=colour, label=label, marker="o", ms=4, lw=1.6, capsize=2)
    axes.axhline(0.5, color=figure.INK, alpha=0.4, lw=0.8, ls="--")
    axes.set_ylabel("win rate", color=figure.INK, fontsize=9)
    axes.legend(frameon=False, labelcolor=figure.INK, fontsize=9)
    if axis == "best_of":
        axes.set_xscale("log", base=2)
    return figure.figure_svg(fig, axes, axis.replace("_", " "))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Returns an HTML table."""
    top = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def _escape(value: object) -> str:
    """Returns any text so that a browser shows it and never obeys it."""
    return html.escape(str(value))
