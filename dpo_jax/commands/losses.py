"""`dpo-jax losses`: formula, hyper-parameters and paper of each loss, and a plot of losses against the margin.

Everything is read from the functions: their docstrings, signatures and values. A loss is a name, which may have
options, as `ipo,beta=0.2`, or options of `axes` such as `link=squared,target=constant`.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dpo_jax import losses
from dpo_jax.commands.margins import logps_at, settled_running
from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.losses.objective import OPTIONS, build
from dpo_jax.losses.points import POINTS, coordinates, point_text
from dpo_jax.losses.registry import Entry, find_entry
from dpo_jax.named import options_of, with_defaults
from dpo_jax.pages import figure
from dpo_jax.paths import written
from dpo_jax.records import Array
from dpo_jax.training.loss_text import NOTATION, describe_loss

WIDTH = 145  # of the table, if the output is no terminal
MARGINS = np.linspace(-6.0, 6.0, 241)
REF_LOGP = -4.0  # log pi_ref of a response in the plot
PANEL = 6  # losses in a panel of the plot
LEGEND_WIDTH = 30  # characters
DASHES = ("-", "--", "-.")  # for readers who do not see the colors
AXES = {
    True: "margin c - r, on which alone these depend\n(beta 1 if not given, one token per response, scores 3 and 1)",
    False: f"margin c - r, at c = -r (beta 1 if not given, a\ntoken per response, log ref {REF_LOGP:g}, a pair a step)",
}


def losses_command(argv: Sequence[str]) -> None:
    """Runs `dpo-jax losses [NAME[,OPTION=VALUE] | AXIS=VALUE,... ...] [--plot [FILE.svg]]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    names, given = list(argv[:first]) or list(losses.REGISTRY), arguments(argv[first:])
    if any(key != "plot" or len(values) > 1 for key, values in given):
        raise UserError(
            "dpo-jax losses takes names, or axes such as link=squared, then --plot [FILE.svg]; remove the rest"
        )
    refuse_repeated(names, "dpo-jax losses")
    for name in names:
        named_term(name)
    if given:
        print(f"wrote {write_plot(Path((given[-1][1] or ['losses.svg'])[0]), names)}")
        return
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    lines = (*NOTATION, "", *_shared_options(), *_points(names))
    console.print(losses_table(names), *lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


class NamedTerm(NamedTuple):
    """A loss as a command line names it.

    Attributes:
      loss: name of the registered loss; `axes` of a point.
      entry: its entry, with what these options need.
      given: the options that the text gives.
    """

    loss: str
    entry: Entry
    given: dict[str, Any]


def named_term(name: str, command: str = "dpo-jax losses") -> NamedTerm:
    """Returns the loss of a name such as `dpo`, `ipo,beta=0.2` or, of a point, `link=squared,scale=2`.

    Args:
      name: of a registered loss, its options after it, or coordinates.
      command: begins the messages.

    Raises:
      UserError: no such loss or option, or options that do not go together.
    """
    first, *rest = name.split(",")
    loss, texts = ("axes", [first, *rest]) if "=" in first else (first, rest)
    bare = next((text for text in texts if "=" not in text), "")
    if bare or name.endswith(","):
        raise UserError(f"{command}: {name!r}: {bare!r} is no option; write OPTION=VALUE after the name of a loss")
    entry = find_entry(loss, command)
    given = {text.partition("=")[0]: text.partition("=")[2] for text in texts}
    own = options_of(entry.function)
    every = with_defaults("", [*own, *options_of(*OPTIONS)], given)
    if texts:
        build({"name": loss, **{key: every[key] for key in given}})
        needs = entry.of_options(**{option.name: every[option.name] for option in own}) if entry.of_options else {}
        entry = entry._replace(**needs)
    return NamedTerm(loss, entry, {key: every[key] for key in given})


def refuse_repeated(names: Sequence[str], command: str) -> None:
    """Raises a UserError for a loss that is named twice."""
    for name in names:
        if list(names).count(name) > 1:
            raise UserError(f"{command}: {name} is named {list(names).count(name)} times; name it once")


def _points(names: Sequence[str]) -> list[str]:
    """Returns the losses that are points of the axes as a config writes them, as lines."""
    terms = {name: named_term(name) for name in names}
    found = [
        f"  {name:<18} loss: {point_text(term.loss, term.given)}"
        + (f"  # {POINTS[term.loss].within}" if POINTS[term.loss].within else "")
        for name, term in terms.items()
        if _is_point(term)
    ]
    return ["", "as points of the axes", *found] if found else []


def _is_point(term: NamedTerm) -> bool:
    """Returns whether a loss is a point of the axes with these options, which are its own."""
    point, every = POINTS.get(term.loss), describe_loss(term.loss).hyper
    return point is not None and term.given.keys() <= every.keys() and not point.outside(every | term.given)


def _shared_options() -> list[str]:
    """Returns the options that all losses have, as lines."""
    options = [(f"{o.name} {o.default}", o.help) for o in options_of(*OPTIONS)]
    return ["every loss also has", *(f"  {option:<24} {text}" for option, text in options)]


def losses_table(names: Sequence[str]) -> Grid:
    """Returns the table of losses for a terminal."""
    grid = Grid(show_lines=True)
    grid.add_column("loss", min_width=22)
    grid.add_column("formula")
    grid.add_column("paper; data and options", max_width=33)
    for name in names:
        term = named_term(name)
        found = describe_loss(term.loss, term.entry)
        hyper = "\n".join(f"  {key} {default}" for key, default in (found.hyper | term.given).items())
        formula = "\n".join((found.title, "", *(f"  {line}" for line in found.formula)))
        place = coordinates(term.loss, term.given) if term.given.keys() <= found.hyper.keys() else ""
        point = f"\naxes: {place}" if place else ""
        grid.add_row(Text(f"{name}\n{hyper}"), Text(formula), Text(f"{found.paper}\n{found.takes}{point}"))
    return grid


class LossCurve(NamedTuple):
    """A loss as a function of the margin.

    Attributes:
      value: float32[n], the loss at `MARGINS`.
      gradient: float32[n], its derivative.
      margin_only: whether the loss depends on the margin only.
    """

    value: Array
    gradient: Array
    margin_only: bool


def write_plot(out: Path, names: Sequence[str]) -> Path:
    """Plots losses and gradients against the margin to an SVG file, and returns its path.

    A row of two panels, value and gradient, has at most `PANEL` losses; a third column is its legend. Losses that
    depend on the margin only come first.

    Raises:
      UserError: the file name does not end in .svg.
    """
    if out.suffix != ".svg":
        raise UserError(f"--plot {out}: not an .svg file; name one")
    rows = panel_rows(loss_curves(names))
    fig = figure.new_figure(11, 3.3 * len(rows))
    for row, curves in enumerate(rows):
        _draw_row(fig, (len(rows), 2, 2 * row + 1), curves)
    with written(out) as file:
        file.write(figure.set_svg_id(fig))
    return out


def panel_rows(curves: Mapping[str, "LossCurve"]) -> list[dict[str, "LossCurve"]]:
    """Returns the curves of each row: of one kind, with at most `PANEL` losses by name, or a single curve."""
    rows: list[dict[str, LossCurve]] = []
    kinds: list[bool] = []
    for label, curve in sorted(curves.items(), key=lambda item: not item[1].margin_only):
        count = sum(name.count(",") + 1 for name in (*rows[-1], label)) if rows else 0
        if not rows or kinds[-1] != curve.margin_only or count > PANEL:
            rows.append({})
            kinds.append(curve.margin_only)
        rows[-1][label] = curve
    return rows


def _draw_row(fig: "figure.Figure", place: tuple[int, int, int], curves: Mapping[str, "LossCurve"]) -> None:
    """Draws value and gradient of curves into two panels of a figure, from `place` on, with a legend beside them."""
    value, gradient = (fig.add_subplot(*place[:2], place[2] + column) for column in (0, 1))
    for i, (label, curve) in enumerate(curves.items()):
        style = {"color": figure.COLOURS[i], "lw": 1.6, "ls": DASHES[i % len(DASHES)]}
        value.plot(MARGINS, curve.value, **style)
        gradient.plot(MARGINS, curve.gradient, **style, label=figure.wrap_text(label, LEGEND_WIDTH))
    for axes, title, limits in ((value, "loss", (-1.5, 6.0)), (gradient, "d loss / d margin", (-4.0, 2.0))):
        axes.set_ylim(limits)
        axes.set_title(title, color=figure.INK, fontsize=10)
        figure.style_axes(axes, AXES[next(iter(curves.values())).margin_only])
    figure.add_legend(gradient, beside=True)


def loss_curves(names: Sequence[str]) -> dict[str, LossCurve]:
    """Returns the curves of the plot; losses with the same curve share one, under their names joined by commas."""
    found: dict[str, LossCurve] = {}
    for name in names:
        curve = _curve(name)
        equal = (
            k
            for k, v in found.items()
            if v.margin_only == curve.margin_only and np.allclose(v[:2], curve[:2], atol=1e-5)
        )
        same = next(equal, None)
        label = f"{same}, {name}" if same else name
        found = {label if key == same else key: value for key, value in found.items()} | {label: curve}
    return found


def _curve(name: str) -> LossCurve:
    """Returns the curve of a loss, computed with one pair per step where a loss looks across pairs."""
    term = named_term(name)
    strength = {"beta": 1.0} if "beta" in inspect.signature(term.entry.function).parameters else {}
    loss, margins = build({"name": term.loss, **strength, **term.given}), jnp.asarray(MARGINS, jnp.float32)
    running = settled_running(loss, logps_at(margins, loss, REF_LOGP))

    def batched(margins: Array, shift: float = 0.0) -> Array:
        return loss.values(logps_at(margins, loss, REF_LOGP, shift=shift)._replace(running=running))

    def one_by_one(margins: Array, shift: float = 0.0) -> Array:
        return jax.vmap(lambda margin: batched(margin[None], shift)[0])(margins)

    value = one_by_one if loss.whole_batch else batched
    values, gradient = value(margins), jax.grad(lambda x: value(x).sum())(margins)
    margin_only = not loss.whole_batch and bool(np.allclose(values, value(margins, -3.0), atol=1e-4))
    return LossCurve(np.asarray(values), np.asarray(gradient), margin_only)
