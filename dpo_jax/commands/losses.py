"""The page on losses: name, formula, hyper-parameters and paper of each, and curves of all by the margin.

All of it is read from the functions themselves: their docstrings, signatures and values.
"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dpo_jax import losses
from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.losses import term_options
from dpo_jax.losses.objective import OPTIONS
from dpo_jax.losses.registry import Entry, find_entry
from dpo_jax.named import options_of
from dpo_jax.pages import figure
from dpo_jax.paths import written
from dpo_jax.records import Array, Logps

NOTATION = (
    "c, r       log pi(y | x) - log ref(y | x) of the chosen and the rejected response, summed over tokens",
    "p_c, p_r   log pi(y | x) of the two;  L_c, L_r  their lengths in tokens;  m_c = p_c / L_c, m_r = p_r / L_r",
    "r_c, r_r   rewards of the two by the reward model that is trained",
    "z_k        beta (log pi - log ref) of the response of rank k;  s  ratings that the data has",
)
WIDTH = 145  # of the table where there is no terminal
MARGINS = np.linspace(-6.0, 6.0, 241)
LEVEL = -4.0  # log pi_ref of a response of the plot
DASHES = ("-", "--", ":", "-.")
AXES = {
    True: "margin c - r, all that these depend on\n(beta 1, one token a response, scores 3 and 1)",
    False: f"margin c - r, at c = -r\n(beta 1, one token a response, log ref {LEVEL:g}, steps of one pair)",
}


class Description(NamedTuple):
    """What a loss says of itself.

    Attributes:
      title: what it is, in a few words.
      paper: authors, year, arXiv number and equation.
      formula: its lines.
      hyper: name -> default.
      takes: what data it takes, and which options.
    """

    title: str
    paper: str
    formula: tuple[str, ...]
    hyper: dict[str, object]
    takes: str


def losses_command(argv: Sequence[str]) -> None:
    """`dpo-jax losses [NAME ...] [--plot [FILE.svg]]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    names, given = list(argv[:first]) or list(losses.REGISTRY), arguments(argv[first:])
    if any(key != "plot" or len(values) > 1 for key, values in given):
        raise UserError("dpo-jax losses takes names of losses, then --plot [FILE.svg]; nothing else")
    for name in names:
        find_entry(name, "dpo-jax losses")
    if given:
        print(f"wrote {write_plot(Path((given[-1][1] or ['losses.svg'])[0]), names)}")
        return
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(
        losses_table(names), *NOTATION, "", *_common(), sep="\n", highlight=False, markup=False, soft_wrap=True
    )


def _common() -> list[str]:
    """Returns the options of every loss, a line each."""
    found = [(f"{o.name} {o.default}", o.help) for o in options_of(*OPTIONS)]
    return ["every loss also has", *(f"  {option:<24} {text}" for option, text in found)]


def describe_loss(name: str) -> Description:
    """Returns what a registered loss says of itself."""
    entry = find_entry(name)
    lines = (inspect.getdoc(entry.function) or "").splitlines()
    found = re.fullmatch(r"(.*?) \(([^()]* \d{4}, arXiv [^()]*)\)(.*)", lines[0])
    if not found:
        raise ValueError(f"the docstring of loss {name} does not begin with its title and (paper)")
    before, paper, after = found.groups()
    formula = tuple(line[4:] for line in lines[: lines.index("Args:")] if line.startswith("    "))
    parameters = inspect.signature(entry.function).parameters.values()
    hyper = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return Description((before + after).rstrip("."), paper, formula, hyper, _takes(entry))


def _takes(entry: Entry) -> str:
    """Returns what data a loss takes, and which options of a term."""
    counted = {1: "responses", 2: "pairs", 3: "pairs, and responses to other prompts", None: "rankings"}
    said = {
        counted[entry.responses]: True,
        "or single responses": entry.unpaired,
        "no reference": not entry.uses_reference,
        "a reward model": entry.rewards,
        "soft labels": entry.soft_labels,
        "f-divergences": entry.divergences,
        "scores": entry.scores,
        "a step at once": entry.whole_batch,
    }
    return ", ".join(text for text, holds in said.items() if holds)


def losses_table(names: Sequence[str]) -> Grid:
    """Returns the table of losses for a terminal."""
    grid = Grid(show_lines=True)
    grid.add_column("loss", min_width=22)
    grid.add_column("formula")
    grid.add_column("paper; data and options", max_width=33)
    for name in names:
        said = describe_loss(name)
        hyper = "\n".join(f"  {key} {default}" for key, default in said.hyper.items())
        formula = "\n".join((said.title, "", *(f"  {line}" for line in said.formula)))
        grid.add_row(Text(f"{name}\n{hyper}"), Text(formula), Text(f"{said.paper}\n{said.takes}"))
    return grid


class LossCurve(NamedTuple):
    """A loss by the margin.

    Attributes:
      value: float32[n], at `MARGINS`.
      gradient: float32[n], its derivative.
      alone: whether it depends on nothing else.
    """

    value: Array
    gradient: Array
    alone: bool


def write_plot(out: Path, names: Sequence[str]) -> Path:
    """Draws loss and gradient against the margin to an SVG, those of the margin alone above the others; returns its
    path."""
    if out.suffix != ".svg":
        raise UserError(f"--plot {out}: give the name of an .svg file")
    drawn = loss_curves(names)
    rows = [alone for alone in (True, False) if any(curve.alone == alone for curve in drawn.values())]
    fig = figure.new_figure(12, 4.5 * len(rows))
    for row, alone in enumerate(rows):
        axes = [fig.add_subplot(len(rows), 2, 2 * row + column) for column in (1, 2)]
        for i, (label, curve) in enumerate((k, v) for k, v in drawn.items() if v.alone == alone):
            dash, colour = DASHES[i // len(figure.COLOURS)], figure.COLOURS[i % len(figure.COLOURS)]
            for one, values in zip(axes, curve[:2], strict=True):
                one.plot(MARGINS, values, dash, color=colour, lw=1.6, label=label)
        for one, title, limits in zip(axes, ("loss", "d loss / d margin"), ((-1.5, 6.0), (-4.0, 2.0)), strict=True):
            one.set_ylim(limits)
            one.set_title(title, color=figure.INK, fontsize=10)
            figure.style_axes(one, AXES[alone])
        # Beside the axes, in as many lines as there are curves.
        legend = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "frameon": False, "fontsize": 8}
        axes[1].legend(labelcolor=figure.INK, **legend)
    with written(out) as file:
        file.write(figure.set_svg_id(fig))
    return out


def loss_curves(names: Sequence[str]) -> dict[str, LossCurve]:
    """Returns the curves of the plot by the names of the losses that share them."""
    found: dict[str, LossCurve] = {}
    for name in names:
        curve = _curve(name)
        alike = (k for k, v in found.items() if v.alone == curve.alone and np.allclose(v[:2], curve[:2], atol=1e-5))
        same = next(alike, None)
        label = f"{same}, {name}" if same else name
        found = {label if key == same else key: value for key, value in found.items()} | {label: curve}
    return found


def _curve(name: str) -> LossCurve:
    """Returns the curve of a loss, of steps of one pair each."""
    entry = find_entry(name)
    hyper = {"beta": 1.0} if "beta" in inspect.signature(entry.function).parameters else {}

    def at(margins: Array, shift: float = 0.0) -> Array:
        return entry.function(term_options.first_responses(_pairs(margins, shift), entry.responses or 2), **hyper)

    def one_by_one(margins: Array, shift: float = 0.0) -> Array:
        return jax.vmap(lambda margin: at(margin[None], shift)[0])(margins)

    value, margins = one_by_one if entry.whole_batch else at, jnp.asarray(MARGINS, jnp.float32)
    values, gradient = value(margins), jax.grad(lambda x: value(x).sum())(margins)
    alone = not entry.whole_batch and bool(np.allclose(values, value(margins, -3.0), atol=1e-4))
    return LossCurve(np.asarray(values), np.asarray(gradient), alone)


def _pairs(margins: Array, shift: float) -> Logps:
    """Returns pairs of one-token responses with given margins, both log-ratios shifted, each with a third response
    whose log-ratio is 0."""
    policy = jnp.stack([margins / 2 + shift, -margins / 2 + shift, 0.0 * margins], 1) + LEVEL
    reference, ones = jnp.full_like(policy, LEVEL), jnp.ones_like(policy)
    scores = jnp.broadcast_to(jnp.array([3.0, 1.0, 0.0]), policy.shape)
    return Logps.of(policy, reference, lengths=ones, scores=scores, confidence=0.0 * ones)
