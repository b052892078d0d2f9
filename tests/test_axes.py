"""Losses as axes: links, targets and rankings by hand, algebra of value and gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_table import batch_of

from dpo_jax import losses
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.losses.axes import LINKS, SCORES, TARGETS
from dpo_jax.runs.settings import call_settings
from dpo_jax.runs.sweep import sweep_configs

RANDOM = np.random.default_rng(11)
REF = RANDOM.normal(-9, 2, (6, 4)).astype(np.float32)
LP = batch_of(
    REF + RANDOM.normal(0, 0.8, (6, 4)),
    reference=REF,
    lengths=RANDOM.integers(2, 9, (6, 4)),
    scores=-np.sort(-RANDOM.uniform(0.5, 4, (6, 4))),
    running=0.3,
)
# Those that are least at a margin of their own rise beyond it, whatever is preferred.
FALLING = sorted(LINKS.keys() - {"squared", "residual"})
few = settings(max_examples=12, deadline=None)
logps = st.lists(st.floats(-30, -0.5, width=32), min_size=4, max_size=4)
links, falling = st.sampled_from(sorted(LINKS.keys() - {"residual"})), st.sampled_from(FALLING)
scores, linear = st.sampled_from(sorted(SCORES)), st.sampled_from(["log_ratio", "log_prob_mean"])


def first(lp, k):
    return jax.tree.map(lambda x: x[:, :k] if x.ndim == 2 else x, lp)


def both(loss, lp):
    """Returns values of an objective and the gradient of their sum."""
    objective = losses.build(loss)
    lp = first(lp, objective.responses or lp.policy.shape[1])
    found = jax.value_and_grad(lambda x: objective.values(lp._replace(policy=x)).sum())(np.asarray(lp.policy))
    return np.asarray(objective.values(lp)), np.asarray(found[1])


def pair_of(values, length=3.0):
    """Returns a pair of log-probs under policy and reference, of one length."""
    return batch_of([values[:2]], reference=[values[2:]], lengths=[[length, length]])


def test_the_statistic_of_a_running_mean_of_margins():
    margins = losses.build({"target": "moving_mean", "beta": 0.5, "decay": 0.8})
    ratios = np.asarray(LP.policy - LP.reference)
    expected = 0.8 * 0.3 + 0.2 * 0.5 * (ratios[:, 0] - ratios[:, 1]).mean()
    np.testing.assert_allclose(margins.statistics(first(LP, 2)), [expected], rtol=1e-5)
    z = 0.5 * (ratios[:, 0] - ratios[:, 1]) - expected
    np.testing.assert_allclose(margins.values(first(LP, 2)), np.log1p(np.exp(-z)), rtol=1e-5)
    slope = jax.grad(lambda x: margins.values(first(LP, 2)._replace(policy=x)).sum())(np.asarray(LP.policy)[:, :2])
    np.testing.assert_allclose(slope, np.outer(0.5 / (1 + np.exp(z)), [-1, 1]), rtol=1e-5)  # the mean is a constant


LINKS_BY_HAND = {
    "logistic": (math.log1p(math.exp(-2)), math.log1p(math.exp(2))),
    "squared": (1.0, 9.0),
    "residual": (4.0, 4.0),
    "hinge": (0.0, 3.0),
    "truncated": (0.0, 9.0),
    "exponential": (math.exp(-2), math.exp(2)),
    "sigmoid": (1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))),
    "savage": (1 / (1 + math.exp(2)) ** 2, 1 / (1 + math.exp(-2)) ** 2),
    "probit": (-math.log((1 + math.erf(math.sqrt(2))) / 2), -math.log((1 - math.erf(math.sqrt(2))) / 2)),
    "linear": (-2.0, 2.0),
}


def test_links_by_hand():
    """At 2 and at -2."""
    assert set(LINKS_BY_HAND) == set(LINKS)
    for link, expected in LINKS_BY_HAND.items():
        lp = batch_of([[1.0, -1.0], [-1.0, 1.0]])
        found = losses.axes(lp, link=link, beta=1.0, target="constant", scale=0.0)
        np.testing.assert_allclose(found, expected, rtol=2e-6, err_msg=link)


@pytest.mark.parametrize("u", [-11.9, -12.1, -300.0, -1e4, -3e4])
def test_probit_and_its_slope_far_below_0(u):
    """The slope is minus the density over the distribution."""
    value, slope = jax.value_and_grad(LINKS["probit"])(jnp.float32(u))
    np.testing.assert_allclose(value, -scipy.stats.norm.logcdf(u), rtol=1e-6)
    exact = -np.exp(scipy.stats.norm.logpdf(u) - scipy.stats.norm.logcdf(u))
    np.testing.assert_allclose(slope, exact, rtol=1e-5)


def test_targets_by_hand():
    """A hinge at 1 - (3 - t): of lengths 4 and 2, scores 5 and 2, and a reference that prefers the chosen one by 2."""
    lp = batch_of([[-8.0, -13.0]], reference=[[-10.0, -12.0]], lengths=[[4.0, 2.0]], scores=[[5.0, 2.0]])
    expected = {"zero": 0.0, "constant": 2.0, "gap": 6.0, "log_gap": 2 * math.log(3), "length": -4.0}
    expected |= {"log_ratio_gap": 2 * math.log(2.5), "reference": 4.0, "reference_positive": 4.0}
    assert set(expected) == set(TARGETS)
    for target, t in expected.items():
        score, t = ("log_prob", t - 2.0) if target.startswith("reference") else ("log_ratio", t)  # 5 - (t - 2 + 2)
        found = losses.axes(lp, score=score, link="linear", target=target, beta=1.0, scale=2.0)
        np.testing.assert_allclose(found, [t - 3.0], rtol=1e-6, err_msg=target)
    against = lp._replace(reference=np.array([[-12.0, -10.0]]), policy=np.array([[-10.0, -11.0]]))
    for target, t in {"reference": -2.0, "reference_positive": 0.0}.items():
        found = losses.axes(against, score="log_prob", link="linear", target=target, beta=1.0)
        np.testing.assert_allclose(found, [t - 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("score", "policy", "reference"),
    [
        ("log_prob", (-8.0, -13.0), (-10.0, -12.0)),
        ("log_prob_mean", (-2.0, -6.5), (-2.5, -6.0)),
        ("likelihood", (math.exp(-2), math.exp(-6.5)), (math.exp(-2.5), math.exp(-6))),
        ("log_odds", [-2 - math.log1p(-math.exp(-2)), -6.5 - math.log1p(-math.exp(-6.5))],
         [-2.5 - math.log1p(-math.exp(-2.5)), -6 - math.log1p(-math.exp(-6))]),
    ],
)  # fmt: skip
def test_a_target_of_the_reference_has_the_units_of_the_score(score, policy, reference):
    """beta times the policy's gap of scores less the reference's, of lengths 4 and 2; of sums that is DPO's margin."""
    lp = batch_of([[-8.0, -13.0]], reference=[[-10.0, -12.0]], lengths=[[4.0, 2.0]])
    found = losses.axes(lp, score=score, link="linear", target="reference", beta=2.0)
    expected = -2.0 * ((policy[0] - policy[1]) - (reference[0] - reference[1]))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_a_score_that_has_the_reference_takes_no_target_of_it():
    for score in ("log_ratio", "log_ratio_mean", "chi_squared"):
        with pytest.raises(UserError, match=f"target reference is in score {score} already; set target zero"):
            losses.build({"score": score, "target": "reference"})


def test_an_axis_over_a_named_loss_names_the_key_to_set():
    message = "unknown key 'loss.link'; it is an option of the loss axes; set loss.name axes"
    with pytest.raises(UserError, match=message):
        parse_config(Config, {"loss": {"name": "dpo"}}, ["--loss.link", "savage"], prog="dpo-jax train")


def test_exponential_goes_on_along_its_tangent():
    value, gradient = both({"link": "exponential", "beta": 1.0}, batch_of([[-41.0, 41.0]]))
    np.testing.assert_allclose(value, [3 * np.exp(80.0)], rtol=1e-5)  # 82 is 2 beyond 80
    np.testing.assert_allclose(gradient, [[-np.exp(80.0), np.exp(80.0)]], rtol=1e-5)


def test_two_points_are_summed():
    """Cal-DPO's shape: a pair's logistic loss, and half of the squares of both rewards less their targets."""
    first_point, second = {"link": "logistic"}, {"ranking": "pointwise", "link": "squared", "weight": 0.5}
    lp = batch_of([[2.0, -1.0], [0.5, 3.0]])
    apart = [np.asarray(losses.build(point).values(lp)) for point in (first_point, second)]
    loss = losses.build([first_point, second])
    np.testing.assert_allclose(loss.values(lp), sum(apart), rtol=1e-6)
    metrics = loss.metrics(lp)
    np.testing.assert_allclose(metrics["loss/axes.0"], apart[0], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/axes.1"], 2 * apart[1], rtol=1e-6)
    with pytest.raises(UserError, match="axes, axes: give each loss, or point of the axes, once"):
        losses.build([first_point, {"link": "logistic", "beta": 0.5}])


def test_a_pointwise_target_is_asked_of_both_responses():
    """Hinges max(0, 1 - (2 - 3/2)) of the chosen and max(0, 1 - (1 - 3/2)) of the rejected response."""
    point = {"ranking": "pointwise", "link": "hinge", "target": "constant", "beta": 1.0, "scale": 1.5}
    value, gradient = both(point, batch_of([[2.0, -1.0]]))
    np.testing.assert_allclose(value, [0.5 + 1.5])
    np.testing.assert_allclose(gradient, [[-1.0, 1.0]])


def test_all_pairs_of_a_list_are_its_pairs():
    ratios = np.asarray(LP.policy - LP.reference, np.float64)
    expected = [
        np.mean([(0.5 * (row[i] - row[j]) - 0.7) ** 2 for i in range(4) for j in range(i + 1, 4)]) for row in ratios
    ]
    point = {"ranking": "all_pairs", "link": "residual", "target": "constant", "scale": 0.7, "beta": 0.5}
    np.testing.assert_allclose(both(point, LP)[0], expected, rtol=1e-5)
    two = both(point, first(LP, 2))
    for one, other in zip(two, both(point | {"ranking": "pair"}, LP), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]
PAIR_TARGETS = {
    "gap": lambda lp, i, j: lp.scores[:, i] - lp.scores[:, j],
    "log_gap": lambda lp, i, j: np.log(lp.scores[:, i] - lp.scores[:, j]),
    "log_ratio_gap": lambda lp, i, j: np.log(lp.scores[:, i] / lp.scores[:, j]),
    "length": lambda lp, i, j: lp.lengths[:, j] - lp.lengths[:, i],
    "reference": lambda lp, i, j: 0.5 * (lp.reference[:, i] - lp.reference[:, j]),
    "reference_positive": lambda lp, i, j: np.maximum(0.5 * (lp.reference[:, i] - lp.reference[:, j]), 0),
}


@pytest.mark.parametrize("target", PAIR_TARGETS)
def test_each_pair_of_a_list_has_its_own_target(target):
    """Residuals (z_i - z_j - 0.7 t_ij)^2, and their gradient."""
    score = "log_prob" if target.startswith("reference") else "log_ratio"
    z = 0.5 * np.asarray(LP.policy - (0 if score == "log_prob" else LP.reference), np.float64)
    value, gradient = np.zeros(6), np.zeros((6, 4))
    for i, j in PAIRS:
        left = z[:, i] - z[:, j] - 0.7 * PAIR_TARGETS[target](LP, i, j)
        value += left**2 / 6
        gradient[:, i] += left / 6
        gradient[:, j] -= left / 6
    point = {"score": score, "ranking": "all_pairs", "link": "residual", "target": target, "scale": 0.7, "beta": 0.5}
    for one, other in zip(both(point, LP), (value, gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["gap", "log_gap", "log_ratio_gap"])
def test_pairs_of_equal_scores_have_no_part_in_a_list_of_gaps(target):
    """Of scores 3, 2, 2 and 1 five pairs count, and no list whose first is not above its last."""
    lp = LP._replace(scores=np.tile(np.float32([3, 2, 2, 1]), (6, 1)))
    lp.scores[4:] = lp.scores[4:, ::-1]
    value, gradient = both({"ranking": "all_pairs", "link": "linear", "target": target, "beta": 0.5}, lp)
    assert np.isnan(value).tolist() == [False] * 4 + [True] * 2
    kept = lp._replace(scores=lp.scores[:4])
    z = 0.5 * np.asarray(lp.policy - lp.reference, np.float64)[:4]
    expected = sum(PAIR_TARGETS[target](kept, i, j) - z[:, i] + z[:, j] for i, j in PAIRS if (i, j) != (1, 2)) / 5
    np.testing.assert_allclose(value[:4], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient[:4], np.tile([-0.3, 0.0, 0.0, 0.3], (4, 1)), atol=1e-6)
    absent = lp._replace(weights=np.float32([1, 1, 1, 1, 0, 0]))
    assert np.isfinite(both({"ranking": "all_pairs", "target": target}, absent)[0]).all()


def test_single_responses_have_the_mean_of_their_pairs():
    """Values and gradients of pairs, and of their responses one by one: f(z - t) of wanted, f(-z - t) of unwanted."""
    pairs = first(LP, 2)
    single = jax.tree.map(lambda x: np.concatenate([x, x]) if x.ndim else x, pairs)
    alone = single._replace(present=np.repeat(np.eye(2, dtype=bool), 6, axis=0))
    point = {"ranking": "pointwise", "link": "squared", "beta": 0.5, "label_smoothing": 0.1}
    for more in ({}, {"target": "constant", "scale": 0.3}, {"target": "moving_mean"}, {"score": "log_odds"}):
        together, apart = both(point | more, pairs), both(point | more, alone)
        np.testing.assert_allclose(apart[0].mean(), together[0].mean(), rtol=1e-5)
        np.testing.assert_allclose(apart[1][:6, 0] / 2, together[1][:, 0], rtol=1e-5)
        np.testing.assert_allclose(apart[1][6:, 1] / 2, together[1][:, 1], rtol=1e-5)
        assert not apart[1][:6, 1].any()
        assert not apart[1][6:, 0].any()
    z = 0.5 * np.asarray(pairs.policy - pairs.reference)[:, 1]
    expected = 2 * (0.9 * (1 + z) ** 2 + 0.1 * (1 - z) ** 2)
    np.testing.assert_allclose(both(point, alone)[0][6:], expected, rtol=1e-5)


def test_points_of_single_responses_take_soft_labels_and_a_lighter_rejected_response():
    """A wanted response that is right with 3/4; an unwanted one whose log-ratio counts half."""
    one = batch_of([[2.0, 0.0]], present=[[True, False]], preference=[0.75])
    value = both({"ranking": "pointwise", "beta": 1.0}, one)[0]
    np.testing.assert_allclose(
        value, [2 * (0.75 * math.log1p(math.exp(-2)) + 0.25 * math.log1p(math.exp(2)))], rtol=1e-6
    )
    other = batch_of([[0.0, 2.0]], present=[[False, True]])
    value = both({"ranking": "pointwise", "beta": 1.0, "rejected_weight": 0.5}, other)[0]
    np.testing.assert_allclose(value, [2 * math.log1p(math.exp(1))], rtol=1e-6)


def test_a_point_needs_what_its_coordinates_need():
    needs = {
        "uses_reference": [{"score": "log_ratio"}, {"score": "log_prob", "target": "reference"}],
        "scores": [{"target": "gap"}, {"target": "log_ratio_gap"}],
        "whole_batch": [{"target": "moving_mean"}],
        "unpaired": [{"ranking": "pointwise"}, {"ranking": "pointwise", "target": "moving_mean"}],
    }
    for field, points in needs.items():
        assert all(getattr(losses.build(point), field) for point in points)
        assert not getattr(losses.build({"score": "log_prob"}), field)
    assert losses.build({"ranking": "list"}).responses is None
    assert not losses.build({"target": "gap"}).soft_labels
    metrics = losses.build({"score": "log_prob_mean", "beta": 2.0}).metrics(first(LP, 2))
    means = np.asarray(LP.policy / LP.lengths)[:, :2]
    np.testing.assert_allclose(metrics["rewards/margins"], 2 * (means[:, 0] - means[:, 1]), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"ranking": "list", "link": "hinge"}, "loss axes: ranking list takes link logistic, target zero and no"),
        ({"ranking": "list", "label_smoothing": 0.1}, "ranking list takes link logistic"),
        (
            {"ranking": "all_pairs", "target": "moving_mean"},
            "ranking all_pairs takes no target moving_mean, as margins",
        ),
        ({"ranking": "pointwise", "target": "length"}, "zero, constant or moving_mean; length is of two responses"),
        ({"link": "residual"}, "loss axes: link residual is least where nothing is preferred; set a target"),
        ({"link": "square"}, "loss axes: link 'square' is none of logistic"),
        ({"label_smoothing": 0.5, "link": "hinge"}, "at least 0 and below 0.5"),
        ({"score": "log_prob", "divergence": "js"}, "it has no reference to diverge from"),
        ({"score": "log_prob", "target": "reference", "divergence": "js"}, "defined for the reverse KL only"),
        ({"beta": 0.1}, "has no name"),
    ],
)
def test_coordinates_that_do_not_go_together_are_refused(loss, message):
    with pytest.raises(UserError, match=message):
        losses.build(loss)


def test_a_config_with_an_axis_needs_no_name(tmp_path):
    (tmp_path / "a.yaml").write_text("loss: {link: squared, target: constant}\n")
    found = parse_config(Config, str(tmp_path / "a.yaml"), ["--loss.scale", "2"]).loss
    assert (found["name"], found["link"], found["target"], found["scale"]) == ("axes", "squared", "constant", 2.0)
    assert parse_config(Config, None, ["--loss.ranking", "pointwise"]).loss["name"] == "axes"
    mixed = parse_config(Config, {"loss": [{"link": "hinge"}, {"name": "sft"}]}).loss
    assert [term["name"] for term in mixed] == ["axes", "sft"]
    config, _ = call_settings({"loss": {"name": "dpo"}}, None, None, {"link": "savage"}, None, {"run": "runs/x"})
    assert (config.loss["name"], config.loss["link"]) == ("axes", "savage")
    (tmp_path / "b.yaml").write_text("loss: {name: dpo}\n")
    with pytest.raises(UserError, match=r"unknown key 'loss.link'"):
        parse_config(Config, str(tmp_path / "b.yaml"), ["--loss.link", "squared"])


def test_a_sweep_runs_over_axes():
    over = {"loss.score": ["log_ratio", "log_prob_mean"], "loss.link": ["logistic", "squared"]}
    source = {"data": {"name": "synthetic"}, "model": {"config": "synthetic", "tokenizer": "synthetic"}}
    found = [(one.loss["name"], one.loss["score"], one.loss["link"]) for one in sweep_configs(source, "own", over)]
    assert found == [("axes", score, link) for score in over["loss.score"] for link in over["loss.link"]]


# Algebra. A link that falls pushes the chosen response up and the rejected one down, whatever the score.


@few
@given(values=logps, score=scores, link=falling, ranking=st.sampled_from(["pair", "pointwise"]))
def test_a_falling_link_pushes_chosen_up_and_rejected_down(values, score, link, ranking):
    _, gradient = both({"score": score, "link": link, "ranking": ranking, "beta": 0.3}, pair_of(values))
    assert gradient[0, 0] <= 0 <= gradient[0, 1]


@few
@given(values=logps, shift=st.floats(-5, 5, width=32), link=links, score=linear)
def test_a_shift_of_both_scores_changes_no_comparison_of_them(values, shift, link, score):
    """Any function of the prompt may be added to the rewards: only their differences are seen by pairs and lists."""
    lp = pair_of(values)
    moved = lp._replace(policy=lp.policy + np.float32(shift))
    for ranking in ("pair", "all_pairs") + ("list",) * (link == "logistic"):
        point = {"score": score, "link": link, "ranking": ranking, "beta": 0.3}
        for one, other in zip(both(point, lp), both(point, moved), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_a_shift_of_both_scores_changes_points():
    lp = pair_of([-5.0, -6.0, -5.5, -5.5])
    point = {"ranking": "pointwise", "beta": 0.3}
    moved = both(point, lp._replace(policy=lp.policy + 3.0))[0]
    assert abs(moved - both(point, lp)[0]).max() > 0.05


@few
@given(values=logps, link=links, score=st.sampled_from(["log_ratio", "log_prob", "log_prob_mean", "log_ratio_mean"]))
def test_at_small_beta_a_loss_is_its_tangent(values, link, score):
    """f(u) -> f(0), and the gradient -> beta f'(0) of the score's: the same push for every pair."""
    beta, lp = 1e-4, pair_of(values)
    value, gradient = both({"score": score, "link": link, "beta": beta}, lp)
    at_zero = {"logistic": math.log(2), "sigmoid": 0.5, "savage": 0.25, "probit": math.log(2)}
    slope = {"logistic": -0.5, "sigmoid": -0.25, "savage": -0.25, "truncated": -2.0, "squared": -2.0}
    slope |= {"probit": -math.sqrt(2 / math.pi)}
    np.testing.assert_allclose(value, at_zero.get(link, 0.0 if link == "linear" else 1.0), atol=0.02)
    expected = beta * slope.get(link, -1.0) / (3.0 if score.endswith("mean") else 1.0)
    np.testing.assert_allclose(gradient, [[expected, -expected]], rtol=0.02, atol=0.015 * beta)


@few
@given(values=logps, score=linear)
def test_at_large_beta_a_logistic_loss_is_the_size_of_mistakes(values, score):
    """loss / beta -> max(0, -margin), the perceptron's; where responses are equal it stays log 2 / beta."""
    value, _ = both({"score": score, "beta": 1e4}, pair_of(values))
    z = np.subtract(*values[:2]) - np.subtract(*values[2:]) if score == "log_ratio" else np.subtract(*values[:2]) / 3
    np.testing.assert_allclose(value / 1e4, max(0.0, -z), rtol=1e-3, atol=1e-3)


@few
@given(values=logps, link=links)
def test_smoothing_of_one_half_knows_no_order(values, link):
    """(f(u) + f(-u)) / 2 is the same whichever is chosen."""
    lp = pair_of(values)
    point = {"link": link, "label_smoothing": 0.5 - 1e-6, "beta": 0.1}
    swapped = lp._replace(policy=lp.policy[:, ::-1], reference=lp.reference[:, ::-1])
    one, other = both(point, lp), both(point, swapped)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one[1], other[1][:, ::-1], rtol=1e-3, atol=1e-3)


@few
@given(values=logps, link=links, p=st.floats(0, 1, width=32), ranking=st.sampled_from(["pair", "pointwise"]))
def test_a_soft_label_is_a_mixture_of_both_orders(values, link, p, ranking):
    lp, point = pair_of(values), {"link": link, "ranking": ranking, "beta": 0.1, "target": "constant", "scale": 0.2}
    swapped = lp._replace(policy=lp.policy[:, ::-1], reference=lp.reference[:, ::-1])
    found = both(point, lp._replace(preference=np.float32([p])))
    right, wrong = both(point, lp), both(point, swapped)
    np.testing.assert_allclose(found[0], p * right[0] + (1 - p) * wrong[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], p * right[1] + (1 - p) * wrong[1][:, ::-1], rtol=1e-4, atol=1e-5)


@few
@given(values=logps, p=st.floats(0.51, 0.99), link=links)
def test_a_soft_label_is_label_smoothing_where_no_margin_is_asked_for(values, p, link):
    soft = both({"link": link, "beta": 0.1}, pair_of(values)._replace(preference=np.float32([p])))
    smoothed = both({"link": link, "beta": 0.1, "label_smoothing": 1 - p}, pair_of(values))
    for one, other in zip(soft, smoothed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
