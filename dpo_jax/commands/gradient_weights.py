"""Gradient weights of losses: how much a pair of a margin still moves the policy, for the losses of compared runs."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.commands.common import log_line
from dpo_jax.commands.margins import logps_at, settled_running
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss, build
from dpo_jax.pages import figure
from dpo_jax.pages.curves import run_color
from dpo_jax.paths import is_run
from dpo_jax.records import Array
from dpo_jax.training.run_folder import run_config

MARGINS = np.linspace(-30.0, 30.0, 241)  # nats
TOKENS, REF_LOGP = 20, -40.0  # of each response
COLUMNS = 3
TITLE_WIDTH = 44  # characters
CAPTION = (
    "-d loss / d margin at c = -r, with each run's options: how much a pair still moves the policy; below 0 it is "
    f"pushed back. Responses of {TOKENS} tokens, log ref {REF_LOGP:g}, scores 3 and 1, one pair per step, running "
    "means and deviations those of all these pairs."
)
Terms = Mapping[str, Any] | Sequence[Mapping[str, Any]]  # a loss of a parsed config: each term has all options


def shown_panels(runs: Sequence[Path]) -> list[figure.Panel]:
    """Returns the figure of the gradient weights of several runs; none, with a line, where a loss has none."""
    if not all(is_run(run) for run in runs):
        return []
    try:
        return gradient_weight_panels(runs)
    except Exception as error:  # whatever a user's loss raises at these pairs
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        log_line(f"no gradient weights: {kind}{str(error).partition(chr(10))[0]}")
        return []


def gradient_weight_panels(runs: Sequence[Path]) -> list[figure.Panel]:
    """Returns a figure of the gradient weights of the runs' losses side by side; none for runs of one loss.

    Raises:
      UserError: a run has no config, or a loss that is not at hand.
    """
    terms = [run_config(run).loss for run in runs]
    if all(one == terms[0] for one in terms):
        return []
    distinct = [i for i, one in enumerate(terms) if one not in terms[:i]]
    titles = loss_titles([terms[i] for i in distinct])
    columns, rows = min(COLUMNS, len(distinct)), -(-len(distinct) // COLUMNS)
    fig = figure.new_figure(3.6 * columns, 2.9 * rows)
    for place, (i, title) in enumerate(zip(distinct, titles, strict=True)):
        axes = fig.add_subplot(rows, columns, place + 1)
        axes.plot(MARGINS, gradient_weight(build(terms[i])), color=run_color(i), lw=1.6)
        axes.axhline(0.0, color=figure.INK, alpha=0.5, lw=0.8, ls=(0, (1, 2)))
        names = ", ".join(run.resolve().name for run, one in zip(runs, terms, strict=True) if one == terms[i])
        lines = "\n".join(figure.wrap_text(text, TITLE_WIDTH) for text in (names, title))
        axes.set_title(lines, color=figure.INK, fontsize=9, parse_math=False)
        figure.style_axes(axes, "margin c - r, nats")
    return [figure.Panel(figure.set_svg_id(fig), "Gradient weight", CAPTION)]


def gradient_weight(loss: Loss, margins: Array = MARGINS) -> Array:
    """Returns -d loss / d margin, float32[n], of pairs of these margins, each alone in a step after steps of all."""
    every = jnp.asarray(margins, jnp.float32)
    running = settled_running(loss, logps_at(every, loss, REF_LOGP, TOKENS))

    def value(margin: Array) -> Array:
        return loss.values(logps_at(margin[None], loss, REF_LOGP, TOKENS)._replace(running=running))[0]

    return -np.asarray(jax.vmap(jax.grad(value))(every))


def loss_titles(losses: Sequence[Terms]) -> list[str]:
    """Returns the names of the terms of each loss, with the options in which those losses differ that have them."""
    terms = [[loss] if isinstance(loss, Mapping) else loss for loss in losses]
    found: dict[str, list[list[Any]]] = {}
    for loss in terms:
        for key in dict.fromkeys(key for term in loss for key in term):
            found.setdefault(key, []).append([term[key] for term in loss if key in term])
    found.pop("name")
    # Losses of one and of two terms need not differ in a value.
    differing = [key for key, values in found.items() if _differ(values) and _differ([*chain(*values)])]

    def text(term: Mapping[str, Any]) -> str:
        options = [f"{key} {_text(term[key])}" for key in differing if key in term]
        return " ".join([term["name"], *options])

    return [" + ".join(map(text, loss)) for loss in terms]


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
