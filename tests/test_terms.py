"""Objectives: terms that are added up, what may be done to their log-probs, labels in between, what is reported."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_table import batch_of

from dpo_jax import losses
from dpo_jax.errors import UserError
from dpo_jax.losses import metrics as measures

RANDOM = np.random.default_rng(0)
PAIRS = batch_of(
    RANDOM.normal(size=(6, 2)) * 5 - 40,
    reference=RANDOM.normal(size=(6, 2)) * 5 - 40,
    lengths=RANDOM.integers(3, 20, (6, 2)).astype(np.float32),
    policy_shared=RANDOM.normal(size=(6, 2)) * 5 - 30,
    reference_shared=RANDOM.normal(size=(6, 2)) * 5 - 30,
    confidence=-RANDOM.uniform(size=(6, 2)),
)


def values(loss, lp=PAIRS):
    return np.asarray(losses.build(loss).values(lp), np.float64)


def test_a_list_is_the_weighted_sum_of_its_terms():
    terms = [{"name": "dpo", "beta": 0.3, "weight": 0.8}, {"name": "sft", "reduction": "mean", "weight": 2.0}]
    first = batch_of(PAIRS.policy[:, :1], lengths=PAIRS.lengths[:, :1])
    expected = 0.8 * values({"name": "dpo", "beta": 0.3}) + 2.0 * values({"name": "sft", "reduction": "mean"}, first)
    loss = losses.build(terms)
    np.testing.assert_allclose(loss.values(PAIRS), expected, rtol=1e-6)
    metrics = loss.metrics(PAIRS)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/dpo"], values({"name": "dpo", "beta": 0.3}), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/sft"], -PAIRS.policy[:, 0] / PAIRS.lengths[:, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.3 * (PAIRS.policy - PAIRS.reference)[:, 0], rtol=1e-6)
    assert (loss.responses, loss.carried, loss.uses_reference, loss.soft_labels) == (2, 2, True, False)


def test_a_reference_of_nothing():
    """Without a reference z is beta * (log pi(chosen) - log pi(rejected))."""
    z = 0.1 * np.subtract(*np.asarray(PAIRS.policy, np.float64).T)
    free = {"name": "dpo", "beta": 0.1, "reference_free": True}
    np.testing.assert_allclose(values(free), np.log1p(np.exp(-z)), rtol=1e-5)
    # The rewards that are reported still have the true reference, as the original's.
    rewards = losses.build(free).metrics(PAIRS)["rewards/chosen"]
    np.testing.assert_allclose(rewards, 0.1 * (PAIRS.policy - PAIRS.reference)[:, 0], rtol=1e-6)


def test_desensitised_to_length():
    """LD-DPO: tokens beyond the shorter response's length count alpha, for policy and reference alike."""
    whole, shared = PAIRS.policy - PAIRS.reference, PAIRS.policy_shared - PAIRS.reference_shared
    z = 0.1 * np.subtract(*np.asarray(0.25 * whole + 0.75 * shared, np.float64).T)
    found = values({"name": "dpo", "beta": 0.1, "ld_alpha": 0.25})
    np.testing.assert_allclose(found, np.log1p(np.exp(-z)), rtol=1e-5)
    np.testing.assert_array_equal(values({"name": "dpo", "ld_alpha": 1.0}), values({"name": "dpo"}))


def test_weighted_by_the_policy():
    """WPO: the loss times exp of both responses' confidence, which is a constant to the gradient."""
    loss, plain = losses.build({"name": "dpo", "wpo": True}), losses.build({"name": "dpo"})
    factor = np.exp(np.asarray(PAIRS.confidence).sum(axis=1))
    np.testing.assert_allclose(loss.values(PAIRS), factor * plain.values(PAIRS), rtol=1e-6)
    slope = jax.grad(lambda c: loss.values(PAIRS._replace(confidence=c)).sum())(PAIRS.confidence)
    np.testing.assert_array_equal(slope, 0)
    assert loss.confidence
    assert not plain.confidence
    missing = loss.values(PAIRS._replace(confidence=jnp.full((6, 2), jnp.nan)))
    assert np.isnan(missing).all()  # never taken for 1 in silence


def test_soft_labels_mix_both_orders():
    p = np.array([1.0, 0.0, 0.5, 0.7, 0.3, 0.9])
    z = 0.1 * np.subtract(*np.asarray(PAIRS.policy - PAIRS.reference, np.float64).T)
    expected = p * np.log1p(np.exp(-z)) + (1 - p) * np.log1p(np.exp(z))
    found = values({"name": "dpo", "beta": 0.1}, PAIRS._replace(preference=jnp.asarray(p, jnp.float32)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_soft_label_is_label_smoothing():
    """p and smoothing eps are the same thing: eps = 1 - p."""
    soft = PAIRS._replace(preference=jnp.full(6, 0.8))
    np.testing.assert_allclose(
        values({"name": "dpo"}, soft), values({"name": "dpo", "label_smoothing": 0.2}), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ([], "no term"),
        ([{"name": "dpo"}, {"name": "dpo", "beta": 1.0}], "dpo, dpo: give each loss, or point of the axes, once"),
        ({"name": "bco", "all_steps": "no"}, "loss bco: all_steps 'no' is neither True nor False"),
        ({"name": "ipo", "link": "savage"}, "unknown parameter 'link'; it is one of the loss axes; ipo has beta"),
        ({"name": "savage"}, "unknown loss 'savage'; it is a link of the loss axes: write link=savage, in a config"),
        ({"name": "dpo", "weight": 0.0}, "loss dpo: weight 0.0 cannot be used: set a weight above 0"),
        ({"name": "dpo", "weight": math.nan}, "weight nan"),
        ({"name": "dpo", "beta": -1.0}, "loss dpo: beta -1.0 is not a finite number above 0"),
        ({"name": "dpo", "beta": math.inf}, "beta inf is not a finite number above 0"),
        ({"name": "simpo", "gamma": math.nan}, "loss simpo: gamma nan is not a finite number"),
        ({"name": "dpo", "divergence": "alpha", "divergence_alpha": math.inf}, "divergence_alpha inf is not a finite"),
        ({"name": "sft", "reduction": "max"}, "loss sft: reduction 'max' is none of sum, mean"),
        ({"score": "odds"}, "loss axes: score 'odds' is none of .*, chi_squared; did you mean 'log_odds'?"),
        (
            [{"name": "kto"}, {"name": "dpo", "ld_alpha": 0.5}],
            "loss dpo: ld_alpha 0.5 cannot be used beside kto: its responses",
        ),
        ({"name": "sft", "reference_free": True}, "sft: reference_free True cannot be used: it has no reference"),
        ({"name": "sft", "divergence": "js"}, "divergence js cannot be used: it has no reference to diverge from"),
        ({"name": "kto", "divergence": "js"}, "divergence js cannot be used: the loss is defined for the reverse KL"),
        (
            {"name": "dpo", "divergence_alpha": 0.3},
            "divergence_alpha 0.3 cannot be used: only divergence alpha has one",
        ),
        ({"name": "dpo", "divergence": "js", "reference_free": True}, "without a reference there is nothing to"),
        ({"name": "sft", "ld_alpha": 0.5}, "ld_alpha 0.5 cannot be used: it is from 0 to 1, for losses that compare"),
        ({"name": "dpo", "ld_alpha": 1.5}, "ld_alpha 1.5 cannot be used"),
        ({"name": "sft", "wpo": True}, "wpo True cannot be used: it weights single pairs"),
    ],
)
def test_what_means_nothing_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        losses.build(loss)


def test_averages_skip_what_is_absent():
    metrics = {
        "loss": jnp.array([1.0, 2.0, 9.0, jnp.nan]),
        "rewards/chosen": jnp.array([jnp.nan, 4.0, 9.0, jnp.nan]),
        "nothing": jnp.full(4, jnp.nan),
    }
    found = losses.weighted_means(metrics, jnp.array([1.0, 3.0, 0.0, 0.0]))
    assert float(found["loss"]) == pytest.approx(1.75)
    assert float(found["rewards/chosen"]) == 4.0
    assert math.isnan(found["nothing"])


def test_a_loss_that_is_nan_is_not_skipped():
    found = losses.weighted_means({"loss": jnp.array([1.0, jnp.nan])}, jnp.ones(2))
    assert math.isnan(found["loss"])


def test_absent_responses_have_no_metrics():
    lp = batch_of(
        [[-8.0, 0.0], [0.0, -9.0], [-5.0, -6.0]],
        reference=[[-10.0, 0.0], [0.0, -8.0], [-5.0, -5.0]],
        lengths=[[4.0, 0.0], [0.0, 3.0], [2.0, 2.0]],
        present=[[True, False], [False, True], [True, True]],
    )
    found = measures.reward_metrics(lp, 0.5) | measures.likelihood_metrics(lp)
    nan = math.nan
    expected = {
        "rewards/chosen": [1.0, nan, 0.0],
        "rewards/rejected": [nan, -0.5, -0.5],
        "rewards/margins": [nan, nan, 0.5],
        "rewards/accuracies": [nan, nan, 1.0],
        "logps/chosen": [-8.0, nan, -5.0],
        "logps/rejected": [nan, -9.0, -6.0],
        "nll": [2.0, nan, 2.5],
        "logratio": [2.0, -1.0, -0.5],
        "lengths/chosen": [4.0, nan, 2.0],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name)


def test_accuracy_is_how_probably_the_label_agrees_with_the_rewards():
    """Of a label that is right with probability 0.8, a policy that follows it agrees with 0.8, one that does not with
    0.2; of one that is more probably wrong, the other way round; a tie is half right."""
    lp = batch_of([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], preference=[0.8, 0.8, 0.3, 0.9])
    found = losses.build({"name": "dpo"}).metrics(lp)["rewards/accuracies"]
    np.testing.assert_allclose(found, [0.8, 0.2, 0.3, 0.5], rtol=1e-6)


def test_length_bias_is_the_correlation_of_margin_and_length():
    rng = np.random.default_rng(1)
    longer = rng.integers(-20, 20, 40).astype(np.float32)
    margin = (0.1 * longer + rng.normal(size=40)).astype(np.float32)
    metrics = {"rewards/margins": margin, "lengths/chosen": longer + 30, "lengths/rejected": np.full(40, 30.0)}
    expected = np.corrcoef(margin, longer)[0, 1]
    bias = losses.length_bias(metrics, np.ones(40))
    assert float(bias) == pytest.approx(expected, abs=1e-5)
    # Absent comparisons, and those without one of the responses, do not count.
    more = {k: np.concatenate([v, [999.0, np.nan]]) for k, v in metrics.items()}
    weights = np.concatenate([np.ones(40), [0.0, 1.0]])
    assert float(losses.length_bias(more, weights)) == pytest.approx(expected, abs=1e-5)
    on_device = {name: jnp.asarray(value) for name, value in more.items()}  # numpy computes the others
    assert float(losses.length_bias(on_device, jnp.asarray(weights))) == pytest.approx(expected, abs=1e-5)
    assert float(losses.length_bias(metrics | {"lengths/chosen": np.full(40, 30.0)}, np.ones(40))) == 0


def test_each_term_has_a_statistic_of_its_own():
    """Of two terms, the second one's number is what its loss is shown, and moves by its own rule."""
    lp = PAIRS._replace(running=jnp.array([5.0, 0.25]))
    loss = losses.build([{"name": "dpo"}, {"name": "bco", "beta": 0.5}])
    alone = losses.build({"name": "bco", "beta": 0.5})
    single = PAIRS._replace(running=jnp.array([0.25]))
    np.testing.assert_allclose(loss.values(lp), values({"name": "dpo"}) + alone.values(single), rtol=1e-6)
    mean = 0.5 * float((PAIRS.policy - PAIRS.reference).mean())
    np.testing.assert_allclose(loss.statistics(lp), [5.0, 0.9 * 0.25 + 0.1 * mean], rtol=1e-5)
