"""The minimizer of each loss against its closed form, in an enumerable world.

Two prompts; the responses are all texts of one or two letters of a two-letter alphabet. A policy is a table of logits
with exact log-probs. The loss is its expectation over all comparisons, with labels of known probability.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from loss_table import batch_of

from dpo_jax import losses

PROMPTS = 2
RESPONSES = [a for n in (1, 2) for a in itertools.product("ab", repeat=n)]
RANDOM = np.random.default_rng(3)
REWARD = RANDOM.normal(size=(PROMPTS, len(RESPONSES)))
REF = np.log(RANDOM.dirichlet(np.full(len(RESPONSES), 3.0), PROMPTS))
LENGTHS = np.array([len(r) for r in RESPONSES], np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rankings(k):
    """All ordered choices of k responses: prompts int[N], responses int[N, k], Plackett-Luce probabilities float[N]."""
    rows = list(itertools.product(range(PROMPTS), itertools.permutations(range(len(RESPONSES)), k)))
    prompts, chosen = np.array([p for p, _ in rows]), np.array([c for _, c in rows])
    worth = np.exp(REWARD[prompts[:, None], chosen])
    left = np.cumsum(worth[:, ::-1], axis=1)[:, ::-1]
    return prompts, chosen, np.prod(worth / left, axis=1)


def pairs():
    """All pairs, with the Bradley-Terry probability that the first response is better."""
    chosen = np.array(list(itertools.combinations(range(len(RESPONSES)), 2)) * PROMPTS)
    prompts = np.repeat(np.arange(PROMPTS), len(chosen) // PROMPTS)
    return prompts, chosen, sigmoid(np.subtract(*REWARD[prompts[:, None], chosen].T))


def objective(loss, prompts, chosen, **fields):
    """Returns the expected loss as a function of logits [PROMPTS, responses]."""
    at = (prompts[:, None], chosen)
    logps = batch_of(REF[at], reference=REF[at], lengths=LENGTHS[chosen], **fields)

    def value(logits):
        policy = jax.nn.log_softmax(logits)[at]
        lp = logps._replace(policy=policy, policy_shared=policy)
        return jnp.sum(loss.values(lp) * lp.weights) / jnp.sum(lp.weights)

    return value


def trained(value, steps=60):
    """Returns the log-probs of the minimizer, by damped Newton steps from the reference, to float32."""
    slope, curvature, value = jax.jit(jax.grad(value)), jax.jit(jax.hessian(value)), jax.jit(value)
    logits, damping = jnp.asarray(REF, jnp.float32), 1e-2
    for _ in range(steps):
        h = np.asarray(curvature(logits), np.float64).reshape(logits.size, logits.size)
        g = np.asarray(slope(logits), np.float64).ravel()
        scale = np.abs(np.diag(h)).max()
        new = logits - np.linalg.solve(h + damping * scale * np.eye(len(h)), g).reshape(logits.shape)
        better = float(value(new)) <= float(value(logits)) + 1e-7
        logits, damping = (new, max(damping / 4, 1e-6)) if better else (logits, damping * 8)
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def optimum(gain, reference=REF):
    """The closed form: ref * exp(gain) / Z, as log-probs."""
    logits = reference + gain
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def distance(a, b):
    """The total variation distance, the larger one of the two prompts."""
    return 0.5 * np.abs(np.exp(a) - np.exp(b)).sum(axis=1).max()


def soft(loss):
    prompts, chosen, p = pairs()
    return objective(losses.build(loss), prompts, chosen, preference=p.astype(np.float32))


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0, 4.0])
def test_dpo_reaches_the_optimal_policy(beta):
    """pi* = ref exp(r / beta) / Z (paper, eq. 4); the gradient there is 0."""
    value, best = soft({"name": "dpo", "beta": beta}), optimum(REWARD / beta)
    assert distance(trained(value), best) < 1e-3
    assert np.abs(jax.grad(value)(jnp.asarray(best, jnp.float32))).max() < 2e-6
    assert np.abs(jax.grad(value)(jnp.asarray(REF, jnp.float32))).max() > 1e-3 * min(beta, 1)


@pytest.mark.parametrize("k", [3, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 4))])
def test_plackett_luce_reaches_the_optimal_policy(k):
    prompts, chosen, weights = rankings(k)
    loss = losses.build({"name": "plackett_luce", "beta": 0.5})
    value, best = objective(loss, prompts, chosen, weights=weights.astype(np.float32)), optimum(REWARD / 0.5)
    assert distance(trained(value), best) < 1e-3
    assert np.abs(jax.grad(value)(jnp.asarray(best, jnp.float32))).max() < 2e-6


def test_length_regularised_dpo_reaches_the_optimum_of_a_reward_minus_length():
    """ref exp((r - alpha |y|) / beta) / Z: a positive alpha penalises length."""
    value = soft({"name": "r_dpo", "beta": 0.5, "alpha": 0.3})
    assert distance(trained(value), optimum((REWARD - 0.3 * LENGTHS) / 0.5)) < 1e-3


def test_without_a_reference_dpo_reaches_the_softmax_of_rewards():
    value = soft({"name": "dpo", "beta": 0.5, "reference_free": True})
    assert distance(trained(value), optimum(REWARD / 0.5, reference=0 * REF)) < 1e-3


def test_lipo_reaches_the_optimal_policy_of_its_scores():
    """All lists of 3: the minimum is where softmax(z) equals softmax(s) in each list."""
    prompts, chosen, _ = rankings(3)
    scores = REWARD[prompts[:, None], chosen]
    best_first = (np.diff(scores) < 0).all(axis=1)
    loss = losses.build({"name": "lipo", "beta": 0.5})
    value = objective(loss, prompts[best_first], chosen[best_first], scores=scores[best_first])
    assert distance(trained(value), optimum(REWARD / 0.5)) < 1e-3


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_other_divergences_reach_their_optimum(divergence):
    """beta f'(pi / ref) = r + c (f-DPO, Wang et al. 2023): differences of f' are differences of rewards."""
    loss = {"name": "dpo", "beta": 4.0, "divergence": divergence}
    loss |= {"divergence_alpha": 0.3} if divergence == "alpha" else {}
    t = np.exp(trained(soft(loss)) - REF)
    score = {"forward_kl": 1 - 1 / t, "js": np.log(2 * t / (1 + t)), "alpha": (t**-0.7 - 1) / -0.7}[divergence]
    gap = 4.0 * score - REWARD
    np.testing.assert_allclose(gap - gap[:, :1], 0, atol=5e-3)
    assert distance(np.log(t) + REF, REF) > 0.05


def test_ipo_reaches_its_own_optimum():
    """ref exp(E[p(y beats y')] / tau) / Z for a uniform y' (Azar et al. 2023, arXiv 2310.12036, eq. 7)."""
    value = soft({"name": "ipo_sum", "beta": 0.5})
    wins = sigmoid(REWARD[:, :, None] - REWARD[:, None, :]).mean(axis=2)
    assert distance(trained(value), optimum(wins / 0.5)) < 1e-3


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_robust_dpo_undoes_flipped_labels(beta):
    """With a quarter of the labels flipped, robust reaches the optimum of clean labels and dpo does not."""
    prompts, chosen, p = pairs()
    noisy = (0.75 * p + 0.25 * (1 - p)).astype(np.float32)
    robust = losses.build({"name": "robust", "beta": beta, "label_smoothing": 0.25})
    value, best = objective(robust, prompts, chosen, preference=noisy), optimum(REWARD / beta)
    assert np.abs(jax.grad(value)(jnp.asarray(best, jnp.float32))).max() < 5e-6
    assert distance(trained(value), best) < 2e-3
    plain = objective(losses.build({"name": "dpo", "beta": beta}), prompts, chosen, preference=noisy)
    assert distance(trained(plain), best) > 0.02


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_unlikelihood_and_sft_reach_their_weighted_counts(alpha):
    """sum_y a(y) log pi(y) with a = P(chosen) - alpha P(rejected) > 0 is greatest for pi proportional to a.

    The optimum does not depend on the reference.
    """
    prompts, chosen, p = pairs()
    counts = np.zeros_like(REWARD)
    for x, (first, second), q in zip(prompts, chosen, p, strict=True):
        counts[x, first] += q - alpha * (1 - q)
        counts[x, second] += (1 - q) - alpha * q
    assert (counts > 0).all()
    value = soft({"name": "unlikelihood", "alpha": alpha})
    assert distance(trained(value), np.log(counts / counts.sum(axis=1, keepdims=True))) < 1e-3


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_hinge_reaches_the_minimum_of_a_linear_program(beta):
    """The expected hinge is piecewise linear and convex in the log-ratios: for a pair with preference p it is
    p max(0, 1 - z) + (1 - p) max(0, 1 + z), z = beta times the gap. dpo's optimum has a larger value."""
    prompts, chosen, p = pairs()
    value, n = soft({"name": "hinge", "beta": beta}), len(p)
    gaps = np.zeros((n, REF.size))
    for i, (x, (first, second)) in enumerate(zip(prompts, chosen, strict=True)):
        gaps[i, x * REF.shape[1] + first], gaps[i, x * REF.shape[1] + second] = beta, -beta
    eye, none = np.eye(n), np.zeros((n, n))
    least = scipy.optimize.linprog(
        np.concatenate([np.zeros(REF.size), p, 1 - p]) / n,
        A_ub=np.block([[-gaps, -eye, none], [gaps, none, -eye]]),
        b_ub=np.full(2 * n, -1.0),
        bounds=[(None, None)] * REF.size + [(0, None)] * (2 * n),
    ).fun

    def step(t, logits):
        return logits - 4 / beta / jnp.sqrt(t + 1.0) * jax.grad(value)(logits)

    found = jax.jit(lambda logits: value(jax.lax.fori_loop(0, 40_000, step, logits)))(jnp.asarray(REF, jnp.float32))
    assert float(found) == pytest.approx(least, abs=2e-3)
    assert float(value(jnp.asarray(optimum(REWARD / beta), jnp.float32))) > least + 0.02


def scored_pairs():
    """All pairs whose first response has the higher reward, with their rewards as scores."""
    prompts, chosen, _ = pairs()
    scores = REWARD[prompts[:, None], chosen]
    order = np.argsort(-scores, axis=1)
    return prompts, np.take_along_axis(chosen, order, 1), np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("name", ["rpo_sq", "rpo_bwd", "rpo_fwd"])
def test_reward_aware_losses_reach_the_optimum_of_their_scores(name):
    """Least at z = eta (s_c - s_r) in every pair: ref exp(eta r / beta) / Z."""
    prompts, chosen, scores = scored_pairs()
    loss = losses.build({"name": name, "beta": 0.5, "eta": 0.4})
    assert distance(trained(objective(loss, prompts, chosen, scores=scores)), optimum(0.8 * REWARD)) < 1e-3


def test_exo_of_lists_reaches_the_optimum_of_its_scores():
    """The other KL of lipo has the same minimum, at a temperature: softmax(z) = softmax(s / t) in each list."""
    prompts, chosen, _ = rankings(3)
    scores = REWARD[prompts[:, None], chosen]
    best_first = (np.diff(scores) < 0).all(axis=1)
    loss = losses.build({"name": "exo_rw", "beta": 0.5, "temperature": 2.0})
    value = objective(loss, prompts[best_first], chosen[best_first], scores=scores[best_first])
    assert distance(trained(value), optimum(REWARD)) < 1e-3


def test_chi_po_reaches_its_own_optimum():
    """beta (t + log t) = r + c with t = pi / ref (Huang et al. 2024): differences of phi are differences of rewards."""
    t = np.exp(trained(soft({"name": "chi_po", "beta": 2.0})) - REF)
    gap = 2.0 * (t + np.log(t)) - REWARD
    np.testing.assert_allclose(gap - gap[:, :1], 0, atol=5e-3)


def normalised(logits_of):
    """Returns log-probs logits_of(c), with a c for each prompt at which they are normalised; they rise with c."""

    def one(x):
        c = scipy.optimize.brentq(lambda c: np.log(np.exp(logits_of(c)[x]).sum()), -40.0, 40.0, xtol=1e-12)
        return logits_of(c)[x]

    return np.stack([one(x) for x in range(PROMPTS)])


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_losses_of_means_over_tokens_reach_rewards_a_token(beta):
    """beta log pi / L = r + c without a reference, beta log(pi / ref) / L = r + c with one."""
    simpo = trained(soft({"name": "simpo", "beta": beta, "gamma": 0.0}))
    assert distance(simpo, normalised(lambda c: LENGTHS * (REWARD + c) / beta)) < 1e-3
    norm = trained(soft({"name": "sigmoid_norm", "beta": beta}))
    assert distance(norm, normalised(lambda c: REF + LENGTHS * (REWARD + c) / beta)) < 1e-3


def test_cpo_without_its_likelihood_reaches_the_softmax_of_rewards():
    value = soft({"name": "cpo", "beta": 0.5, "nll_weight": 0.0})
    assert distance(trained(value), optimum(REWARD / 0.5, reference=0 * REF)) < 1e-3


def test_sppo_reaches_win_rates_less_a_multiple_of_the_policy():
    """(c - (2 w - 1) / 2 beta)^2 summed over responses, w the win rate against uniform others, is least on normalised
    policies where c - (2 w - 1) / 2 beta = -mu pi, by Lagrange; c is log pi / ref."""
    policy = trained(soft({"name": "sppo_hard", "beta": 0.7}))
    others = len(RESPONSES) - 1
    wins = (sigmoid(REWARD[:, :, None] - REWARD[:, None, :]).sum(axis=2) - 0.5) / others
    excess = policy - REF - (2 * wins - 1) / 1.4
    mass = np.exp(policy)
    mu = -(excess * mass).sum(1, keepdims=True) / (mass**2).sum(1, keepdims=True)
    np.testing.assert_allclose(excess, -mu * mass, atol=2e-3)
    assert abs(mu).max() > 0.01


def test_hinge_stops_at_a_margin_of_one():
    """The expected hinge falls with the gap of the likelier winner until beta times the gap is 1, then rises."""
    prompts, chosen, p = (x[:1] for x in pairs())
    p = np.maximum(p, 1 - p).astype(np.float32)
    value = objective(losses.build({"name": "hinge", "beta": 0.5}), prompts, chosen, preference=p)

    def slope(gap):
        policy = REF.copy()
        policy[prompts[0], chosen[0, 0]] += REF[prompts[0], chosen[0, 1]] - REF[prompts[0], chosen[0, 0]]
        policy[prompts[0], chosen[0, 0]] += gap / 0.5 + np.subtract(*REF[prompts[0], chosen[0]])
        return float(jax.grad(value)(jnp.asarray(policy, jnp.float32))[prompts[0], chosen[0, 0]])

    assert slope(0.99) == pytest.approx(-0.5 * (2 * p[0] - 1), rel=1e-4)
    assert slope(1.01) == pytest.approx(0.5 * (1 - p[0]), rel=1e-4)
