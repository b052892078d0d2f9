"""The coordinates of the named losses that are points of the axes, alone or beside supervised fine-tuning."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.losses.registry import find_entry
from dpo_jax.named import options_of, with_defaults

Hyper = dict[str, Any]  # hyper-parameters of a named loss, all of them


class LossPoint(NamedTuple):
    """The coordinates of a named loss.

    Attributes:
      score, ranking, link, target: options of `axes`.
      options: hyper-parameters -> the other options of `axes`, a target that depends on them, and `weight`.
      beside: hyper-parameters -> further terms.
      outside: hyper-parameters -> which of them is no point of the axes, and the fix; "" if all are.
      within: where alone the loss is the point; "" everywhere.
    """

    score: str
    ranking: str
    link: str
    target: str = "zero"
    options: Callable[[Hyper], Hyper] = dict
    beside: Callable[[Hyper], list[dict[str, Any]]] | None = None
    outside: Callable[[Hyper], str] = lambda h: ""
    within: str = ""


def _only(*names: str, **values: float) -> Callable[[Hyper], Hyper]:
    """Returns the options of a point: some of a loss's own, and constants."""
    return lambda h: {name: h[name] for name in names} | values


def _half_inverse(h: Hyper) -> Hyper:
    return {"beta": 2 * h["beta"], "weight": (2 * h["beta"]) ** -2}  # (x - 1 / 2 beta)^2 is this (1 - 2 beta x)^2


def _less_one(h: Hyper) -> Hyper:
    return {"beta": 1.0, "scale": h["delta"] - 1}  # the hinge asks for a margin of 1 by itself


def _as_weight(h: Hyper) -> Hyper:
    return {"beta": 1.0, "weight": h["beta"]}


def _scaled(name: str) -> Callable[[Hyper], Hyper]:
    """Returns the options of a point whose scale has another name."""
    return lambda h: _only(*_SMOOTH)(h) | {"scale": h[name]}


def _offset(h: Hyper) -> Hyper:
    return _scaled("alpha")(h) | {"target": {"log": "log_gap", "linear": "gap", "ratio": "log_ratio_gap"}[h["offset"]]}


def _sft(reduction: str, weight: str = "") -> Callable[[Hyper], list[dict[str, Any]]]:
    return lambda h: [{"name": "sft", "reduction": reduction, "weight": h[weight] if weight else 1.0}]


def _steps(h: Hyper) -> str:
    return "all_steps, as the running mean of the axes forgets; set all_steps: false" if h["all_steps"] else ""


def _sides(h: Hyper) -> str:
    unlike = h["desirable_weight"] != h["undesirable_weight"]
    return "two weights, as the axes have one; set undesirable_weight: desirable_weight" if unlike else ""


_SMOOTH = ("beta", "label_smoothing")
POINTS = {
    "dpo": LossPoint("log_ratio", "pair", "logistic"),
    "sigmoid_norm": LossPoint("log_ratio_mean", "pair", "logistic"),
    "ipo": LossPoint("log_ratio_mean", "pair", "squared", "zero", _half_inverse),
    "ipo_sum": LossPoint("log_ratio", "pair", "squared", "zero", _half_inverse),
    "hinge": LossPoint("log_ratio", "pair", "hinge"),
    "odpo": LossPoint("log_ratio", "pair", "logistic", "log_gap", _offset),
    "r_dpo": LossPoint("log_ratio", "pair", "logistic", "length", _scaled("alpha")),
    "hypo": LossPoint("log_prob", "pair", "logistic", "reference_positive"),
    "chi_po": LossPoint(
        "chi_squared", "pair", "logistic", "zero", _only(*_SMOOTH), within="within the clip at twice reward_range"
    ),
    "rpo_sq": LossPoint("log_ratio", "pair", "residual", "gap", lambda h: {"beta": h["beta"], "scale": h["eta"]}),
    "bco_pair": LossPoint("log_ratio", "pointwise", "logistic"),
    "sppo_hard": LossPoint("log_ratio", "pointwise", "squared", "zero", _half_inverse),
    "apo_zero": LossPoint("log_ratio", "pointwise", "sigmoid"),
    # The value of these two is the mean over the responses that are there, and that of a point twice as much.
    "apo_zero_unpaired": LossPoint(
        "log_ratio",
        "pointwise",
        "sigmoid",
        "zero",
        lambda h: {"beta": h["beta"], "weight": h["desirable_weight"] / 2},
        outside=_sides,
    ),
    "bco": LossPoint(
        "log_ratio", "pointwise", "logistic", "moving_mean", _only("beta", "decay", weight=0.5), outside=_steps
    ),
    "plackett_luce": LossPoint("log_ratio", "list", "logistic"),
    "simpo": LossPoint("log_prob_mean", "pair", "logistic", "constant", _scaled("gamma")),
    "simper": LossPoint("likelihood", "pair", "linear", "zero", _only(beta=1.0)),
    "cpo": LossPoint("log_prob", "pair", "logistic", "zero", _only(*_SMOOTH), _sft("mean", "nll_weight")),
    "slic": LossPoint("log_prob", "pair", "hinge", "constant", _less_one, _sft("sum", "nll_weight")),
    "orpo": LossPoint("log_odds", "pair", "logistic", "zero", _as_weight, _sft("mean")),
    "asft": LossPoint("log_odds", "pointwise", "logistic", "zero", _as_weight, _sft("mean")),
}


def terms_of(name: str, hyper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the terms of an objective that equals a named loss: a point of the axes, and sft beside some of them.

    Args:
      name: of the loss.
      hyper: its hyper-parameters; the others have their defaults.

    Raises:
      UserError: an unknown loss or hyper-parameter, or one that is no point of the axes.
    """
    every = with_defaults("", options_of(find_entry(name).function), hyper)
    if name not in POINTS:
        raise UserError(f"loss {name} is no point of the axes; set loss.name: {name}")
    point = POINTS[name]
    if reason := point.outside(every):
        raise UserError(f"loss {name} is no point of the axes with {reason}")
    place = dict(zip(("score", "ranking", "link", "target"), point[:4], strict=True))
    beside = point.beside(every) if point.beside else []
    return [{"name": "axes", **place, **point.options(every)}, *(term for term in beside if term["weight"])]


def coordinates(name: str, hyper: Mapping[str, Any] | None = None) -> str:
    """Returns the coordinates of a named loss as text, or why it is no point, or "" for a loss that never is one."""
    if name not in POINTS:
        return ""
    try:
        place, *beside = terms_of(name, hyper or {})
    except UserError as error:
        return str(error)
    target = "" if place["target"] == "zero" else f", target {place['target']}"
    text = f"{place['score']}, {place['ranking']}, {place['link']}{target}{' and sft' if beside else ''}"
    return f"{text}, {POINTS[name].within}" if POINTS[name].within else text


def point_text(name: str, hyper: Mapping[str, Any]) -> str:
    """Returns the terms that equal a named loss as the value of `loss` in a config, numbers to 7 digits.

    Raises:
      UserError: as `terms_of`.
    """
    terms = [_term_text(term) for term in terms_of(name, hyper)]
    return terms[0] if len(terms) == 1 else f"[{', '.join(terms)}]"


def _term_text(term: Mapping[str, Any]) -> str:
    parts = [(key, value) for key, value in term.items() if (key, value) != ("name", "axes")]
    return "{" + ", ".join(f"{key}: {_rounded(value)}" for key, value in parts) + "}"


def _rounded(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value
