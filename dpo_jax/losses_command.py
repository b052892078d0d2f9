"""The page on losses: name, formula, hyper-parameters and paper of each, and curves of those of a margin alone.

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

from dpo_jax import drawing, folders, keys, losses
from dpo_jax.losses.registry import Entry
from dpo_jax.records import Array, Logps, UserError

NOTATION = (
    "c, r       log pi(y | x) - log ref(y | x) of the chosen and the rejected response, summed over tokens",
    "p_c, p_r   log pi(y | x) of the two;  L_c, L_r  their lengths in tokens;  m_c = p_c / L_c, m_r = p_r / L_r",
    "r_c, r_r   rewards of the two by the reward model that is trained",
    "z_k        beta (log pi - log ref) of the response of rank k;  s  ratings that the data has",
)
WIDTH = 145  # of the table where there is no terminal
MARGINS = np.linspace(-6.0, 6.0, 241)
DASHES = ("-", "--", ":")


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
    """`dpo-jax losses [NAME ...] [--plot FILE.svg]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    names, options = list(argv[:first]) or list(losses.REGISTRY), keys.arguments(argv[first:])
    if any(key != "plot" or len(values) != 1 for key, values in options):
        raise UserError("dpo-jax losses takes names of losses, then --plot FILE.svg; nothing else")
    for name in names:
        if name not in losses.REGISTRY:
            raise UserError(f"unknown loss {name!r}; {keys.closest(name, list(losses.REGISTRY))}")
    if options:
        print(f"wrote {write_plot(Path(options[-1][1][0]), names)}")
        return
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table(names), *NOTATION, sep="\n", highlight=False, markup=False, soft_wrap=True)


def describe(name: str) -> Description:
    """Returns what a registered loss says of itself."""
    entry = losses.REGISTRY[name]
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


def table(names: Sequence[str]) -> Grid:
    """Returns the table of losses for a terminal."""
    grid = Grid(show_lines=True)
    grid.add_column("loss", min_width=22)
    grid.add_column("formula")
    grid.add_column("paper; data and options", max_width=33)
    for name in names:
        said = describe(name)
        hyper = "\n".join(f"  {key} {default}" for key, default in said.hyper.items())
        formula = "\n".join((said.title, "", *(f"  {line}" for line in said.formula)))
        grid.add_row(Text(f"{name}\n{hyper}"), Text(formula), Text(f"{said.paper}\n{said.takes}"))
    return grid


def write_plot(out: Path, names: Sequence[str]) -> Path:
    """Draws loss and gradient against the margin, of the losses of a margin alone, to an SVG; returns its path."""
    if out.suffix != ".svg":
        raise UserError(f"--plot {out}: give the name of an .svg file")
    drawn = curves(names)
    if not drawn:
        raise UserError(f"--plot: none of {', '.join(names)} is a function of the margin alone")
    fig = drawing.new(11, 5.5)
    for place, title in enumerate(("loss", "d loss / d margin")):
        axes = fig.add_subplot(1, 2, 1 + place)
        for i, (label, values) in enumerate(drawn.items()):
            colour = drawing.COLOURS[i % len(drawing.COLOURS)]
            dash = DASHES[i // len(drawing.COLOURS) % len(DASHES)]
            axes.plot(MARGINS, values[place], dash, color=colour, lw=1.6, label=label)
        axes.set_ylim((-1.5, 6.0) if place == 0 else (-4.0, 2.0))
        axes.set_title(title, color=drawing.INK, fontsize=10)
        drawing.dress(axes, "margin c - r (beta 1, one token a response, scores 3 and 1)")
    legend = fig.axes[0].get_legend_handles_labels()
    fig.legend(*legend, loc="outside lower center", ncols=4, frameon=False, labelcolor=drawing.INK, fontsize=9)
    with folders.written(out) as file:
        file.write(drawing.element(fig))
    return out


def curves(names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
    """Returns loss and gradient, float[n] each, at the margins of the plot, by the names of those that share them."""
    found: dict[str, tuple[Array, Array]] = {}
    for name in names:
        if (curve := _curve(name)) is not None:
            same = next((label for label, other in found.items() if np.allclose(other, curve, atol=1e-5)), None)
            label = f"{same}, {name}" if same else name
            found = {label if key == same else key: value for key, value in found.items()} | {label: curve}
    return found


def _curve(name: str) -> tuple[Array, Array] | None:
    """Returns loss and gradient by margin, or nothing where the value depends on more than the margin."""
    entry = losses.REGISTRY[name]
    if entry.responses not in (2, None) or entry.whole_batch or entry.unpaired or entry.rewards:
        return None
    hyper = {"beta": 1.0} if "beta" in inspect.signature(entry.function).parameters else {}

    def value(margins: Array, shift: float) -> Array:
        return entry.function(_pairs(margins, shift), **hyper)

    margins = jnp.asarray(MARGINS, jnp.float32)
    values = value(margins, 0.0)
    if not np.allclose(values, value(margins, -3.0), atol=1e-4):
        return None
    return np.asarray(values), np.asarray(jax.grad(lambda x: value(x, 0.0).sum())(margins))


def _pairs(margins: Array, shift: float) -> Logps:
    """Returns pairs of one-token responses with given margins, both log-ratios shifted."""
    policy = jnp.stack([margins / 2, -margins / 2], 1) + shift
    zeros, ones = jnp.zeros_like(policy), jnp.ones_like(policy)
    return Logps(
        policy=policy,
        reference=zeros,
        policy_shared=policy,
        reference_shared=zeros,
        lengths=ones,
        present=ones > 0,
        weights=ones[:, 0],
        preference=ones[:, 0],
        scores=jnp.broadcast_to(jnp.array([3.0, 1.0]), policy.shape),
        confidence=zeros,
        running=jnp.zeros(()),
    )
