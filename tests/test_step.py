"""The train step: the original's trajectory in torch, and what must not change it."""

from functools import partial

import jax
import numpy as np
import originals
import pytest
import torch

from dpo_jax import losses, optim
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import as_ref_logps, batch_logps
from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.model import build_model
from dpo_jax.records import Sync, Tokens
from dpo_jax.sharding import NO_COLLECTIVES
from dpo_jax.step import gradient, init_state, make_eval_step, make_train_step

VOCAB, BATCH, STEPS = 61, 8, 20
OPTIM = {"learning_rate": 2e-3, "warmup_steps": 4, "max_grad_norm": 10.0}


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(1)

    def ids(low, high):
        return rng.integers(1, VOCAB, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 12), (ids(2, 20), ids(2, 20))) for _ in range(3 * BATCH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    originals.save_random("llama", folder, VOCAB)
    return folder


def indices(step):
    return (np.arange(BATCH) + step * BATCH) % 24


def run(folder, table, *, steps=STEPS, rows=None, loss=None, weights=None, spoil=None):
    """Trains; returns the metrics of every step, the last parameters and the number of compilations.

    `weights` multiply those of the data: one number, or one for each step.
    """
    architecture, _, params = load_folder(folder)
    model = build_model(architecture)
    logps = partial(batch_logps, model)
    loss = loss or losses.build({"name": "dpo", "beta": 0.5})
    tx = optim.build("rmsprop", **OPTIM)
    traced = []
    pure = make_train_step(model, loss, tx)
    step = jax.jit(lambda *args: (traced.append(1), pure(*args))[1])
    shape = pack.choose_layout(table, max_length=32, batch_size=BATCH, rows=rows)
    column = jax.jit(lambda p, m: as_ref_logps(logps(p, m), m))
    state, history = jax.jit(partial(init_state, tx=tx, loss=loss))(params), []
    for i in range(steps):
        batch, count, _ = pack.build_batch(table, indices(i), shape)
        for m in range(count):
            batch.ref_logps[m] = column(params, jax.tree.map(lambda x, m=m: x[m], batch))
        if weights is not None:
            batch = batch._replace(weights=batch.weights * np.broadcast_to(weights, steps)[i])
        if spoil == i:
            batch = batch._replace(ref_logps=batch.ref_logps * np.nan)
        state, metrics = step(state, batch, np.int32(count))
        history.append({k: float(v) for k, v in metrics.items()})
    return history, state, len(traced)


def test_a_step_whose_weights_are_all_0_changes_nothing_and_is_counted(folder, table):
    """Neither the parameters nor the means of the optimizer."""
    history, state, _ = run(folder, table, steps=2, weights=0.0)
    assert [(m["unweighted"], m["nonfinite"], m["grad_norm"]) for m in history] == [(1, 0, 0)] * 2
    _, _, params = load_folder(folder)
    fresh = init_state(params, optim.build("rmsprop", **OPTIM), losses.build("dpo"))
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=0), fresh._replace(step=0))
    assert int(state.step) == 2
    _, before, _ = run(folder, table, steps=1)
    _, after, _ = run(folder, table, steps=2, weights=(1.0, 0.0))
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=1), before)
    history, _, _ = run(folder, table, steps=1, weights=0.0, loss=losses.build("beta_dpo"))
    assert (history[0]["unweighted"], history[0]["nonfinite"]) == (1, 0)
    assert run(folder, table, steps=1)[0][0]["unweighted"] == 0


def torch_losses(folder, table):
    """The original's step: summed log-probs, its loss, RMSprop, LambdaLR warm-up, clipping by global norm."""
    policy, reference = originals.load(folder), originals.load(folder)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=OPTIM["learning_rate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / (OPTIM["warmup_steps"] + 1)))
    out, norms = [], []
    for i in range(STEPS):
        rows = [table[int(k)] for k in indices(i)]
        pi = torch.stack([originals.sequence_logps(policy, t) for t in rows])
        with torch.no_grad():
            rho = torch.stack([originals.sequence_logps(reference, t) for t in rows])
        loss = originals.preference_loss(pi, rho, beta=0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIM["max_grad_norm"])))
        optimizer.step()
        schedule.step()
        out.append(loss.item())
    return out, norms


def test_twenty_steps_are_the_originals(folder, table):
    history, _, compilations = run(folder, table, rows=2)
    expected, norms = torch_losses(folder, table)
    assert expected[-1] < 0.5 * expected[0]  # the loss has fallen by half, so the comparison is no formality
    assert max(norms) > OPTIM["max_grad_norm"]  # clipping took part
    np.testing.assert_allclose([m["loss"] for m in history], expected, atol=1e-4)
    np.testing.assert_allclose([m["grad_norm"] for m in history], norms, rtol=1e-3)
    assert compilations == 1
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)  # policy and reference are the same
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert history[0][name] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_microbatches_do_not_change_the_trajectory(folder, table, rows):
    first, _, _ = run(folder, table, steps=6, rows=2)
    other, _, _ = run(folder, table, steps=6, rows=rows)
    for a, b in zip(first, other, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5)


def test_weights_are_relative_and_zero_removes(folder, table):
    """Weighting everything alike changes nothing; a weight of 0 is as if the comparison were not there."""
    plain, _, _ = run(folder, table, steps=3)
    thrice, _, _ = run(folder, table, steps=3, weights=3.0)
    assert plain[-1] == pytest.approx(thrice[-1], rel=1e-5, abs=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_says_so(folder, table):
    history, state, _ = run(folder, table, steps=3, spoil=2)
    _, before, _ = run(folder, table, steps=2)
    assert [m["nonfinite"] for m in history] == [0, 0, 1]
    assert int(state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))


def test_eval_gives_each_comparison_its_own_values(folder, table):
    architecture, _, params = load_folder(folder)
    model = build_model(architecture)
    shape = pack.choose_layout(table, max_length=32, batch_size=24, rows=2, length=128)
    reference = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32) * 9 - 60
    column = np.stack([reference, reference], axis=-1)
    batch, count, places = pack.build_batch(table, np.arange(24), shape, column)
    assert count > 1
    step = jax.jit(make_eval_step(model, losses.build({"name": "dpo", "beta": 0.1})))
    metrics = step(params, batch, np.int32(count), np.zeros(1, np.float32))
    with torch.no_grad():
        policy = torch.stack([originals.sequence_logps(originals.load(folder), table[i]) for i in range(24)])
    expected = originals.preference_loss(policy, torch.tensor(reference), 0.1).numpy()
    np.testing.assert_allclose(pack.unpack_batch(metrics["loss"], places), expected, rtol=1e-4)
    np.testing.assert_allclose(pack.unpack_batch(metrics["logps/rejected"], places), policy[:, 1].numpy(), rtol=1e-5)


WHOLE = losses.build({"name": "dpo", "beta": 0.5})._replace(whole_batch=True)


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.slow
def test_a_loss_seen_whole_gives_the_trajectory_of_the_parts(folder, table, rows):
    """DPO's comparisons do not look at each other, so that differentiating a step's at once must change nothing."""
    parts, state, _ = run(folder, table, steps=6, rows=2)
    whole, other, _ = run(folder, table, steps=6, rows=rows, loss=WHOLE)
    for a, b in zip(parts, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), state.params, other.params)


@pytest.mark.parametrize("name", ["aot", "bco", "beta_dpo"])
@pytest.mark.slow
def test_losses_across_comparisons_do_not_see_microbatches(folder, table, name):
    """Sorts, means and running statistics are of the whole step, whatever rows it is laid out in."""
    loss = losses.build([{"name": name, "beta": 0.5}, {"name": "sft", "reduction": "mean", "weight": 0.1}])
    first, state, _ = run(folder, table, steps=5, rows=1, loss=loss)
    other, again, _ = run(folder, table, steps=5, rows=3, loss=loss)
    assert first[0]["loss"] != pytest.approx(first[-1]["loss"], rel=0.01)
    for a, b in zip(first, other, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5)
    np.testing.assert_allclose(state.running, again.running, rtol=1e-3, atol=1e-6)
    assert state.running.shape == (2,)
    assert (state.running[0] != 0) == (name != "aot")


def test_a_loss_across_comparisons_is_differentiated_with_its_statistic(folder, table):
    """The gradient of two microbatches is that of the loss of all their comparisons, shifted by what went before."""
    architecture, _, params = load_folder(folder)
    logps, loss = partial(batch_logps, build_model(architecture)), losses.build({"name": "bco", "beta": 0.1})
    batch, count, _ = pack.build_batch(
        table,
        indices(0),
        pack.choose_layout(table, max_length=32, batch_size=BATCH, rows=1, length=128),
        np.full((24, 2, 2), -40.0),
    )
    batch = jax.tree.map(jax.numpy.asarray, batch)
    state = init_state(params, optim.build("rmsprop", **OPTIM), loss)._replace(running=np.array([4.0], np.float32))
    assert count > 1

    def whole(params):
        parts = [logps(params, jax.tree.map(lambda x, m=m: x[m], batch))._replace(running=()) for m in range(count)]
        lp = jax.tree.map(lambda *x: jax.numpy.concatenate(x), *parts)._replace(running=state.running)
        return (lp.weights * loss.values(lp)).sum() / lp.weights.sum()

    def found(state):
        return gradient(
            lambda parts, micro: logps(parts[0], micro), loss, state, None, batch, np.int32(count), NO_COLLECTIVES
        )[0]

    expected = jax.jit(jax.grad(whole))(params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), jax.jit(found)(state), expected)


@pytest.mark.slow
def test_the_statistic_is_carried_from_step_to_step(folder, table):
    """bco's shift after two steps is 0.9 of that after one and 0.1 of the second step's mean reward."""
    loss = losses.build({"name": "bco", "beta": 0.5})
    history, _, _ = run(folder, table, steps=3, loss=loss)
    means = [0.5 * (m["rewards/chosen"] + m["rewards/rejected"]) for m in history]
    expected = 0.0
    for steps, mean in enumerate(means, 1):
        expected = 0.9 * expected + 0.1 * mean
        assert float(run(folder, table, steps=steps, loss=loss)[1].running[0]) == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-3


def test_a_reference_that_moves(folder, table):
    """TR-DPO: alpha of the policy and 1 - alpha of itself every second step, and nothing in between."""
    architecture, _, params = load_folder(folder)
    model = build_model(architecture)
    loss, tx = losses.build({"name": "dpo", "beta": 0.5}), optim.build("rmsprop", **OPTIM)
    step = jax.jit(make_train_step(model, loss, tx, sync=Sync(every=2, alpha=0.25)))
    shape = pack.choose_layout(table, max_length=32, batch_size=BATCH)
    state = init_state(params, tx, loss, reference=params)
    expected = params
    for i in range(4):
        batch, count, _ = pack.build_batch(table, indices(i), shape, np.zeros((len(table), 2, 2), np.float32))
        state, _ = step(state, batch, np.int32(count))
        if i % 2:
            expected = jax.tree.map(lambda p, r: 0.25 * np.asarray(p) + 0.75 * r, state.params, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), state.reference, expected)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state.reference, params)), strict=True))
