"""More minimizers against theory, in the world of test_theory.py: links, anchors, noise contrast; limits and signs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_table import batch_of
from scipy.special import expit, logit
from test_theory import (
    LENGTHS,
    PROMPTS,
    REF,
    RESPONSES,
    REWARD,
    distance,
    normalised,
    objective,
    optimum,
    pairs,
    rankings,
    soft,
    trained,
)

from dpo_jax import losses
from dpo_jax.losses.axes import LINKS, SCORES, TARGETS

WINS = expit(REWARD[:, :, None] - REWARD[:, None, :])  # the first beats the second
FALLING = sorted(LINKS.keys() - {"squared", "residual"})
SOME = ("logistic", "savage", "exponential")


def slope_at(value, log_probs):
    return np.abs(jax.grad(value)(jnp.asarray(log_probs, jnp.float32))).max()


# Links.


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize(("link", "gain"), [("savage", 1.0), ("exponential", 2.0)])
def test_proper_links_reach_the_optimal_policy(link, gain, beta):
    """(1 - sigmoid(u))^2 is least at sigmoid(u) = p, as the logistic loss (Masnadi-Shirazi and Vasconcelos 2008), and
    e^-u at sigmoid(2 u) = p (Friedman et al. 2000, "Additive logistic regression"): half the reward."""
    value, best = soft({"name": "axes", "link": link, "beta": beta}), optimum(REWARD / (gain * beta))
    assert distance(trained(value), best) < 1e-3
    assert slope_at(value, best) < 5e-6
    assert slope_at(value, REF) > 1e-3


@pytest.mark.parametrize(("link", "eps"), [("squared", 0.0), ("squared", 0.2), ("truncated", 0.2)])
def test_the_squared_links_reach_win_rates(link, eps):
    """(1 - u)^2 is least at u = 2 p - 1. The nearest differences of numbers are those of their means over all others:
    ref exp(2 E[p] / beta) / Z, with p less its flips, (1 - 2 eps) p + eps. (max(0, 1 - u))^2 is the same where no
    margin is beyond 1."""
    wins = (1 - 2 * eps) * WINS.mean(axis=2)
    assert link == "squared" or np.abs(2 * (wins[:, :, None] - wins[:, None, :])).max() < 1
    value = soft({"name": "axes", "link": link, "beta": 0.8, "label_smoothing": eps})
    assert distance(trained(value), optimum(2 * wins / 0.8)) < 1e-3
    assert slope_at(value, optimum(2 * wins / 0.8)) < 5e-6


def test_ipo_of_means_reaches_win_rates_a_token():
    """log(pi / ref) / L = E[p] / tau + c, of ipo's sums per token; the sum's optimum is another one."""
    value, wins = soft({"name": "ipo", "beta": 2.0}), WINS.mean(axis=2)
    best = normalised(lambda c: REF + LENGTHS * (wins / 2.0 + c))
    assert distance(trained(value), best) < 1e-3
    assert slope_at(value, best) < 5e-6
    assert distance(best, optimum(wins / 2.0)) > 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alphapo_without_a_margin_reaches_bent_rewards(alpha):
    """beta (1 - e^(-alpha m)) / alpha = r + c for the mean log-prob m: m = -log(1 - alpha (r + c) / beta) / alpha."""
    value = soft({"name": "alphapo", "beta": 4.0, "gamma": 0.0, "alpha": alpha})

    def log_probs(c):
        bent = (REWARD + c) / 4.0
        return LENGTHS * (bent if alpha == 0 else -np.log(np.maximum(1 - alpha * bent, 1e-12)) / alpha)

    best = normalised(log_probs)
    assert distance(trained(value), best) < 1e-3
    assert slope_at(value, best) < 5e-6


# Anchors and contrasts.


def test_nca_of_pairs_of_the_reference_reaches_its_density_ratio():
    """A classifier of chosen responses (weight 1) beside all responses (1/2 each) is least at the ratio of their
    densities: e^z = 2 P(y is chosen), averaged over opponents y' of the reference (noise contrast; Chen et al. 2024,
    arXiv 2402.05369, section 4). At beta 1 that policy, ref 2 P(y is chosen), is normalised."""
    rows = np.array([(x, i, j) for x in range(PROMPTS) for i in range(len(RESPONSES)) for j in range(len(RESPONSES))])
    x, i, j = rows.T
    mass, p = np.exp(REF[x, i] + REF[x, j]), WINS[x, i, j]
    fields = {"weights": mass.astype(np.float32), "preference": p.astype(np.float32)}
    value = objective(losses.build({"name": "nca_pair", "beta": 1.0}), x, rows[:, 1:], **fields)
    best = REF + np.log(2 * (np.exp(REF)[:, None, :] * WINS).sum(axis=2))
    np.testing.assert_allclose(np.exp(best).sum(axis=1), 1, rtol=1e-12)
    assert distance(trained(value), best) < 1e-3
    assert slope_at(value, best) < 2e-6


def assert_excess_is_of_the_policy(policy, excess):
    """On normalised policies a sum over responses is least where its slopes are a multiple of pi (Lagrange)."""
    mass = np.exp(policy)
    mu = (excess * mass).sum(1, keepdims=True) / (mass**2).sum(1, keepdims=True)
    np.testing.assert_allclose(excess, mu * mass, atol=2e-4)
    assert np.abs(excess).max() > 0.005


def test_nca_of_lists_reaches_its_shares_less_a_multiple_of_the_policy():
    """-sum_k [s_k log sigmoid(z_k) + 1/3 log sigmoid(-z_k)] over all lists of 3: its slope is
    (E[s] + 1/3) sigmoid(z) - E[s], which is 0 at e^z = 3 E[s]; s is the softmax of scores."""
    prompts, chosen, _ = rankings(3)
    scores = REWARD[prompts[:, None], chosen]
    best_first = (np.diff(scores) < 0).all(axis=1)
    prompts, chosen, scores = prompts[best_first], chosen[best_first], scores[best_first]
    loss = losses.build({"name": "nca", "beta": 0.7, "temperature": 1.5})
    policy = trained(objective(loss, prompts, chosen, scores=scores))
    worth = np.exp(scores / 1.5)
    total, count = np.zeros_like(REWARD), np.zeros_like(REWARD)
    np.add.at(total, (prompts[:, None], chosen), worth / worth.sum(axis=1, keepdims=True))
    np.add.at(count, (prompts[:, None], chosen), 1.0)
    share = total / count
    assert_excess_is_of_the_policy(policy, (share + 1 / 3) * expit(0.7 * (policy - REF)) - share)


def test_bco_of_pairs_reaches_log_odds_of_win_rates_less_a_multiple_of_the_policy():
    """Each response is classified alone: the slope is sigmoid(z) - w, w its win rate, 0 at the log-odds of w."""
    policy = trained(soft({"name": "bco_pair", "beta": 0.7}))
    wins = (WINS.sum(axis=2) - 0.5) / (len(RESPONSES) - 1)
    assert_excess_is_of_the_policy(policy, expit(0.7 * (policy - REF)) - wins)


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0])
def test_exo_of_a_pair_reaches_its_mean_label(p):
    """The reverse KL to labels (1 - eps, eps), which are (eps, 1 - eps) with probability 1 - p, is least at their
    geometric mean: z = (2 p - 1) log((1 - eps) / eps) (Ji et al. 2024, arXiv 2402.00856, of eq. 16)."""
    loss = losses.build({"name": "exo_pair", "beta": 0.5, "label_smoothing": 0.1})
    at, chosen = np.arange(PROMPTS), np.array([[0, 1], [2, 5]])
    policy = trained(objective(loss, at, chosen, preference=np.full(2, p, np.float32)), steps=80)
    gap = np.subtract(*(policy - REF)[at[:, None], chosen].T)
    np.testing.assert_allclose(0.5 * gap, (2 * p - 1) * math.log(9), atol=5e-3)


def reward_model(rows, **options):
    """Returns the expected loss of a reward model as a function of the rewards [PROMPTS, responses]."""
    loss = losses.build({"name": "bradley_terry", **options})
    prompts, chosen, p = rows

    def value(rewards):
        lp = batch_of(np.zeros(chosen.shape), preference=p.astype(np.float32))
        return jnp.mean(loss.values(lp._replace(policy=rewards[prompts[:, None], chosen])))

    return value


def test_a_reward_model_reaches_the_reward_up_to_a_constant_of_each_prompt():
    """Maximum likelihood of Bradley-Terry (paper, eq. 2)."""
    value = reward_model(pairs())
    assert slope_at(value, REWARD) < 2e-6
    assert slope_at(value, REWARD + np.array([[3.0], [-5.0]])) < 2e-6
    assert slope_at(value, 1.1 * REWARD) > 1e-3
    assert distance(trained(value), optimum(REWARD, reference=0 * REF)) < 1e-3


def test_centered_rewards_of_a_pair_are_half_its_log_odds():
    """lambda (r_c + r_r)^2 leaves their difference as it is, and takes their sum to 0."""
    pair = np.array([0]), np.array([[0, 1]]), np.array([0.8])
    best = np.zeros_like(REF)
    best[0, :2] = np.array([0.5, -0.5]) * logit(0.8)
    assert slope_at(reward_model(pair, center=0.01), best) < 1e-6
    assert slope_at(reward_model(pair, center=0.01), best + 1.0) == pytest.approx(0.04, rel=1e-4)
    assert slope_at(reward_model(pair), best + 1.0) < 1e-6


# Limits and signs.

LIMITS = {
    "logistic": (1, lambda z: np.maximum(0, -z)),
    "hinge": (1, lambda z: np.maximum(0, -z)),
    "linear": (1, lambda z: -z),
    "squared": (2, lambda z: z**2),
    "truncated": (2, lambda z: np.maximum(0, -z) ** 2),
    "probit": (2, lambda z: np.maximum(0, -z) ** 2 / 2),
    "sigmoid": (0, lambda z: (z < 0) * 1.0),
    "savage": (0, lambda z: (z < 0) * 1.0),
}


@pytest.mark.parametrize("link", LIMITS)
def test_limits_of_links_at_large_beta(link):
    """f(beta z) / beta^k: hinge and logistic become the perceptron, sigmoid and savage count mistakes, squares stay."""
    z, (k, limit) = np.array([-9.0, -2.0, -0.5, 0.5, 3.0]), LIMITS[link]
    lp = batch_of(np.stack([z - 4, 0 * z - 4], axis=1))
    found = losses.build({"link": link, "beta": 1e3}).values(lp) / 1e3**k
    np.testing.assert_allclose(found, limit(z), rtol=5e-3, atol=2e-3)


def gradient(loss, lp):
    built = losses.build(loss)
    return np.asarray(jax.grad(lambda policy: built.values(lp._replace(policy=policy)).sum())(np.asarray(lp.policy)))


RANDOM = np.random.default_rng(7)
LISTS = batch_of(
    RANDOM.normal(-9, 2, (40, 4)), reference=RANDOM.normal(-9, 2, (40, 4)), lengths=RANDOM.integers(2, 9, (40, 4)),
    scores=-np.sort(-RANDOM.uniform(0.5, 4, (40, 4))), running=0.3,
)  # fmt: skip
PAIRS = jax.tree.map(lambda x: x[:, :2] if x.ndim == 2 else x, LISTS)


@pytest.mark.parametrize("score", SCORES)
def test_lists_push_the_best_up_and_the_last_down(score):
    points = [{"link": link} for link in (FALLING if score == "log_ratio" else SOME)]
    points += [{"target": "constant", "scale": -0.5}, {"ranking": "list"}]
    for point in points:
        g = gradient({"score": score, "ranking": "all_pairs", "beta": 0.3, **point}, LISTS)
        assert (g[:, 0] <= 0).all() and (g[:, -1] >= 0).all(), point  # noqa: PT018
        assert (g[:, 0] < 0).any() and (g[:, -1] > 0).any(), point  # noqa: PT018
        if score in ("log_ratio", "log_prob"):
            np.testing.assert_allclose(g.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("target", [*TARGETS, "moving_mean"])
def test_a_target_does_not_turn_the_push_around(target):
    """Whatever margin is asked for, also a negative one."""
    score = "log_prob" if target.startswith("reference") else "log_ratio"
    for link in SOME:
        for scale in (0.5, -0.5):
            g = gradient({"score": score, "link": link, "target": target, "scale": scale, "beta": 0.3}, PAIRS)
            assert (g[:, 0] <= 0).all(), link
            assert (g[:, 0] < 0).any(), link
            np.testing.assert_allclose(g[:, 0], -g[:, 1], rtol=1e-5, atol=1e-7)
