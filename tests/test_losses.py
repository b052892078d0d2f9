"""Losses by name: hyper-parameters bound, metrics, refusals; the paper's gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from loss_table import batch_of

from dpo_jax import losses
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.losses.registry import WRITTEN
from dpo_jax.records import Logps


def logps(policy, reference=None, lengths=None):
    """One comparison."""
    given = {"reference": reference, "lengths": lengths}
    return batch_of([policy], **{k: jnp.array([v], jnp.float32) for k, v in given.items() if v is not None})


def softplus(x):
    return math.log1p(math.exp(x))


REF = (-10.0, -12.0)


def test_gradient_is_the_papers():
    """Section 4: weight beta * sigmoid(r_rejected - r_chosen), pushing the two responses apart."""
    loss, lp = losses.build({"name": "dpo", "beta": 0.1}), logps((-8.0, -12.0), REF)
    grad = jax.grad(lambda x: loss.values(lp._replace(policy=x)).sum())(lp.policy)
    weight = 0.1 / (1 + math.exp(0.1 * 2))
    np.testing.assert_allclose(grad, [[-weight, weight]], rtol=1e-6)


def test_gradient_at_score_0_8():
    loss = losses.build({"name": "dpo", "beta": 1.0})
    grad = jax.grad(lambda s: loss.values(logps((0.0, 0.0))._replace(policy=jnp.stack([s, 0.0 * s])[None])).sum())(0.8)
    assert float(grad) == pytest.approx(-0.310026, abs=1e-6)


def test_pairwise_losses_refuse_other_numbers_of_responses():
    with pytest.raises(ValueError, match="log-probs of 3 responses, where dpo takes 2"):
        losses.build({"name": "dpo"}).values(logps((-1.0, -2.0, -3.0)))


def test_reward_metrics_are_trls_with_ties_half_right():
    lp = jax.tree.map(
        lambda *x: jnp.concatenate(x) if x[0].ndim else x[0],
        logps((-8.0, -12.0), REF),
        logps((-11.0, -11.0), REF),
        logps(REF, REF),
    )
    metrics = losses.build({"name": "dpo", "beta": 0.5}).metrics(lp)
    expected = {
        "rewards/chosen": [1.0, -0.5, 0.0],
        "rewards/rejected": [0.0, 0.5, 0.0],
        "rewards/margins": [1.0, -1.0, 0.0],
        "rewards/accuracies": [1.0, 0.0, 0.5],
        "logps/chosen": [-8.0, -11.0, -10.0],
        "logps/rejected": [-12.0, -11.0, -12.0],
        "logratios/chosen": [2.0, -1.0, 0.0],
        "logratios/rejected": [0.0, 1.0, 0.0],
        "gradient_weight": [1 / (1 + math.e), 1 / (1 + 1 / math.e), 0.5],
        "logratio": [1.0, 0.0, 0.0],
        "lengths/chosen": [5.0, 5.0, 5.0],
        "lengths/rejected": [5.0, 5.0, 5.0],
        "nll": [1.6, 2.2, 2.0],
        "loss": [softplus(-1.0), softplus(1.0), math.log(2)],
    }
    assert set(metrics) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, atol=1e-6, err_msg=name)


def test_margins_within_the_rounding_of_their_log_probs_are_ties():
    """Two programs round sums of log-probs differently; a policy equal to its reference must not look biased."""
    rng = np.random.default_rng(0)
    reference = -rng.uniform(20, 400, (64, 2)).astype(np.float32)
    unit = np.spacing(np.abs(reference))
    lengths = rng.integers(5, 100, (64, 2))
    noisy = Logps.of(reference + rng.integers(-2, 3, (64, 2)) * unit, reference, lengths=lengths)
    metrics = losses.build({"name": "dpo"}).metrics(noisy)
    np.testing.assert_array_equal(metrics["rewards/margins"], 0.0)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], 0.5)
    assert losses.weighted_means(metrics, noisy.weights)["length_bias"] == 0
    # A hundredth of a nat is far beyond rounding, whatever beta.
    real = Logps.of(reference + np.array([0.01, 0.0]), reference, lengths=lengths)
    for beta in (0.01, 0.1, 10.0):
        metrics = losses.build({"name": "dpo", "beta": beta}).metrics(real)
        np.testing.assert_array_equal(metrics["rewards/accuracies"], 1.0)
        np.testing.assert_allclose(metrics["rewards/margins"], 0.01 * beta, rtol=0.01)


@pytest.mark.parametrize(
    ("loss", "rewards"),
    [  # log-probs -6 and -9 over 3 and 6 tokens: means -2 and -1.5
        ({"name": "simpo", "beta": 2.0}, (-4.0, -3.0)),
        ({"name": "orpo", "beta": 0.1}, (-0.2, -0.15)),
        ({"name": "alphapo", "beta": 2.0, "alpha": 0.25}, (8 * (1 - math.exp(0.5)), 8 * (1 - math.exp(0.375)))),
        ({"name": "cpo", "beta": 0.1}, (-0.6, -0.9)),
        ({"name": "slic"}, (-6.0, -9.0)),
        ({"name": "unlikelihood"}, (-6.0, -9.0)),
        ([{"name": "sft"}, {"name": "simpo", "beta": 1.0}], (-2.0, -1.5)),
        ([{"name": "cpo"}, {"name": "dpo", "beta": 1.0}], (2.0, -2.0)),  # rewards from a reference come first
    ],
)
def test_a_loss_without_a_reference_has_the_rewards_that_it_compares(loss, rewards):
    loss = losses.build(loss)
    lp = Logps.of(np.array([[-6.0, -9.0]]), np.array([[-8.0, -7.0]]), lengths=np.array([[3, 6]]))
    metrics = loss.metrics(lp)
    np.testing.assert_allclose((metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]), rewards, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], rewards[0] - rewards[1], rtol=1e-5)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], float(rewards[0] > rewards[1]))
    # Rounding moves log-probs of 6 and 9 nats by 2^-21 of their size; means over tokens by less.
    same = np.array([[-6.0, -6.0 * (1 + 2**-23)]], np.float32)
    tied = loss.metrics(Logps.of(same, same, lengths=np.ones((1, 2))))
    np.testing.assert_array_equal(tied["rewards/margins"], 0.0)


def test_a_loss_of_ones_own_has_the_rewards_that_it_names():
    def doubled(lp: Logps, *, scale: float = 2.0):
        return -scale * lp.policy[:, 0]

    lp = logps((-6.0, -9.0))
    assert "rewards/margins" not in losses.of(doubled, uses_reference=False).metrics(lp)
    loss = losses.of(doubled, uses_reference=False, implicit_reward=lambda lp, *, scale: scale * lp.policy)
    np.testing.assert_allclose(loss.metrics(lp)["rewards/margins"], 6.0)


def test_a_tie_of_rewards_of_a_reward_model_is_within_their_rounding():
    rewards = np.array([[3.0, 3.0 + 2**-22], [3.0, 3.001]], np.float32)
    metrics = losses.build({"name": "bradley_terry"}).metrics(Logps.of(rewards, lengths=np.ones((2, 2))))
    np.testing.assert_array_equal(metrics["rewards/accuracies"], [0.5, 0.0])


def test_likelihood_metrics():
    metrics = losses.build({"name": "sft"}).metrics(logps((-8.0,)))
    expected = {"loss": 8.0, "logps/chosen": -8.0, "nll": 1.6}
    assert {k: float(v[0]) for k, v in metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_names_elsewhere_say_what_to_write_and_that_is_a_loss(name):
    text, note = WRITTEN[name]
    for given in (name, name.replace("_", "-").upper()):
        with pytest.raises(UserError) as error:
            losses.build(given)
        assert str(error.value) == f"loss.name: unknown loss {given!r}; write loss: {text}{f', {note}' if note else ''}"
    config = parse_config(Config, yaml.safe_load(f"loss: {text}"))
    assert losses.build(config.loss).responses in (2, None)
    assert re.findall(r"data\.\w+", note) == ["data.responses"] * (losses.build(config.loss).responses is None)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown loss 'xyz'; known: alpha_dpo, alphapo, aot, "):
        losses.build({"name": "xyz"})
    with pytest.raises(UserError, match="unknown loss 'sigmoid'; here it is 'dpo'"):  # and not sigmoid_norm
        losses.build({"name": "sigmoid"})
    with pytest.raises(UserError, match=r"loss dpo: .*'betta'.*its parameters"):
        losses.build({"name": "dpo", "betta": 0.1})
