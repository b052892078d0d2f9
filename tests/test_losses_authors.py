"""Losses against the formulas of their papers and authors' code, derived again in float64 numpy: values, gradients.

A formula takes plain arrays: log-probs p and ref [B, P], lengths n, scores s. Its gradient is a central difference.
"""

import functools

import jax
import numpy as np
import pytest
from loss_table import batch_of

from dpo_jax import losses
from dpo_jax.errors import UserError
from dpo_jax.losses import REGISTRY

RANDOM = np.random.default_rng(7)
REF = RANDOM.normal(-6, 1.5, (5, 3))
P = REF + RANDOM.normal(0, 1.5, (5, 3))
N = RANDOM.integers(2, 7, (5, 3)).astype(float)
S = np.sort(RANDOM.uniform(0.5, 4, (5, 3)))[:, ::-1]


def sig(x):
    return 1 / (1 + np.exp(-x))


def bernoulli_kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def gap(s):
    return s[:, 0] - s[:, 1]


def rpo(distance):
    """NeMo-Aligner's three: distances of the margin beta * delta from eta * (gap of the rewards)."""
    return lambda p, ref, n, s: distance(0.3 * gap(p - ref), 0.7 * gap(s))


def chi_po(p, ref, n, s):
    ratio = np.exp(p - ref)
    link = ratio + np.log(ratio)
    return -np.log(sig(np.clip(0.3 * gap(link), -1, 1)))


def hypo(p, ref, n, s):
    return -np.log(sig(0.3 * (gap(p) - np.maximum(0, gap(ref)))))


def exo_rw(p, ref, n, s):
    """KL of the policy's self-normalized weights from those of the rewards."""
    q, labels = softmax(0.3 * (p - ref)), softmax(s / 2)
    return (q * np.log(q / labels)).sum(1)


def nca(p, ref, n, s):
    """The authors' mean over the K responses, and sum by soft labels."""
    rewards = 0.3 * (p - ref)
    return -np.log(sig(-rewards)).mean(1) - (softmax(s / 2) * np.log(sig(rewards))).sum(1)


def simper(p, ref, n, s):
    perplexity = np.exp(-p / n)
    return -1 / perplexity[:, 0] + 1 / perplexity[:, 1]


def asft(p, ref, n, s):
    """The likelihood of the chosen response, and beta times two cross-entropies of sigmoids of log odds."""
    mean = np.exp(p / n)
    odds = mean / (1 - mean)
    return -np.log(mean[:, 0]) - 0.3 * (np.log(sig(np.log(odds[:, 0]))) + np.log(sig(-np.log(odds[:, 1]))))


def tpo(p, ref, n, s):
    return -np.log(sig(0.3 * (p[:, 1] - p[:, 2]))) - 0.5 * p[:, 0] / n[:, 0]


def tpo_l(p, ref, n, s):
    means = p / n
    return -np.log(sig(0.3 * (means[:, 1] - means[:, 2]) - 0.2)) - 0.5 * means[:, 0]


def odpo_ratio(p, ref, n, s):
    return -np.log(sig(0.3 * gap(p - ref) - 0.5 * np.log(s[:, 0] / s[:, 1])))


def dpo_shift(p, ref, n, s):
    logratio = p - ref
    return -np.log(sig(0.3 * logratio[:, 0] - 0.8 * 0.3 * logratio[:, 1]))


def bdpo(p, ref, n, s):
    """The rejected response's likelihood is that of a mixture with the reference."""
    mixture = 0.6 * np.exp(p[:, 1]) + 0.4 * np.exp(ref[:, 1])
    return -np.log(sig(0.3 * (p[:, 0] - ref[:, 0] - np.log(mixture / np.exp(ref[:, 1])))))


def cal_dpo(p, ref, n, s):
    """The authors': the contrast without beta, and half the squares of the calibration."""
    c, r = (p - ref)[:, :2].T
    return -np.log(sig(c - r)) + 0.5 * ((c - 1 / (2 * 0.3)) ** 2 + (r + 1 / (2 * 0.3)) ** 2)


def rebel(p, ref, n, s):
    return (gap(p - ref) / 2.5 - gap(s)) ** 2


FORMULAS = [
    ({"name": "rpo_sq", "beta": 0.3, "eta": 0.7}, rpo(lambda z, d: (z - d) ** 2)),
    ({"name": "rpo_bwd", "beta": 0.3, "eta": 0.7}, rpo(lambda z, d: bernoulli_kl(sig(d), sig(z)))),
    ({"name": "rpo_fwd", "beta": 0.3, "eta": 0.7}, rpo(lambda z, d: bernoulli_kl(sig(z), sig(d)))),
    ({"name": "rpo_sq", "beta": 0.4, "eta": 1.0}, rebel),
    ({"name": "chi_po", "beta": 0.3, "reward_range": 0.5}, chi_po),
    ({"name": "hypo", "beta": 0.3}, hypo),
    ({"name": "exo_rw", "beta": 0.3, "temperature": 2.0}, exo_rw),
    ({"name": "nca", "beta": 0.3, "temperature": 2.0}, nca),
    ({"name": "simper"}, simper),
    ({"name": "asft", "beta": 0.3}, asft),
    ({"name": "tpo", "beta": 0.3, "nll_weight": 0.5}, tpo),
    ({"name": "tpo_l", "beta": 0.3, "gamma": 0.2, "nll_weight": 0.5}, tpo_l),
    ({"name": "odpo", "beta": 0.3, "alpha": 0.5, "offset": "ratio"}, odpo_ratio),
    ({"name": "dpo", "beta": 0.3, "rejected_weight": 0.8}, dpo_shift),
    ({"name": "dpo", "beta": 0.3, "rejected_mixture": 0.6}, bdpo),
    ([{"name": "dpo", "beta": 1.0}, {"name": "sppo_hard", "beta": 0.3, "weight": 0.5}], cal_dpo),
]


def measured(loss, **fields):
    """Returns values of an objective and the gradient of their sum, as it takes its responses."""
    objective = losses.build(loss)
    k = objective.responses or 3
    lp = batch_of(P[:, :k], reference=REF[:, :k], lengths=N[:, :k], scores=S[:, :k], **fields)
    gradient = jax.grad(lambda x: objective.values(lp._replace(policy=x)).sum())(lp.policy)
    return np.asarray(objective.values(lp)), np.asarray(gradient), k


def differences(formula, k, step=1e-5):
    """Returns d sum / d p of a formula, float64[B, k]."""
    found = np.zeros((len(P), k))
    for i, j in np.ndindex(found.shape):
        moved = [P[:, :k].copy() for _ in range(2)]
        moved[0][i, j] += step
        moved[1][i, j] -= step
        up, down = (formula(p, REF[:, :k], N[:, :k], S[:, :k]).sum() for p in moved)
        found[i, j] = (up - down) / (2 * step)
    return found


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=lambda x: getattr(x, "__name__", ""))
def test_value_and_gradient_are_those_of_the_formula(loss, formula):
    value, gradient, k = measured(loss)
    np.testing.assert_allclose(value, formula(P[:, :k], REF[:, :k], N[:, :k], S[:, :k]), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, differences(formula, k), rtol=2e-4, atol=2e-6)


def test_alpha_dpo_is_the_authors_over_two_steps():
    """Running mean and deviation, 0 at first, have the step in them; the target is a constant to the gradient."""
    beta, gamma_ratio, alpha, decay = 2.0, 0.2, 0.3, 0.9
    objective = losses.build({"name": "alpha_dpo", "beta": beta, "gamma": beta * gamma_ratio, "alpha": alpha})
    assert objective.carried == 2
    mean = deviation = 0.0
    running = np.zeros(2)
    for shift in (0.0, 0.4):
        policy, ref = (P + shift * S)[:, :2] / N[:, :2], REF[:, :2] / N[:, :2]
        between = gap(policy) - gap(ref)
        mean, deviation = decay * mean + 0.1 * between.mean(), decay * deviation + 0.1 * between.std(ddof=1)
        target = gamma_ratio + alpha * (between - mean) / deviation
        z = beta * (gap(policy) - target)
        lp = batch_of((P + shift * S)[:, :2], reference=REF[:, :2], lengths=N[:, :2], running=running)
        np.testing.assert_allclose(objective.values(lp), -np.log(sig(z)), rtol=1e-4)
        slopes = jax.grad(lambda x, lp=lp: objective.values(lp._replace(policy=x)).sum())(lp.policy)
        np.testing.assert_allclose(slopes, beta * (sig(-z)[:, None] * [-1, 1]) / N[:, :2], rtol=1e-4)
        running = objective.statistics(lp)
        np.testing.assert_allclose(running, [mean, deviation], rtol=1e-4)


def test_a_policy_equal_to_its_reference_has_simpo_in_alpha_dpo():
    lp = batch_of(P[:, :2], reference=P[:, :2], lengths=N[:, :2])
    one, other = (losses.build({"name": name, "beta": 2.0, "gamma": 0.3}).values(lp) for name in ("alpha_dpo", "simpo"))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_filter_of_beta_dpo_is_the_authors_mode():
    """Of five comparisons the two furthest from the running mean are left out; beta is made of the three others."""
    beta, a, decay, running = 0.1, 0.6, 0.9, 0.4
    between = gap((P - REF)[:, :2])
    mean = decay * running + (1 - decay) * between.mean()
    kept = np.argsort(np.abs(between - mean))[:3]
    used = max(beta * (1 + a * (between[kept].mean() - mean)), 1e-3)
    expected = np.zeros(5)
    expected[kept] = -np.log(sig(used * between[kept])) * 5 / 3  # the authors' mean is over those kept
    value, gradient, _ = measured({"name": "beta_dpo", "left_out": 0.4}, running=running)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert (gradient[:, 0] != 0).nonzero()[0].tolist() == sorted(kept.tolist())
    lp = batch_of(P[:, :2], reference=REF[:, :2], running=running)
    np.testing.assert_allclose(losses.build("beta_dpo").statistics(lp), [mean], rtol=1e-5)


def test_the_shift_of_bco_over_all_steps_is_the_mean_of_every_reward():
    objective = losses.build({"name": "bco", "beta": 0.5, "all_steps": True})
    assert objective.carried == 2
    running, rewards = np.zeros(2), []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        lp = batch_of(P[rows, :2], reference=REF[rows, :2], running=running)
        rewards += [*0.5 * (P - REF)[rows, :2].ravel()]
        c, r = (0.5 * (P - REF)[rows, :2]).T
        expected = -(np.log(sig(c - np.mean(rewards))) + np.log(sig(np.mean(rewards) - r))) / 2
        np.testing.assert_allclose(objective.values(lp), expected, rtol=1e-5)
        running = objective.statistics(lp)
    np.testing.assert_allclose(running, [np.mean(rewards), 10], rtol=1e-5)


def test_terms_carry_their_own_numbers():
    """Of one, two and one number each term sees its own."""
    terms = [{"name": "dpo"}, {"name": "alpha_dpo"}, {"name": "bco", "beta": 0.5}]
    objective, running = losses.build(terms), np.array([7.0, 0.1, 0.3, 0.2], np.float32)
    lp = batch_of(P[:, :2], reference=REF[:, :2], lengths=N[:, :2], running=running)
    parts = [running[0], running[1:3], running[3]]
    alone = [losses.build(term) for term in terms]
    shown = [lp._replace(running=part) for part in parts]
    expected = sum(np.asarray(one.values(x)) for one, x in zip(alone, shown, strict=True))
    np.testing.assert_allclose(objective.values(lp), expected, rtol=1e-6)
    numbers = np.concatenate([one.statistics(x) for one, x in zip(alone, shown, strict=True)])
    np.testing.assert_allclose(objective.statistics(lp), numbers, rtol=1e-6)
    assert objective.carried == 4


def test_rpo_backward_is_dpo_with_the_scores_as_soft_labels():
    """But for the entropy of the labels: the same gradient."""
    _, gradient, _ = measured({"name": "rpo_bwd", "beta": 0.3, "eta": 0.7})
    _, other, _ = measured({"name": "dpo", "beta": 0.3}, preference=sig(0.7 * gap(S)))
    np.testing.assert_allclose(gradient, other, rtol=2e-5, atol=1e-7)


def test_chi_po_is_dpo_with_its_divergence_within_the_clip():
    """The clip at 2 R ends the gradient of a pair, in either direction."""
    near = measured({"name": "chi_po", "beta": 0.3, "reward_range": 100.0})
    divergence = measured({"name": "dpo", "beta": 0.3, "divergence": "chi2_kl"})
    np.testing.assert_allclose(near[0], divergence[0], rtol=1e-5)
    np.testing.assert_allclose(near[1], divergence[1], rtol=1e-5, atol=1e-7)
    z = 0.3 * gap(np.exp(P - REF) + P - REF)
    _, clipped, _ = measured({"name": "chi_po", "beta": 0.3, "reward_range": 0.1})
    np.testing.assert_array_equal(np.any(clipped != 0, axis=1), np.abs(z) < 0.2)


def test_a_list_of_two_is_its_pair():
    """nca at a temperature near 0 is nca_pair, and exo_rw with labels 1 - eps and eps exo_pair."""
    scores = np.tile([np.log(0.9), np.log(0.1)], (5, 1))
    lp = batch_of(P[:, :2], reference=REF[:, :2], scores=scores)
    for one, other in (
        (("nca", {"beta": 0.3, "temperature": 1e-3}), ("nca_pair", {"beta": 0.3})),
        (("exo_rw", {"beta": 0.3}), ("exo_pair", {"beta": 0.3, "label_smoothing": 0.1})),
        (("rpo_fwd", {"beta": 0.3}), ("exo_pair", {"beta": 0.3, "label_smoothing": 0.1})),
    ):
        found, expected = (REGISTRY[name].function(lp, **hyper) for name, hyper in (one, other))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", [{"rejected_weight": 0.7}, {"rejected_mixture": 0.6}])
def test_a_soft_label_takes_its_share_of_the_rejected_response(option):
    """With probability 1 - p the first response is the rejected one, and counts less."""
    p = np.array([1.0, 0.0, 0.5, 0.7, 0.3])
    swapped = batch_of(P[:, 1::-1], reference=REF[:, 1::-1], lengths=N[:, 1::-1])
    loss = losses.build({"name": "ipo", **option})
    found, _, _ = measured({"name": "ipo", **option}, preference=p)
    right, _, _ = measured({"name": "ipo", **option})
    np.testing.assert_allclose(found, p * right + (1 - p) * np.asarray(loss.values(swapped)), rtol=1e-5)


def test_the_defaults_of_the_rejected_part_change_nothing_even_if_traced():
    """A run passes every number as an argument of its compiled step; NaN is a reference that was never filled in."""
    lp = batch_of(P[:, :2], reference=REF[:, :2], lengths=N[:, :2])

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(numbers, lp, name):
        def total(x):
            values = losses.build({"name": name, **numbers}).values(lp._replace(policy=x))
            return values.sum(), values

        return jax.grad(total, has_aux=True)(lp.policy)

    ones = {"rejected_weight": 1.0, "rejected_mixture": 1.0}
    blind = lp._replace(reference=np.full((5, 2), np.nan, np.float32))
    for name, shown in (("dpo", lp), ("simpo", blind)):
        for found, expected in zip(gradient(ones, shown, name), gradient({}, shown, name), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "dpo", "rejected_weight": 0.0}, "rejected_weight 0.0 cannot be used: it is above 0 and at most 1"),
        ({"name": "kto", "rejected_weight": 0.5}, "for losses of single pairs"),
        ({"name": "plackett_luce", "rejected_mixture": 0.5}, "for losses of single pairs"),
        ({"name": "simpo", "rejected_mixture": 0.5}, "it mixes the policy with the reference"),
        ({"name": "dpo", "rejected_mixture": 0.5, "divergence": "js"}, "whose KL is the reverse one"),
        ([{"name": "tpo"}, {"name": "dpo"}], "tpo, dpo: they take different numbers of responses"),
        ([{"name": "tpo"}, {"name": "kto"}], "tpo, kto: they take different numbers of responses"),
    ],
)
def test_what_has_no_meaning_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        losses.build(loss)


def test_metrics_of_losses_without_a_reference():
    """Rewards that they compare: e^m, beta m, and of triples those of the gold and the rejected response."""
    lp = batch_of([[-6.0, -9.0, -4.0]], lengths=[[3.0, 6.0, 2.0]])
    expected = {"simper": (np.exp(-2), np.exp(-1.5)), "asft": (-0.2, -0.15), "tpo": (-0.06, -0.04), "tpo_l": (-4, -4)}
    for name, rewards in expected.items():
        loss = losses.build(name)
        shown = lp if loss.responses == 3 else jax.tree.map(lambda x: x[:, :2] if x.ndim == 2 else x, lp)
        metrics = loss.metrics(shown)
        np.testing.assert_allclose([metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]], rewards, rtol=1e-6)
