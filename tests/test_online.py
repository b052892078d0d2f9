"""Online DPO where the best policy is known."""

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


def run(options, **given):
    model, reference = enumerable.world()
    return online.train_online(
        model, reference, reference, enumerable.PROMPTS, enumerable.reward, options, eos=enumerable.EOS, **given
    )


@pytest.mark.parametrize(
    ("beta", "label", "near"),
    [pytest.param(0.5, "soft", 0.03, marks=pytest.mark.slow), (1.0, "soft", 0.03), (1.0, "drawn", 0.12)],
)
def test_it_approaches_the_optimal_policy(beta, label, near):
    """To pi* = ref exp(r / beta) / Z, from far off; labels that are drawn are noisier than probabilities."""
    _, reference = enumerable.world()
    start, best = exact(reference), optimum(exact(reference), beta)
    options = FAST._replace(beta=beta, label="bradley_terry" if label == "drawn" else label)
    found = exact(run(options, steps=20, seed=1))
    assert distance(start, best) > 0.6
    assert distance(found, best) < near


def test_rounds_are_shown_and_seeds_give_the_same_policy():
    seen, told = [], []
    given = {"each": lambda step, params: seen.append((step, exact(params))), "tell": lambda *row: told.append(row)}
    options = FAST._replace(label="best_worst", completions=4, inner_epochs=2)
    one = run(options, steps=2, seed=5, **given)
    again, other = run(options, steps=2, seed=5), run(options, steps=2, seed=6)
    np.testing.assert_array_equal(exact(one), exact(again))
    assert distance(exact(one), exact(other)) > 1e-4
    assert [step for step, _ in seen] == [step for step, _ in told] == [1, 2]
    np.testing.assert_array_equal(seen[1][1], exact(one))
    first = told[0][1]
    assert 0 < first["pairs"] <= 64  # at most one pair a prompt
    _, reference = enumerable.world()
    expected = (np.exp(exact(reference)) * enumerable.REWARD).sum(axis=1).mean()
    assert first["score"] == pytest.approx(expected, abs=0.2)
    assert first["loss"] < math.log(2)


def test_pairs_of_scores():
    scored = [("a", 1.0), ("b", 0.0), ("b", 0.0)]
    draw = np.random.default_rng(0)
    assert [pair[:2] for pair in online._pairs(scored, "soft", draw)] == [("a", "b"), ("a", "b")]  # noqa: SLF001
    assert online._pairs(scored, "soft", draw)[0][2] == pytest.approx(1 / (1 + math.exp(-1)))  # noqa: SLF001
    assert online._pairs(scored, "best_worst", draw) == [("a", "b", 1.0)]  # noqa: SLF001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": 1}, "completions are at least 2"),
        ({"label": "ranke"}, "label: unknown 'ranke'; did you mean 'ranked'"),
        ({"learning_rate": math.nan}, "not finite in round 1"),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(UserError, match=message):
        run(FAST._replace(**change), steps=2, seed=0)
