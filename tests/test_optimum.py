"""The optimum against sums over all responses, and the best of N against all subsets of the samples."""

import itertools
import math

import numpy as np
import pytest

from dpo_jax.experiments import optimum
from dpo_jax.experiments.optimum import Optimum, RewardLimit, reward_limit
from dpo_jax.rewards.winrate import kl_bound

RANDOM = np.random.default_rng(5)
PROMPTS, RESPONSES = 40, 60
REWARD = RANDOM.normal(size=(PROMPTS, RESPONSES)) * 1.5
REF = np.log(RANDOM.dirichlet(np.full(RESPONSES, 2.0), PROMPTS))
BETAS = (4.0, 2.0, 1.0, 0.7)


def samples(count, seed=0):
    """Rewards of `count` responses to each prompt, sampled from the reference."""
    random = np.random.default_rng(seed)
    return np.stack([r[random.choice(RESPONSES, count, p=np.exp(p))] for r, p in zip(REWARD, REF, strict=True)])


def test_two_responses_by_hand():
    """ref (1/2, 1/2), r (log 3, 0), beta 1: pi* = (3/4, 1/4), beta 1/2: (9/10, 1/10)."""
    rewards, base = np.array([[math.log(3), 0.0]]), np.log([[0.5, 0.5]])
    reward, kl, squares = optimum.tilted_weights(rewards, base, 1.0)
    assert reward[0] == pytest.approx(0.75 * math.log(3))
    assert kl[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert squares[0] == pytest.approx(0.75**2 + 0.25**2)
    reward, kl, _ = optimum.tilted_weights(rewards, base, 0.5)
    assert (reward[0], kl[0]) == pytest.approx((0.9 * math.log(3), 0.9 * math.log(1.8) + 0.1 * math.log(0.2)))


def test_no_policy_is_above_the_optimum():
    """Random policies and mixtures of them with the optimum, at their own KL."""
    curve = optimum.optimum_from_enumeration(REWARD, REF, np.geomspace(20, 0.05, 200))
    for seed in range(20):
        random = np.random.default_rng(seed)
        policy = REF + random.normal(size=REF.shape) * random.uniform(0.1, 2) + REWARD * random.uniform(0, 2)
        policy -= np.log(np.exp(policy).sum(axis=1, keepdims=True))
        reward = float((np.exp(policy) * REWARD).sum(1).mean())
        kl = float((np.exp(policy) * (policy - REF)).sum(1).mean())
        assert reward <= reward_limit(curve, kl).reward + 1e-3


def test_samples_agree_with_the_enumeration():
    exact = {o.beta: o for o in optimum.optimum_from_enumeration(REWARD, REF, BETAS)}
    found, left_out = optimum.optimum_from_samples(samples(2000), BETAS)
    assert not left_out
    assert [o.beta for o in found] == [math.inf, *BETAS]
    for o in found[1:]:
        # The prompts are the same, so only the samples of each prompt make a difference.
        assert abs(o.reward - exact[o.beta].reward) < o.reward_half
        assert abs(o.kl - exact[o.beta].kl) < o.kl_half
        assert o.reward_half == pytest.approx(exact[o.beta].reward_half, rel=0.3)
        assert o.kl_half == pytest.approx(exact[o.beta].kl_half, rel=0.5)
    assert found[0].reward == pytest.approx(exact[math.inf].reward, abs=0.03)


def test_bootstrap_intervals_cover_samples_and_prompts():
    """The interval combines the spread over 200 sets of samples of the same prompts with that over prompts."""
    estimates = [
        optimum.tilted_weights(samples(50, seed), np.full(50, -math.log(50)), 1.0)[0].mean() for seed in range(200)
    ]
    within = np.std(estimates)
    across = np.std(optimum.tilted_weights(REWARD, REF, 1.0)[0], ddof=1) / math.sqrt(PROMPTS)
    found, _ = optimum.optimum_from_samples(samples(50), [1.0])
    if len(found) == 1:  # too few effective samples
        _, found = optimum.optimum_from_samples(samples(50), [1.0])
    assert found[-1].reward_half == pytest.approx(1.96 * math.hypot(within, across), rel=0.3)


def test_optima_with_few_effective_samples_are_left_out():
    found, left_out = optimum.optimum_from_samples(samples(500), [4.0, 1.0, 0.1, 0.02])
    assert [o.beta for o in left_out] == [0.1, 0.02]
    assert [o.beta for o in found] == [math.inf, 4.0, 1.0]
    assert all(o.effective >= optimum.MIN_EFFECTIVE for o in found)
    assert all(o.effective < optimum.MIN_EFFECTIVE for o in left_out)
    few, _ = optimum.optimum_from_samples(samples(16), [4.0])
    assert [o.beta for o in few] == [math.inf]  # the mean of the reference needs no weights
    assert optimum.reward_limit(few, 1.0).reward == math.inf
    # With equal rewards every sample counts.
    same, _ = optimum.optimum_from_samples(np.ones((3, 64)), [1.0])
    assert (same[1].effective, same[1].kl, same[1].reward) == pytest.approx((64, 0, 1))


CURVE = [
    Optimum(math.inf, 1.0, 0.1, 0.0, 0.0, math.inf),
    Optimum(2.0, 3.0, 0.2, 0.5, 0.0, 99.0),
    Optimum(1.0, 4.0, 0.4, 1.5, 0.0, 50.0),
]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (-0.1, RewardLimit(1.0, 0.1, 2.0, True)),
        (0.0, RewardLimit(1.0, 0.1, 4.0, True)),
        (0.25, RewardLimit(2.0, 0.15, 4.0, True)),
        (1.0, RewardLimit(3.5, 0.3, 1.0, True)),
        (1.5, RewardLimit(4.0, 0.4, 1.0, True)),
        (3.5, RewardLimit(6.0, 0.4, 1.0, False)),
    ],
)
def test_the_limit_by_hand(kl, expected):
    found = reward_limit(CURVE, kl)
    assert found[:3] == pytest.approx(expected[:3])
    assert found.known == expected.known


def test_with_the_reference_alone_the_limit_at_any_kl_is_unknown():
    assert reward_limit(CURVE[:1], 0.0) == RewardLimit(1.0, 0.1, math.inf, True)
    assert not reward_limit(CURVE[:1], 0.5).known


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_best_of_n_is_the_mean_over_all_subsets(n):
    rewards = np.array([[3.0, -1.0, 2.0, 2.0, 0.5, 7.0], [0.0, 0.0, 1.0, 0.0, -4.0, 0.25]])
    every = [np.mean([max(choice) for choice in itertools.combinations(row, n)]) for row in rewards]
    np.testing.assert_allclose(optimum.best_of_n(rewards, n), every)
    with pytest.raises(ValueError, match="n must be between 1 and the 6 samples, got 7"):
        optimum.best_of_n(rewards, 7)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_best_of_n_is_below_the_optimum_at_its_bound(n):
    """Exact reward and KL from the distribution over all responses; the KL is at most log n - (n - 1) / n."""
    p = np.exp(REF)
    less = np.array([(p[i] * (REWARD[i] < REWARD[i][:, None])).sum(1) for i in range(PROMPTS)])
    best = (less + p) ** n - less**n
    np.testing.assert_allclose(best.sum(1), 1)
    reward, kl = (best * REWARD).sum(1), (best * np.log(best / p)).sum(1)
    assert (kl <= kl_bound(n)).all()
    found = optimum.best_of_n(samples(4000), n)
    assert found.mean() == pytest.approx(reward.mean(), abs=0.03)
    curve = optimum.optimum_from_enumeration(REWARD, REF, np.geomspace(20, 0.05, 200))
    assert reward.mean() <= reward_limit(curve, kl.mean()).reward <= reward_limit(curve, kl_bound(n)).reward
