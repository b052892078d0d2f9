"""Scores of f-divergences: derivatives of their generators, limits, extremes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_table import batch_of

from dpo_jax.errors import UserError
from dpo_jax.losses import REGISTRY
from dpo_jax.losses.term_options import diverge

# f of D_f(pi, ref) = E_ref[f(pi / ref)], with f(1) = f'(1) = 0 where an affine part is free
GENERATORS = {
    ("reverse_kl", 0.0): lambda t: t * jnp.log(t) - t + 1,
    ("forward_kl", 0.0): lambda t: t - 1 - jnp.log(t),
    ("js", 0.0): lambda t: t * jnp.log(t) - (t + 1) * jnp.log((t + 1) / 2),
    ("alpha", 0.5): lambda t: (t**0.5 - 0.5 * t - 0.5) / (0.5 * -0.5),
    ("alpha", 3.0): lambda t: (t**3 - 3 * t + 2) / (3 * 2),
    ("chi2_kl", 0.0): lambda t: 0.5 * (t - 1) ** 2 + t * jnp.log(t) - t + 1,
}
SQUARES = {"ipo", "ipo_sum", "rpo_sq"}
every_divergence = pytest.mark.parametrize(("name", "alpha"), GENERATORS)


def scores(ratios, name, alpha=0.5):
    lp = diverge(batch_of([ratios], reference=[[0.0] * len(ratios)]), name, alpha)
    return (lp.policy - lp.reference)[0]


@every_divergence
def test_scores_are_the_derivative_of_the_generator(name, alpha):
    ratios = np.array([-2.0, -0.3, 0.0, 0.7, 1.5], np.float32)
    expected = jax.vmap(jax.grad(GENERATORS[name, alpha]))(np.exp(ratios))
    np.testing.assert_allclose(scores(ratios, name, alpha), expected, rtol=2e-5, atol=2e-6)


def test_scores_by_hand():
    """pi / ref = 2: log 2, 1 - 1/2, log(4/3), (2^-1/2 - 1) / (-1/2), 2 - 1 + log 2."""
    found = [float(scores([math.log(2)], name)[0]) for name in ("reverse_kl", "forward_kl", "js", "alpha", "chi2_kl")]
    expected = [math.log(2), 0.5, math.log(4 / 3), 2 - math.sqrt(2), 1 + math.log(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_limits_of_the_alpha_divergence_are_the_two_kls():
    ratios = np.array([-3.0, 0.0, 0.2, 4.0], np.float32)
    for near in (1.0, 1.0 + 1e-7, 1.0 - 1e-3):
        np.testing.assert_allclose(scores(ratios, "alpha", near), ratios, rtol=5e-3)
    np.testing.assert_allclose(scores(ratios, "alpha", 0.0), scores(ratios, "forward_kl"), rtol=1e-6)


@every_divergence
def test_the_reference_is_taken_off_first_and_nothing_else_changes(name, alpha):
    lp = batch_of([[-3.0, -4.0]], reference=[[-3.5, -2.0]], lengths=[[2.0, 3.0]], scores=[[1.0, 0.0]])
    found = diverge(lp, name, alpha)
    np.testing.assert_allclose(found.policy - found.reference, [scores([0.5, -2.0], name, alpha)], rtol=1e-6)
    for field in set(lp._fields) - {"policy", "reference"}:
        assert getattr(found, field) is getattr(lp, field)


@every_divergence
@pytest.mark.parametrize("loss", sorted({n for n, e in REGISTRY.items() if e.divergences} - SQUARES))
def test_extremes_are_finite(loss, name, alpha):
    """But for squares, which overflow as they must, and sums of exponentials of very large scores.

    A step whose loss is not finite is refused.
    """
    p, far = (2, 1e4) if REGISTRY[loss].responses else (3, 6.0)
    policy = far * np.array([[-1, 0, 0], [0, -1, 0], [1, 0, 1], [-1, 1, 0]], np.float32)[:, :p]
    lp = batch_of(policy, scores=np.tile(np.arange(p, 0.0, -1), (4, 1)))

    @jax.jit
    @jax.value_and_grad
    def total(x):
        return REGISTRY[loss].function(diverge(lp._replace(policy=x), name, alpha)).sum()

    value, gradient = total(policy)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_scores_are_float32_of_bfloat16_log_probs_and_alpha_may_be_traced():
    lp = batch_of([[-3.0, -4.0]]).policy.astype(jnp.bfloat16)
    found = diverge(batch_of([[0.0, 0.0]])._replace(policy=lp), "alpha", 0.5)
    assert found.policy.dtype == jnp.float32
    swept = jax.vmap(lambda alpha: scores([0.5, -2.0], "alpha", alpha))(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(swept, [scores([0.5, -2.0], "alpha", 0.5), [0.5, -2.0]], rtol=1e-6)


def test_unknown_divergences_are_refused():
    known = "reverse_kl, forward_kl, js, alpha, chi2_kl"
    with pytest.raises(UserError, match=rf"loss.divergence: 'kl' is none; known: {known}"):
        diverge(batch_of([[0.0, 0.0]]), "kl")
