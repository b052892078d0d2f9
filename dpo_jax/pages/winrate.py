"""Table and page of `dpo-jax winrate`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.pages import figure
from dpo_jax.pages.output import json_values, render_page
from dpo_jax.rewards.winrate import WinShare, WinTally, kl_bound

SHOWN = 20  # judgements on the page
SETTINGS = {"temperature": "temperature {:g}", "best_of": "best of {:g}"}


class WinrateRow(NamedTuple):
    """Result of one policy with one way of sampling.

    Attributes:
      policy: name of the policy.
      temperature: sampling temperature.
      best_of: number of samples of which the best one is judged.
      tally: counts of the judge's verdicts.
      controlled: share of wins between responses of equal length, in words.
      reward: mean of the reward that chose the best sample, and half its 95% interval; None without such a reward.
      words: mean number of words in a response.
    """

    policy: str
    temperature: float
    best_of: int
    tally: WinTally
    controlled: WinShare
    reward: tuple[float, float] | None
    words: float


def winrate_table(rows: Sequence[WinrateRow]) -> list[list[str]]:
    """Returns the table, the head first, without the columns whose cells are all empty."""
    cells = [_cells(row) for row in rows]
    head = [name for name in cells[0] if any(row[name] for row in cells)]
    return [head, *([row[name] for name in head] for row in cells)]


def _cells(row: WinrateRow) -> dict[str, str]:
    """Returns the cells of a row by the names of the columns; "" is an empty cell."""
    tally = row.tally
    return {
        "policy": row.policy,
        "T": f"{row.temperature:g}",
        "best of": str(row.best_of),
        "win rate": _share_text(tally.wins),
        "at equal length": _share_text(row.controlled),
        "n": str(tally.wins.n),
        "ties": str(tally.ties),
        "unread": str(tally.unread or ""),
        "read first": _share_text(tally.first),
        "agree": _share_text(tally.agree),
        "reward": f"{row.reward[0]:.3f} +- {row.reward[1]:.3f}" if row.reward else "",
        "KL <=": f"{kl_bound(row.best_of):.2f}" if row.best_of > 1 else "",
        "words": f"{row.words:.1f}",
    }


def _share_text(share: WinShare) -> str:
    return f"{share.mean:.3f} ({share.low:.3f} .. {share.high:.3f})" if share.n else ""


def winrate_json(row: WinrateRow) -> dict[str, Any]:
    """Returns a row as JSON values; NaN becomes null."""
    return json_values(row) | {"kl_bound": kl_bound(row.best_of)}


def render_winrate(rows: Sequence[WinrateRow], lines: Sequence[str], judged: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page as HTML.

    Args:
      rows: rows of the table.
      lines: sentences on what was compared.
      judged: all judgements; the page shows `SHOWN` of them, evenly spaced.
    """
    head, *body = winrate_table(rows)
    drawn = (winrate_figure(rows, axis, reward=reward) for axis in SETTINGS for reward in (False, True))
    return render_page(
        "winrate.html",
        title="Win rates: " + ", ".join(dict.fromkeys(row.policy for row in rows)),
        lines=lines,
        panels=[figure.Panel(svg) for svg in drawn if svg],
        head=head,
        rows=body,
        judgements=[_judgement_cells(row) for row in judged[:: max(1, -(-len(judged) // SHOWN))]],
    )


def _judgement_cells(row: Mapping[str, Any]) -> list[str]:
    """Returns prompt, response, the other response, and the outcome with a line for each verdict."""
    verdicts = (f"{verdict['score']}: {verdict['said']}" for verdict in row["verdicts"])
    return [row["prompt"], row["response"], row["other"], "\n".join([str(row["outcome"]), *verdicts])]


def winrate_figure(rows: Sequence[WinrateRow], axis: str, *, reward: bool = False, beside: bool = False) -> str:
    """Returns win rates, or mean rewards, against `axis` ("temperature" or "best_of") as SVG.

    Each policy has a curve for each value of the other setting. "" if the axis has fewer than two values, or rows have
    no reward. The legend may stand beside the figure, where names of policies are short.
    """
    if len({getattr(row, axis) for row in rows}) < 2 or (reward and any(row.reward is None for row in rows)):
        return ""
    fig = figure.new_figure(6.6 if beside else 5.2, 3.4)
    axes = fig.add_subplot()
    entries = {}
    for i, (label, group) in enumerate(_curves(rows, axis)):
        places = [_place(row, reward) for row in group]
        errors = [[mean - low for mean, low, _ in places], [high - mean for mean, _, high in places]]
        x, y = [getattr(row, axis) for row in group], [mean for mean, *_ in places]
        style = {"color": figure.COLOURS[i % len(figure.COLOURS)], "marker": "o", "ms": 4, "lw": 1.6, "capsize": 2}
        entries[label] = axes.errorbar(x, y, errors, **style)
    if not reward:
        axes.axhline(0.5, color=figure.INK, alpha=0.4, lw=0.8, ls="--")
    figure.add_legend(axes, entries, beside=beside)
    if axis == "best_of":
        axes.set_xscale("log", base=2)
    return figure.figure_svg(fig, axes, axis.replace("_", " "), "reward" if reward else "win rate")


def _place(row: WinrateRow, reward: bool) -> tuple[float, float, float]:
    """Returns the win rate of a row, or its mean reward, with the ends of the 95% interval."""
    if reward and row.reward:
        mean, half = row.reward
        return mean, mean - half, mean + half
    return row.tally.wins[:3]


def _curves(rows: Sequence[WinrateRow], axis: str) -> Iterator[tuple[str, list[WinrateRow]]]:
    """Yields (label, rows) of each curve; the rows differ only in `axis` and are sorted by it."""
    other = "best_of" if axis == "temperature" else "temperature"
    several = len({getattr(row, other) for row in rows}) > 1
    ordered = sorted(rows, key=lambda row: (row.policy, getattr(row, other), getattr(row, axis)))
    for (policy, value), group in itertools.groupby(ordered, key=lambda row: (row.policy, getattr(row, other))):
        yield f"{policy}, {SETTINGS[other].format(value)}" if several else policy, list(group)
