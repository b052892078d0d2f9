"""Gradient weights of losses: how much a pair of a margin still moves the policy, for the losses of compared runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import Loss, build
from dpo_jax.losses.term_options import first_responses
from dpo_jax.pages import figure
from dpo_jax.pages.curves import run_color
from dpo_jax.records import Array, Logps
from dpo_jax.training.run_folder import run_config

MARGINS = np.linspace(-30.0, 30.0, 241)  # nats
TOKENS, REF_LOGP = 20, -40.0  # of each response
COLUMNS = 3
CAPTION = (
    "-d loss / d margin at c = -r, with each run's options: how much a pair still moves the policy; below 0 it is "
    f"pushed back. Responses of {TOKENS} tokens, log ref {REF_LOGP:g}, scores 3 and 1, one pair per step, running "
    "means at 0."
)


def gradient_weight_panels(runs: Sequence[Path]) -> list[figure.Panel]:
    """Returns a figure of the gradient weights of the runs' losses side by side; none for runs of one loss.

    Raises:
      UserError: a run has no config, or a loss that is not at hand.
    """
    terms = [run_config(run).loss for run in runs]
    if all(one == terms[0] for one in terms):
        return []
    distinct = [i for i, one in enumerate(terms) if one not in terms[:i]]
    columns, rows = min(COLUMNS, len(distinct)), -(-len(distinct) // COLUMNS)
    fig = figure.new_figure(3.6 * columns, 2.9 * rows)
    for place, i in enumerate(distinct):
        axes = fig.add_subplot(rows, columns, place + 1)
        axes.plot(MARGINS, gradient_weight(build(terms[i])), color=run_color(i), lw=1.6)
        axes.axhline(0.0, color=figure.INK, alpha=0.5, lw=0.8, ls=(0, (1, 2)))
        names = ", ".join(run.resolve().name for run, one in zip(runs, terms, strict=True) if one == terms[i])
        axes.set_title(f"{names}\n{_text(terms[i])}", color=figure.INK, fontsize=9, parse_math=False)
        figure.style_axes(axes, "margin c - r, nats")
    return [figure.Panel(figure.set_svg_id(fig), "Gradient weight", CAPTION)]


def gradient_weight(loss: Loss, margins: Array = MARGINS) -> Array:
    """Returns -d loss / d margin, float32[n], of pairs of these margins, each alone in its step."""

    def value(margin: Array) -> Array:
        return loss.values(_logps(margin, loss))[0]

    return -np.asarray(jax.vmap(jax.grad(value))(jnp.asarray(margins, jnp.float32)))


def _logps(margin: Array, loss: Loss) -> Logps:
    """Returns log-probs of a pair with log-ratios margin / 2 and -margin / 2, and of a third response with 0."""
    ratios = jnp.stack([margin / 2, -margin / 2, 0.0 * margin])[None]
    if loss.responses == 3 and not loss.mismatched:  # a gold response comes first
        ratios = ratios[:, jnp.array([2, 0, 1])]
    policy, reference = REF_LOGP + ratios, jnp.full_like(ratios, REF_LOGP)
    scores, lengths = jnp.array([[3.0, 1.0, 0.0]]), jnp.full_like(ratios, TOKENS)
    shared = {"policy_shared": policy, "reference_shared": reference, "confidence": 0.0 * ratios}
    lp = Logps.of(policy, reference, lengths=lengths, scores=scores, **shared)
    return first_responses(lp, loss.responses or 2)


def _text(loss: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Returns the names and betas of the terms of a loss."""
    terms = [loss] if isinstance(loss, Mapping) else loss
    return " + ".join(
        " ".join([str(t.get("name", "axes")), *([f"beta {t['beta']:g}"] if "beta" in t else [])]) for t in terms
    )
