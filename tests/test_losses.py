"""Losses by closed forms, the paper's worked values and its gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses.registry import REGISTRY, register
from dpo_jax.records import Logps, UserError


def batch_of(policy, **fields):
    """Log-probs of B comparisons, float32[B, P]: reference 0, 5 tokens a response, all there, unless given."""
    policy = jnp.asarray(policy, jnp.float32)
    values = {
        "reference": jnp.zeros_like(policy),
        "policy_shared": policy,
        "reference_shared": jnp.zeros_like(policy),
        "lengths": jnp.full_like(policy, 5.0),
        "present": jnp.ones_like(policy, bool),
        "weights": jnp.ones(len(policy)),
        "preference": jnp.ones(len(policy)),
        "scores": jnp.zeros_like(policy),
        "confidence": jnp.full_like(policy, jnp.nan),
        "running": jnp.zeros(()),
    }
    return Logps(policy, **values | {name: jnp.asarray(value) for name, value in fields.items()})


def logps(policy, reference=None, lengths=None):
    """One comparison."""
    given = {"reference": reference, "lengths": lengths}
    return batch_of([policy], **{k: jnp.array([v], jnp.float32) for k, v in given.items() if v is not None})


def softplus(x):
    return math.log1p(math.exp(x))


REF = (-10.0, -12.0)
ROWS = [
    ("dpo", {"beta": 0.1}, REF, REF, math.log(2)),  # policy = reference
    ("dpo", {"beta": 1.0}, (-2.0, -3.0), (-2.5, -3.5), math.log(2)),  # both half a nat up: score 0
    ("dpo", {"beta": 1.0}, (1.2, 0.0), (0.0, 0.0), 0.2633),  # score 1.2: sigma = 0.7685
    ("dpo", {"beta": 0.1}, (-8.0, -12.0), REF, softplus(-0.2)),  # log-ratios 2 and 0
    ("dpo", {"beta": 0.1}, (-8.0, -9.0), REF, softplus(0.1)),  # log-ratios 2 and 3: the rejected one rose more
    ("dpo", {"beta": 0.5, "label_smoothing": 0.25}, (-8.0, -12.0), REF, 0.75 * softplus(-1) + 0.25 * softplus(1)),
    # two tokens of probability 0.4, 0.5 under the policy and 0.3, 0.6 under the reference: score 0.1054 - 0.5
    ("dpo", {"beta": 1.0}, (math.log(0.2), -2.5), (math.log(0.18), -3.0), softplus(0.5 - math.log(0.2 / 0.18))),
    ("sft", {}, (-8.0,), None, 8.0),
    ("sft", {"reduction": "mean"}, (-8.0,), None, 1.6),  # over 5 tokens
]


@pytest.mark.parametrize(("name", "hyper", "policy", "reference", "expected"), ROWS)
def test_value(name, hyper, policy, reference, expected):
    np.testing.assert_allclose(
        losses.build({"name": name, **hyper}).values(logps(policy, reference)), [expected], rtol=1e-4
    )


def test_every_loss_has_a_value_row():
    assert {row[0] for row in ROWS} == set(REGISTRY)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_contract(name):
    """Unreduced, float32, finite at extreme margins, and blind to the order of the batch."""
    loss = losses.build({"name": name})
    p = loss.responses
    policy = jnp.array([[-1e4, 0.0], [0.0, -1e4], [-30.0, -20.0]], jnp.float32)[:, :p]
    lp = batch_of(policy)
    value, pull = jax.vjp(lambda x: loss.values(lp._replace(policy=x)), policy)
    assert value.shape == (3,)
    assert value.dtype == jnp.float32
    assert np.isfinite(value).all()
    assert np.isfinite(pull(jnp.ones(3))[0]).all()
    order = jnp.array([2, 0, 1])
    shuffled = jax.tree.map(lambda x: x[order] if x.ndim else x, lp)
    np.testing.assert_array_equal(loss.values(shuffled), value[order])


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
        "kl": [-1.0, 0.0, 0.0],
        "lengths/chosen": [5.0, 5.0, 5.0],
        "lengths/rejected": [5.0, 5.0, 5.0],
        "nll": [1.6, 2.2, 2.0],
        "loss": [softplus(-1.0), softplus(1.0), math.log(2)],
    }
    assert set(metrics) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, atol=1e-6, err_msg=name)


def test_likelihood_metrics():
    metrics = losses.build({"name": "sft"}).metrics(logps((-8.0,)))
    expected = {"loss": 8.0, "logps/chosen": -8.0, "nll": 1.6}
    assert {k: float(v[0]) for k, v in metrics.items()} == pytest.approx(expected)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown loss 'dop'; known: dpo, sft"):
        losses.build({"name": "dop"})
    with pytest.raises(UserError, match=r"loss dpo: .*'betta'.*its parameters"):
        losses.build({"name": "dpo", "betta": 0.1})
    with pytest.raises(ValueError, match="registered twice"):
        register(responses=2, uses_reference=True)(REGISTRY["dpo"].function)
