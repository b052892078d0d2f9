"""Every saving that scripts/bench --levers takes away is a saving of work only: the trajectory stays the same."""

import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax import losses, optim, reference
from dpo_jax.data.table import Table
from dpo_jax.logprobs import CHUNK, batch_logps
from dpo_jax.models.attention import packed_attention
from dpo_jax.models.blocks import block_attention
from dpo_jax.models.families.registry import family
from dpo_jax.models.kernels import splash
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_train_step

bench = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "_bench_levers.py")))
STEPS, BATCH = 3, 4
pytestmark = pytest.mark.slow
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MAX_LENGTH = 160  # longer than a chunk of attention, and less than twice the tokens of some comparisons


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(1, 96, rng.integers(low, high), dtype=np.int32)

    return Table.of(Tokens(ids(5, 80), (ids(3, 80), ids(3, 80))) for _ in range(STEPS * BATCH))


@pytest.fixture(scope="module")
def trajectory(table):
    """name of a lever -> the metrics of the steps without it, and the parameters after them."""
    architecture = family("llama").architecture({"model_type": "llama", **SIZES})
    start = jax.jit(build_model(architecture).init)(jax.random.key(0))
    tx = optim.build("rmsprop", learning_rate=1e-3, warmup_steps=0)
    loss = losses.build({"name": "dpo", "beta": 1.0})

    # A response's tokens are few here, so the whole has smaller chunks of them than a microbatch scores.
    batch_logps.__kwdefaults__["chunk"] = 64

    def run(lever, attend=None):
        model = build_model(architecture, remat="full" if lever == "kept activations" else "none")
        if attend is not None:
            model = model._replace(hidden=partial(model.hidden, attend=attend))
        logps = bench.logps_of(lever, model)
        step, column = jax.jit(make_train_step(model, loss, tx, logps=logps)), reference.make_ref_logps_fn(logps)
        shape, state, found = bench.shape_of(lever, table, MAX_LENGTH, BATCH), init_state(start, tx, loss), []
        for rows in np.arange(STEPS * BATCH).reshape(STEPS, BATCH):
            batch, count = bench.build(lever, table, rows, shape)
            batch = jax.device_put(batch)
            state, metrics = step(state, batch._replace(ref_logps=column(start, batch, count)), np.int32(count))
            found.append({name: float(value) for name, value in metrics.items()})
        return found, state.params

    yield run
    batch_logps.__kwdefaults__["chunk"] = CHUNK


@pytest.fixture(scope="module")
def whole(trajectory):
    """With all of them."""
    return trajectory("")


@pytest.mark.parametrize("lever", bench.LEVERS)
def test_a_lever_changes_no_trajectory(trajectory, whole, lever, monkeypatch):
    monkeypatch.setitem(packed_attention.__kwdefaults__, "chunk", packed_attention.__kwdefaults__["chunk"])
    assert_same(trajectory(lever), whole)


@pytest.mark.parametrize("attend", [partial(splash, interpret=True), block_attention], ids=["splash", "blocks"])
def test_nor_does_other_attention(trajectory, whole, attend):
    """A TPU's kernel, run on this processor, and that of rows in blocks."""
    assert_same(trajectory("", attend), whole)


def assert_same(found, whole):
    (metrics, params), (expected, policy) = found, whole
    assert expected[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 1e-2  # it went somewhere
    for ours, theirs in zip(metrics, expected, strict=True):
        # A reward is a difference of two float32 sums, each rounded to a unit in its last place.
        unit = np.spacing(np.float32(max(abs(theirs["logps/chosen"]), abs(theirs["logps/rejected"]))))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=max(1e-5, 2 * float(unit)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, policy)
