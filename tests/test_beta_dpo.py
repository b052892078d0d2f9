"""The drawn filter of beta_dpo: the authors' density, one draw in any layout, and none that rounding decides."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_table import batch_of
from test_losses_authors import REF, P, gap, sig

from dpo_jax import losses
from dpo_jax.errors import UserError

DRAWN = {"name": "beta_dpo", "left_out": 0.4, "drawn": True}


def kept_of(lp, running):
    """Which comparisons have a gradient under the drawn filter."""
    value = jax.jit(losses.build(DRAWN).values)
    slope = jax.grad(lambda policy: value(lp._replace(policy=policy, running=np.asarray(running, np.float32))).sum())
    return np.asarray(slope(np.asarray(lp.policy)))[:, 0] != 0


def test_the_drawn_filter_of_beta_dpo_carries_mean_deviation_and_step():
    """The authors' deviation divides by n - 1; those kept have the value of a filtered step."""
    objective, between = losses.build(DRAWN), gap((P - REF)[:, :2])
    assert objective.carried == 3
    lp = batch_of(P[:, :2], reference=REF[:, :2], running=[0.4, 1.2, 7.0])
    mean, spread = 0.9 * np.array([0.4, 1.2]) + 0.1 * np.array([between.mean(), between.std(ddof=1)])
    np.testing.assert_allclose(objective.statistics(lp), [mean, spread, 8.0], rtol=1e-5)
    kept = kept_of(lp, lp.running)
    assert kept.sum() == 3
    used = max(0.1 * (1 + 0.6 * (between[kept].mean() - mean)), 1e-3)
    expected = np.where(kept, -np.log(sig(used * between)) * 5 / 3, 0.0)
    np.testing.assert_allclose(objective.values(lp), expected, rtol=1e-5)


def test_the_drawn_filter_of_beta_dpo_draws_by_the_normal_density():
    """Each set of three of five is as frequent as one drawn one after another, in whatever order."""
    between, n = gap((P - REF)[:, :2]), 4000
    mean, spread = 0.9 * np.array([0.4, 1.2]) + 0.1 * np.array([between.mean(), between.std(ddof=1)])
    mass = np.exp(-0.5 * ((between - mean) / spread) ** 2)
    lp = batch_of(P[:, :2], reference=REF[:, :2])
    objective = losses.build(DRAWN)

    def values(step):
        return objective.values(lp._replace(running=jnp.stack([jnp.float32(0.4), jnp.float32(1.2), step])))

    kept = np.asarray(jax.jit(jax.vmap(values))(np.arange(n, dtype=np.float32))) != 0
    for chosen in itertools.combinations(range(5), 3):
        p = 0.0
        for order in itertools.permutations(chosen):
            rest = mass.sum() - np.cumsum([0.0, *mass[list(order)]])[:3]
            p += np.prod(mass[list(order)] / rest)
        wanted = np.isin(np.arange(5), chosen)
        assert (kept == wanted).all(1).mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n) + 1e-9)


@pytest.mark.slow
def test_the_drawn_filter_of_beta_dpo_is_the_same_in_any_layout():
    """In another order, and among absent comparisons."""
    order = [3, 0, 4, 2, 1]
    for step in range(20):
        kept = kept_of(batch_of(P[:, :2], reference=REF[:, :2]), [0.4, 1.2, step])
        rows = [0, *order[:2], 1, *order[2:]]
        weights = [0, 1, 1, 0, 1, 1, 1]
        moved = batch_of(P[rows, :2], reference=REF[rows, :2], weights=weights)
        found = kept_of(moved, [0.4, 1.2, step])
        np.testing.assert_array_equal(found[np.array(weights) > 0], kept[order])
        assert not found[[0, 3]].any()


def test_the_drawn_filter_of_beta_dpo_is_uniform_while_margins_are_rounding_noise():
    """At the first step, of a policy that is the reference but for rounding."""
    equal = batch_of(REF[:, :2], reference=REF[:, :2])
    noisy = batch_of(REF[:, :2] + 1e-4 * np.array([[1, -1], [0, 2], [-2, 1], [3, 0], [0, 0]]), reference=REF[:, :2])
    objective = losses.build(DRAWN)

    def values(lp, step):
        return objective.values(lp._replace(running=jnp.stack([0.0, 0.0, step])))

    one, other = (
        np.asarray(jax.jit(jax.vmap(functools.partial(values, lp)))(np.arange(500, dtype=np.float32))) != 0
        for lp in (equal, noisy)
    )
    np.testing.assert_array_equal(one, other)
    assert (one.sum(1) == 3).all()
    np.testing.assert_allclose(one.mean(0), 0.6, atol=4 * np.sqrt(0.24 / 500))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left_out": 0.0}, "loss beta_dpo: drawn True cannot be used: left_out 0 keeps all comparisons; set left_out"),
        ({"reference_free": True}, "beta_dpo: reference_free True cannot be used: .* order of the reference's margins"),
    ],
)
def test_a_draw_of_beta_dpo_that_means_nothing_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        losses.build(DRAWN | options)
    losses.build(DRAWN | options | {"drawn": False})
