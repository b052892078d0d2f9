"""What runs have gained for their distance from the reference: true reward and accuracy against KL, by loss."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.pages import figure, metrics
from dpo_jax.pages.headline import held_out
from dpo_jax.pages.metrics import Measured, metric_wording

Run = tuple[Mapping[str, str], Mapping[str, Measured]]  # config by dotted key, and last metrics by name
BARS: dict[str, Any] = {"ms": 4, "elinewidth": 0.7, "capsize": 2, "alpha": 0.9, "lw": 1.1}
MARKERS = "os^Dv"  # losses that share a color differ by their marker
FEWEST = 3  # runs in a figure
LONGEST = 32  # characters of a loss in the legend
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Place(NamedTuple):
    """A run in a figure: beta of each term of its loss, as its config has it, its KL and the metric."""

    beta: str
    kl: Measured
    value: Measured


def tradeoff_panels(runs: Sequence[Run]) -> list[figure.Panel]:
    """Returns a figure for true reward and one for accuracy, each if enough runs have it and a sampled KL."""
    panels = []
    for name in (metrics.TRUE_REWARD["policy"], metrics.ACCURACY):
        places = places_by_loss(runs, name)
        if sum(map(len, places.values())) >= FEWEST:
            title, meaning = metric_wording(name).name, metric_wording(metrics.SAMPLED_KL).meaning
            caption = f"Points: runs, labeled with beta, with 95% intervals. KL: {meaning}"
            panels.append(figure.Panel(_tradeoff_svg(places, title), f"{title} against KL", caption))
    return panels


def places_by_loss(runs: Iterable[Run], name: str) -> dict[str, list[Place]]:
    """Returns the runs of each loss by rising beta (texts last), without those whose metric or KL has no interval.

    Args:
      runs: config and last metrics of each.
      name: of the metric, without `eval_`.
    """
    places: dict[str, list[Place]] = {}
    for config, final in runs:
        kl, value = held_out(final, metrics.SAMPLED_KL), held_out(final, name)
        if kl and value and kl.interval and value.interval:
            places.setdefault(_loss_key(config, "name"), []).append(Place(_loss_key(config, "beta"), kl, value))
    return {loss: sorted(some, key=_by_beta) for loss, some in places.items()}


def _by_beta(place: Place) -> list[tuple[bool, float, str]]:
    """Returns what places are sorted by: beta as a number; an option of one's own loss may be any text."""
    numbers = [(part, NUMBER.fullmatch(part)) for part in place.beta.split()]
    return [(not number, float(part) if number else 0.0, part) for part, number in numbers]


def _loss_key(config: Mapping[str, str], key: str) -> str:
    """Returns the values of a key of all terms of a run's loss."""
    return " ".join(value for name, value in config.items() if name.startswith("loss.") and name.endswith(f".{key}"))


def _tradeoff_svg(losses: Mapping[str, Sequence[Place]], label: str) -> str:
    """Returns the figure: points of one loss are joined in the order of their betas, and labeled with them."""
    fig = figure.new_figure(7.2, 4.6)
    axes, legend = fig.add_subplot(), dict[str, Any]()
    for i, (loss, places) in enumerate(losses.items()):
        x, y = [place.kl.mean for place in places], [place.value.mean for place in places]
        errors = {"xerr": _halves([place.kl for place in places]), "yerr": _halves([place.value for place in places])}
        style: dict[str, Any] = {"color": figure.COLOURS[i % 10], "fmt": MARKERS[i // 10 % 5] + "-"}
        name = loss if len(loss) <= LONGEST else f"…{loss[1 - LONGEST :]}"
        legend[name] = axes.errorbar(x, y, **errors, **style, **BARS)
        figure.label_points(axes, x, y, [place.beta for place in places], style["color"], i)
    figure.add_legend(axes, legend, beside=True)
    return figure.figure_svg(fig, axes, "KL from the reference, nats", label)


def _halves(values: Sequence[Measured]) -> list[list[float]]:
    """Returns how far the ends of intervals lie below and above their means."""
    ends = [(value.mean, *(value.interval or (value.mean, value.mean))) for value in values]
    return [[max(0.0, mean - low) for mean, low, _ in ends], [max(0.0, high - mean) for mean, _, high in ends]]
