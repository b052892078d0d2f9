"""Online DPO in an enumerable world, where the optimal policy is known."""

import math

import enumerable
import numpy as np
import pytest
from enumerable import distance, exact, optimum

from dpo_jax.errors import UserError
from dpo_jax.experiments import online
from dpo_jax.experiments.online import OnlineOptions

FAST = OnlineOptions(
    beta=0.5,
    learning_rate=3e-3,
    prompts=64,
    completions=8,
    max_new_tokens=enumerable.LONGEST,
    label="soft",
    batch_size=256,
)


def run(options, steps, seed, **callbacks):
    return online.train_online(enumerable.problem(steps, seed), options, **callbacks)


@pytest.mark.parametrize(
    ("beta", "label", "near"),
    [(0.5, "soft", 0.03), (1.0, "soft", 0.03), (1.0, "bradley_terry", 0.12)],
)
@pytest.mark.slow
def test_it_approaches_the_optimal_policy(beta, label, near):
    """pi* = ref exp(r / beta) / Z, which is far from the reference; sampled labels are noisier than probabilities."""
    _, reference = enumerable.world()
    start, best = exact(reference), optimum(exact(reference), beta)
    found = exact(run(FAST._replace(beta=beta, label=label), steps=20, seed=1))
    assert distance(start, best) > 0.6
    assert distance(found, best) < near


@pytest.mark.slow
def test_callbacks_see_every_round_and_a_seed_gives_the_same_policy():
    seen, metrics = [], []
    callbacks = {
        "on_step": lambda step, params: seen.append((step, exact(params))),
        "on_metrics": lambda *row: metrics.append(row),
    }
    options = FAST._replace(label="best_worst", completions=4, inner_epochs=2)
    one = run(options, steps=2, seed=5, **callbacks)
    again, other = run(options, steps=2, seed=5), run(options, steps=2, seed=6)
    np.testing.assert_array_equal(exact(one), exact(again))
    assert distance(exact(one), exact(other)) > 1e-4
    assert [step for step, _ in seen] == [step for step, _ in metrics] == [1, 2]
    np.testing.assert_array_equal(seen[1][1], exact(one))
    first = metrics[0][1]
    assert 0 < first["pairs"] <= 64  # at most one pair a prompt
    _, reference = enumerable.world()
    expected = (np.exp(exact(reference)) * enumerable.REWARD).sum(axis=1).mean()
    assert first["score"] == pytest.approx(expected, abs=0.2)
    assert first["loss"] < math.log(2)


def test_pairs_of_scores():
    scored = [("a", 1.0), ("b", 0.0), ("b", 0.0)]
    random = np.random.default_rng(0)
    assert [pair[:2] for pair in online._pairs(scored, "soft", random)] == [("a", "b"), ("a", "b")]  # noqa: SLF001
    assert online._pairs(scored, "soft", random)[0][2] == pytest.approx(1 / (1 + math.exp(-1)))  # noqa: SLF001
    assert online._pairs(scored, "best_worst", random) == [("a", "b", 1.0)]  # noqa: SLF001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": 1}, "completions must be at least 2, got 1"),
        ({"inner_epochs": 0}, "inner_epochs must be at least 1, got 0"),
        ({"label": "ranke"}, "label: unknown 'ranke'; did you mean 'ranked'"),
        ({"learning_rate": math.nan}, "not finite in round 1"),
    ],
)
def test_invalid_options_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        run(FAST._replace(**change), steps=2, seed=0)
