"""The reward that a loss fits: by hand, at exact optima of Bradley-Terry labels, and which losses fit none."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit, log_expit, logit, ndtri, wrightomega

from dpo_jax import losses
from dpo_jax.experiments.fitted import GAINS, SCORED, calibration_error
from dpo_jax.experiments.leaderboard import logps_of, table_rewards
from dpo_jax.experiments.table_world import TableWorld, make_world
from dpo_jax.losses.axes import LINKS
from dpo_jax.losses.registry import REGISTRY, Entry

WORLD = make_world(3, prompts=2, alphabet=2, longest=2)
REF, REWARD, LENGTHS = (np.asarray(x, np.float64) for x in (WORLD.reference, WORLD.reward, WORLD.lengths))
# One prompt, three responses of the lengths 1, 2 and 4 with the rewards log 1, log 2 and log 4.
REF3 = np.log([[0.5, 0.25, 0.25]])
THREE = TableWorld(
    (), REF3.astype(np.float32), np.log([[1.0, 2.0, 4.0]]).astype(np.float32),
    np.array([1, 2, 4], np.float32), REF3.astype(np.float32),
)  # fmt: skip
POLICY = np.log([[0.2, 0.2, 0.6]])


def fitted(term, policy=POLICY, world=THREE):
    term = {"name": term} if isinstance(term, str) else {"name": "axes", **term}
    return np.asarray(table_rewards(term, policy.astype(np.float32), world), np.float64)


def test_rewards_by_hand():
    ratio, length = POLICY - REF3, np.array([[1, 2, 4]])
    means = POLICY / length
    for term, expected in [
        ("dpo", 0.1 * ratio),
        ("plackett_luce", 0.1 * ratio),
        ("sigmoid_norm", 5.0 * ratio / length),
        ("chi_po", 0.1 * (ratio + np.exp(ratio) - 1)),
        ("r_dpo", 0.1 * ratio + 0.01 * length),
        ("rpo_sq", 0.1 * ratio),
        ("exo_rw", 0.1 * ratio),
        ({"name": "exo_rw", "beta": 2.0, "temperature": 3.0}, 6.0 * ratio),
        ({"name": "rpo_sq", "beta": 2.0, "eta": 4.0}, 0.5 * ratio),
        ({"name": "rpo_bwd", "beta": 2.0, "eta": 4.0}, 0.5 * ratio),
        ({"name": "simpo", "gamma": 0.0}, 2.0 * means),
        ({"name": "cpo", "nll_weight": 0.0}, 0.1 * POLICY),
        ({"name": "dpo", "reference_free": True}, 0.1 * POLICY),
        ({"name": "dpo", "divergence": "forward_kl"}, 0.1 * (1 - np.exp(-ratio))),
        ({"score": "log_prob_mean", "beta": 2.0}, 2.0 * means),
        ({"score": "likelihood", "beta": 2.0}, 2.0 * np.exp(means)),
        ({"score": "log_odds", "ranking": "all_pairs", "beta": 2.0}, 2.0 * (means - np.log1p(-np.exp(means)))),
        ({"link": "savage", "beta": 2.0}, 2.0 * ratio),
        ({"link": "exponential", "beta": 2.0}, 4.0 * ratio),
        ({"target": "length", "scale": 0.5}, 0.1 * ratio + 0.5 * length),
        ({"target": "constant", "scale": 0.0}, 0.1 * ratio),
        ({"score": "log_prob", "target": "reference", "scale": 1.0}, 0.1 * ratio),
    ]:
        np.testing.assert_allclose(fitted(term), expected, rtol=2e-5, err_msg=str(term))


def test_losses_without_a_reward_have_none():
    """The named losses that fit one, at their defaults; options and coordinates that leave none."""
    named = {name for name, entry in REGISTRY.items() if not entry.rewards}
    fit = {name for name in named if not np.isnan(fitted(name)).any()}
    assert fit == {"axes", "dpo", "sigmoid_norm", "chi_po", "r_dpo", "plackett_luce", "rpo_sq", *SCORED}
    assert all(np.isnan(fitted(name)).all() for name in named - fit)
    for term in [
        {"name": "dpo", "label_smoothing": 0.1}, {"name": "dpo", "ld_alpha": 0.5}, {"name": "cpo"}, {"name": "simpo"},
        {"name": "dpo", "rejected_weight": 0.5}, {"ranking": "pointwise"}, {"target": "constant"}, {"target": "gap"},
        {"target": "moving_mean"}, {"score": "log_prob", "target": "reference_positive"},
        {"link": "residual", "target": "length"}, *({"link": link} for link in LINKS.keys() - {*GAINS, "residual"}),
    ]:  # fmt: skip
        assert np.isnan(fitted(term)).all(), term


def test_an_own_loss_has_the_rewards_that_its_metrics_report(monkeypatch):
    def own(lp, *, beta=0.5):
        return -beta * (lp.policy[:, 0] - lp.policy[:, 1])

    monkeypatch.setitem(REGISTRY, "own", Entry(own, 2, True))
    np.testing.assert_allclose(fitted("own"), 0.5 * (POLICY - REF3), rtol=1e-5)
    monkeypatch.setitem(REGISTRY, "own", Entry(own, 2, False))
    assert np.isnan(fitted("own")).all()


def test_the_calibration_error_by_hand():
    """Pairs have the weights 1/2 1/4, 1/2 1/4 and 1/4 1/4, in both orders, and the true probabilities 2/3, 4/5, 2/3."""
    by_hand = 2 * (1 / 8 * (2 / 3 - 1 / 2) + 1 / 8 * (4 / 5 - 1 / 2) + 1 / 16 * (2 / 3 - 1 / 2))
    assert float(calibration_error(0 * THREE.reward, THREE)) == pytest.approx(by_hand, rel=1e-5)
    assert float(calibration_error(THREE.reward + 3, THREE)) == pytest.approx(0, abs=1e-6)
    two = THREE._replace(reference=np.tile(THREE.reference, (2, 1)), reward=np.tile(THREE.reward, (2, 1)))
    half = two.reward * np.array([[1.0], [0.0]], np.float32)
    assert float(calibration_error(half, two)) == pytest.approx(by_hand / 2, rel=1e-5)


# Optima.


def normalised(log_probs):
    """Returns log-probs, a rising function of rewards + c, with the c of each prompt for which they are normalised."""

    def one(x):
        c = scipy.optimize.brentq(lambda c: np.log(np.exp(log_probs(REWARD + c)[x]).sum()), -200, 200, xtol=1e-13)
        return log_probs(REWARD + c)[x]

    return np.stack([one(x) for x in range(len(REWARD))])


OPTIMA = [
    ({"name": "dpo", "beta": 0.7}, lambda r: REF + r / 0.7),
    ({"name": "dpo", "beta": 5.0}, lambda r: REF + r / 5),
    ({"name": "sigmoid_norm", "beta": 5.0}, lambda r: REF + LENGTHS * r / 5),
    ({"name": "chi_po", "beta": 2.0}, lambda r: REF + np.log(wrightomega(1 + r / 2))),  # e^x + x = 1 + r / 2
    ({"name": "r_dpo", "beta": 2.0, "alpha": 0.3}, lambda r: REF + (r - 0.3 * LENGTHS) / 2),
    ({"name": "simpo", "beta": 2.0, "gamma": 0.0}, lambda r: LENGTHS * r / 2),
    ({"name": "cpo", "beta": 2.0, "nll_weight": 0.0}, lambda r: r / 2),
    ({"name": "dpo", "beta": 2.0, "reference_free": True}, lambda r: r / 2),
    ({"score": "log_prob_mean", "beta": 3.0}, lambda r: LENGTHS * r / 3),
    ({"score": "log_odds", "beta": 3.0}, lambda r: LENGTHS * log_expit(r / 3)),
    ({"score": "log_prob", "target": "reference", "scale": 0.5, "beta": 2.0}, lambda r: REF / 2 + r / 2),
    ({"link": "savage", "beta": 2.0}, lambda r: REF + r / 2),
    ({"link": "exponential", "beta": 2.0}, lambda r: REF + r / 4),
    ({"ranking": "all_pairs", "beta": 2.0}, lambda r: REF + r / 2),
]


def expected_loss(term):
    """Returns the mean loss over all ordered pairs, with their Bradley-Terry probabilities, of log-probs [X, Y]."""
    responses = list(itertools.permutations(range(REF.shape[1]), 2))
    prompts = np.repeat(np.arange(len(REF)), len(responses))[:, None]
    ids = np.array(responses * len(REF))
    weights = expit(np.subtract(*REWARD[prompts, ids].T))
    loss = losses.build({"name": "axes", **term})

    def value(logits):
        policy = jax.nn.log_softmax(logits)
        lp = logps_of(policy, WORLD, (prompts, ids), scores=0.0 * ids, running=jnp.zeros(loss.carried))
        return jnp.mean(weights * loss.values(lp))

    return value


@pytest.mark.parametrize(("term", "log_probs"), OPTIMA, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_loss_is_calibrated_at_its_exact_optimum(term, log_probs):
    policy = normalised(log_probs)
    slope = jax.grad(expected_loss(term))
    assert np.abs(slope(jnp.asarray(policy, jnp.float32))).max() < 1e-6
    assert np.abs(slope(jnp.asarray(REF, jnp.float32))).max() > 1e-3
    assert float(calibration_error(fitted(term, policy, WORLD), WORLD)) < 1e-5
    assert float(calibration_error(fitted(term, REF, WORLD), WORLD)) > 0.1


@pytest.mark.parametrize("term", [
    {"name": "rpo_sq", "eta": 0.4}, {"name": "rpo_bwd", "eta": 0.4}, {"name": "rpo_fwd", "eta": 0.4},
    {"name": "exo_rw", "temperature": 2.5}, {"name": "lipo"},
    {"link": "residual", "target": "gap", "scale": 0.4},
])  # fmt: skip
def test_a_loss_of_scores_is_calibrated_where_it_has_fitted_them(term):
    """Its value of a pair is the least there: the entropy of the label for lipo, 0 for the others."""
    gain = 1.0 if term.get("name") == "lipo" else 0.4
    policy = normalised(lambda r: REF + gain * r / 0.3)
    term = {**term, "beta": 0.3}
    loss = losses.build({"name": "axes", **term})
    order = np.argsort(-REWARD[:1], axis=1)[:, [0, 3]]
    scores = np.take_along_axis(REWARD[:1], order, 1)

    def value(shift):
        moved = (policy + shift * np.eye(1, REF.shape[1], order[0, 0])).astype(np.float32)
        return float(loss.values(logps_of(moved, WORLD, (np.array([[0]]), order), scores=scores, running=0.0))[0])

    p = expit(-np.diff(scores)[0, 0])
    assert value(0.0) == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p) if gain == 1 else 0.0, abs=1e-5)
    assert min(value(-0.5), value(0.5)) > value(0.0) + 1e-4
    assert float(calibration_error(fitted(term, policy, WORLD), WORLD)) < 1e-5


MARGINS = {
    "logistic": logit,
    "savage": logit,
    "exponential": lambda p: logit(p) / 2,
    "squared": lambda p: 2 * p - 1,
    "truncated": lambda p: 2 * p - 1,
    "probit": ndtri,
    "hinge": lambda p: np.sign(p - 0.5),
    "sigmoid": lambda p: np.sign(p - 0.5) * math.inf,
    "linear": lambda p: np.sign(p - 0.5) * math.inf,
    "residual": lambda p: 0.0,
}


@pytest.mark.parametrize("link", LINKS)
def test_a_link_is_least_at_its_own_margin(link):
    """p f(u) + (1 - p) f(-u), on a grid: log(p / (1 - p)) over the gain of a link that fits a reward, else another."""
    u = np.linspace(-8, 8, 6401)
    f = np.asarray(LINKS[link](jnp.asarray(u, jnp.float32)), np.float64)
    for p in (0.1, 0.4, 0.7, 0.95):
        least = MARGINS[link](p)
        found = u[np.argmin(p * f + (1 - p) * f[::-1])]
        assert found == pytest.approx(np.clip(least, -8, 8), abs=0.02)
        assert (link in GAINS) == bool(np.isclose(GAINS.get(link, 1.0) * least, logit(p)))
