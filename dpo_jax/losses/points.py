"""The coordinates of the named losses that are points of the axes, alone or beside supervised fine-tuning."""

from collections.abc import Callable
from typing import Any, NamedTuple

Numbers = Callable[[dict[str, Any]], dict[str, Any]]


class LossPoint(NamedTuple):
    """The coordinates of a named loss.

    Attributes:
      score, ranking, link, target: options of `axes`.
      numbers: hyper-parameters of the named loss -> numbers of `axes`, and its `weight`.
      beside: hyper-parameters of the named loss -> further terms.
    """

    score: str
    ranking: str
    link: str
    target: str = "zero"
    numbers: Numbers = lambda h: h
    beside: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None


def _only(*names: str, **values: float) -> Numbers:
    """Returns the numbers of a point: some of a loss's own, and constants."""
    return lambda h: {name: h[name] for name in names} | values


def _half_inverse(h: dict[str, Any]) -> dict[str, Any]:
    return {"beta": 2 * h["beta"], "weight": (2 * h["beta"]) ** -2}  # (x - 1 / 2 beta)^2 is this (1 - 2 beta x)^2


def _less_one(h: dict[str, Any]) -> dict[str, Any]:
    return {"beta": 1.0, "scale": h["delta"] - 1}  # the hinge asks for a margin of 1 by itself


def _as_weight(h: dict[str, Any]) -> dict[str, Any]:
    return {"beta": 1.0, "weight": h["beta"]}


def _sft(reduction: str, weight: str = "") -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    return lambda h: [{"name": "sft", "reduction": reduction, "weight": h[weight] if weight else 1.0}]


_SMOOTH = ("beta", "label_smoothing")
POINTS = {
    "dpo": LossPoint("log_ratio", "pair", "logistic"),
    "sigmoid_norm": LossPoint("log_ratio_mean", "pair", "logistic"),
    "ipo": LossPoint("log_ratio_mean", "pair", "squared", "zero", _half_inverse),
    "ipo_sum": LossPoint("log_ratio", "pair", "squared", "zero", _half_inverse),
    "hinge": LossPoint("log_ratio", "pair", "hinge"),
    "odpo": LossPoint("log_ratio", "pair", "logistic", "log_gap", lambda h: _only(*_SMOOTH)(h) | {"scale": h["alpha"]}),
    "r_dpo": LossPoint("log_ratio", "pair", "logistic", "length", lambda h: _only(*_SMOOTH)(h) | {"scale": h["alpha"]}),
    "hypo": LossPoint("log_prob", "pair", "logistic", "reference_positive"),
    "chi_po": LossPoint("chi_squared", "pair", "logistic", "zero", _only(*_SMOOTH)),
    "rpo_sq": LossPoint("log_ratio", "pair", "residual", "gap", lambda h: {"beta": h["beta"], "scale": h["eta"]}),
    "bco_pair": LossPoint("log_ratio", "pointwise", "logistic"),
    "sppo_hard": LossPoint("log_ratio", "pointwise", "squared", "zero", _half_inverse),
    "apo_zero": LossPoint("log_ratio", "pointwise", "sigmoid"),
    "bco": LossPoint("log_ratio", "pointwise", "logistic", "moving_mean", _only("beta", "decay", weight=0.5)),
    "plackett_luce": LossPoint("log_ratio", "list", "logistic"),
    "simpo": LossPoint(
        "log_prob_mean", "pair", "logistic", "constant", lambda h: _only(*_SMOOTH)(h) | {"scale": h["gamma"]}
    ),
    "simper": LossPoint("likelihood", "pair", "linear", "zero", _only(beta=1.0)),
    "cpo": LossPoint("log_prob", "pair", "logistic", "zero", _only(*_SMOOTH), _sft("mean", "nll_weight")),
    "slic": LossPoint("log_prob", "pair", "hinge", "constant", _less_one, _sft("sum", "nll_weight")),
    "orpo": LossPoint("log_odds", "pair", "logistic", "zero", _as_weight, _sft("mean")),
    "asft": LossPoint("log_odds", "pointwise", "logistic", "zero", _as_weight, _sft("mean")),
}


def terms_of(name: str, hyper: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the terms of an objective that equals a named loss: a point of the axes, and sft beside some of them."""
    point = POINTS[name]
    place = dict(zip(("score", "ranking", "link", "target"), point[:4], strict=True))
    return [{"name": "axes", **place, **point.numbers(hyper)}, *(point.beside(hyper) if point.beside else [])]


def coordinates(name: str) -> str:
    """Returns the coordinates of a named loss as text, or "" where it is no point of the axes."""
    if name not in POINTS:
        return ""
    point = POINTS[name]
    target = "" if point.target == "zero" else f", target {point.target}"
    return f"{point.score}, {point.ranking}, {point.link}{target}{' and sft' if point.beside else ''}"
