"""Named losses as points of the axes: equal in value and gradient with every option, and as text for a config."""

from typing import get_args

import numpy as np
import pytest
import yaml
from test_axes import LP, both, first

from dpo_jax import losses
from dpo_jax.errors import UserError
from dpo_jax.losses import REGISTRY
from dpo_jax.losses.points import POINTS, coordinates, point_text, terms_of
from dpo_jax.named import options_of

NUMBERS = {"beta": 0.37, "label_smoothing": 0.2, "decay": 0.7, "reward_range": 4.0, "undesirable_weight": 2.0}
IPO = "score: log_ratio_mean, ranking: pair, link: squared, target: zero"
OUTSIDE = {("bco", "all_steps", True), ("apo_zero_unpaired", "desirable_weight", 0.6)}
OUTSIDE |= {("apo_zero_unpaired", "undesirable_weight", 2.0)}


def choices(option):
    """Returns values of an option: both, all texts, or the default and another number."""
    if option.kind is bool:
        return (False, True)
    return get_args(option.kind) or (option.default, NUMBERS.get(option.name, 0.6))


OPTIONS = [
    (name, o.name, value) for name in POINTS for o in options_of(REGISTRY[name].function) for value in choices(o)
]


@pytest.mark.parametrize("name", POINTS)
def test_a_named_loss_is_its_point_with_every_option(name):
    # The clip of chi_po is at twice its reward_range.
    lp = LP._replace(policy=LP.reference + 0.3 * (LP.policy - LP.reference)) if name == "chi_po" else LP
    for _, key, value in [one for one in OPTIONS if one[0] == name] or [(name, "", None)]:
        hyper = {key: value} if key else {}
        if (name, key, value) in OUTSIDE:
            with pytest.raises(UserError, match=f"loss {name} is no point of the axes with"):
                terms_of(name, hyper)
            continue
        named, point = {"name": name, **hyper}, terms_of(name, hyper)
        for one, other in zip(both(named, lp), both(point, lp), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6, err_msg=f"{key} {value}")
        named, point = losses.build(named), losses.build(point)
        for field in ("responses", "uses_reference", "whole_batch", "scores"):
            assert getattr(named, field) == getattr(point, field), field
        assert point.unpaired >= named.unpaired
        assert named.carried == point.carried or POINTS[name].beside


def test_single_responses_have_the_same_value_in_a_loss_and_its_point():
    alone = first(LP, 2)._replace(present=np.array([[True, False], [False, True]] * 3))
    for name, hyper in (
        ("bco", {"beta": 0.5}),
        ("apo_zero_unpaired", {"desirable_weight": 3, "undesirable_weight": 3}),
    ):
        for one, other in zip(both({"name": name, **hyper}, alone), both(terms_of(name, hyper), alone), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_a_point_has_the_statistic_of_its_loss():
    point = losses.build(terms_of("bco", {"beta": 0.5, "decay": 0.8}))
    named = losses.build({"name": "bco", "beta": 0.5, "decay": 0.8})
    np.testing.assert_allclose(point.statistics(first(LP, 2)), named.statistics(first(LP, 2)), rtol=1e-6)


def test_chi_po_is_its_point_within_its_clip_alone():
    beyond = {"name": "chi_po", "beta": 0.37, "reward_range": 0.01}
    assert abs(both(beyond, LP)[0] - both(terms_of("chi_po", {"beta": 0.37}), LP)[0]).max() > 0.01
    assert coordinates("chi_po") == "chi_squared, pair, logistic, within the clip at twice reward_range"


@pytest.mark.parametrize(
    ("name", "hyper", "text"),
    [
        # (x - 2.5)^2 = 6.25 (1 - 0.4 x)^2
        ("ipo", {"beta": 0.2}, f"{IPO}, beta: 0.4, weight: 6.25"),
        ("ipo", {}, f"{IPO}, beta: 0.2, weight: 25.0"),
        (
            "odpo",
            {"offset": "ratio", "alpha": "0.5"},
            "score: log_ratio, ranking: pair, link: logistic, target: log_ratio_gap, beta: 0.1, label_smoothing: 0.0, "
            "scale: 0.5",
        ),
        ("simper", {}, "score: likelihood, ranking: pair, link: linear, target: zero, beta: 1.0"),
    ],
)  # fmt: skip
def test_a_point_is_a_text_for_a_config(name, hyper, text):
    assert point_text(name, hyper) == f"{{{text}}}"


@pytest.mark.parametrize("name", POINTS)
def test_the_text_of_a_point_is_the_loss(name):
    """As YAML reads it."""
    lp = first(LP, losses.build(name).responses or 4)
    read = losses.build(yaml.safe_load(point_text(name, {})))
    np.testing.assert_allclose(read.values(lp), losses.build(name).values(lp), rtol=2e-5, atol=2e-6)


def test_coordinates_are_texts():
    assert coordinates("dpo") == "log_ratio, pair, logistic"
    assert coordinates("slic") == "log_prob, pair, hinge, target constant and sft"
    assert coordinates("slic", {"nll_weight": 0.0}) == "log_prob, pair, hinge, target constant"
    assert coordinates("odpo", {"offset": "linear"}) == "log_ratio, pair, logistic, target gap"
    assert coordinates("kto") == ""
    assert coordinates("bco", {"all_steps": True}) == (
        "loss bco is no point of the axes with all_steps, as the running mean of the axes forgets; set all_steps: false"
    )


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("kto", {}, "loss kto is no point of the axes; set loss.name: kto"),
        ("dop", {}, "unknown loss 'dop'"),
        ("dpo", {"bta": 1.0}, "unknown key 'bta'; did you mean 'beta'"),
    ],
)
def test_what_is_no_point_is_refused(name, hyper, message):
    with pytest.raises(UserError, match=message):
        terms_of(name, hyper)
