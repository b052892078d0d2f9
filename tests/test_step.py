"""The train step: the original's trajectory in torch, and what must not change it."""

from functools import partial

import jax
import numpy as np
import originals
import pytest
import torch

from dpo_jax import losses, models, optim
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import as_reference, batch_logps
from dpo_jax.models import hf
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_eval_step, make_train_step

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
    """Trains; returns the metrics of every step, the last parameters and the number of compilations."""
    architecture, _, params = hf.load(folder)
    model = models.build(architecture)
    logps = partial(batch_logps, model)
    loss = loss or losses.build({"name": "dpo", "beta": 0.5})
    tx = optim.build("rmsprop", **OPTIM)
    traced = []
    pure = make_train_step(logps, loss, tx)
    step = jax.jit(lambda *args: (traced.append(1), pure(*args))[1])
    shape = pack.choose(table, max_length=32, batch_size=BATCH, rows=rows)
    column = jax.jit(lambda p, m: as_reference(logps(p, m), m))
    state, history = jax.jit(partial(init_state, tx=tx))(params), []
    for i in range(steps):
        batch, count, _ = pack.build(table, indices(i), shape)
        for m in range(count):
            batch.ref_logps[m] = column(params, jax.tree.map(lambda x, m=m: x[m], batch))
        if weights is not None:
            batch = batch._replace(weights=batch.weights * weights)
        if spoil == i:
            batch = batch._replace(ref_logps=batch.ref_logps * np.nan)
        state, metrics = step(state, batch, np.int32(count))
        history.append({k: float(v) for k, v in metrics.items()})
    return history, state, len(traced)


def torch_losses(folder, table):
    """The original's step: summed log-probs, its loss, RMSprop, LambdaLR warm-up, clipping by global norm."""
    policy, reference = originals.load(folder), originals.load(folder)
    optimiser = torch.optim.RMSprop(policy.parameters(), lr=OPTIM["learning_rate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: min(1.0, (t + 1) / (OPTIM["warmup_steps"] + 1)))
    out, norms = [], []
    for i in range(STEPS):
        rows = [table[int(k)] for k in indices(i)]
        pi = torch.stack([originals.sequence_logps(policy, t) for t in rows])
        with torch.no_grad():
            rho = torch.stack([originals.sequence_logps(reference, t) for t in rows])
        loss = originals.preference_loss(pi, rho, beta=0.5).mean()
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIM["max_grad_norm"])))
        optimiser.step()
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


def test_step_zero(folder, table):
    """Policy and reference are the same: the loss is log 2 and every reward 0."""
    history, _, _ = run(folder, table, steps=1)
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert history[0][name] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8])
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
    architecture, _, params = hf.load(folder)
    logps = partial(batch_logps, models.build(architecture))
    shape = pack.choose(table, max_length=32, batch_size=24, rows=2, length=128)
    reference = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32) * 9 - 60
    column = np.stack([reference, reference], axis=-1)
    batch, count, places = pack.build(table, np.arange(24), shape, column)
    assert count > 1
    step = jax.jit(make_eval_step(logps, losses.build({"name": "dpo", "beta": 0.1})))
    metrics = step(params, np.zeros(1, np.float32), batch, np.int32(count))
    with torch.no_grad():
        policy = torch.stack([originals.sequence_logps(originals.load(folder), table[i]) for i in range(24)])
    expected = originals.preference_loss(policy, torch.tensor(reference), 0.1).numpy()
    np.testing.assert_allclose(pack.unpack(metrics["loss"], places), expected, rtol=1e-4)
    np.testing.assert_allclose(pack.unpack(metrics["logps/rejected"], places), policy[:, 1].numpy(), rtol=1e-5)
