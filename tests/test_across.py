"""Losses that look across comparisons, on many devices: in-process, each layout against one device."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dpo_jax import losses, optim, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_train_step
from dpo_jax.training.shard import gather_on_use

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
BATCH = 32


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(1, 128, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 12), (ids(2, 20), ids(2, 20))) for _ in range(64))


ACROSS = [{"name": "aot", "beta": 0.5}, {"name": "bco", "beta": 0.5, "weight": 0.5}, {"name": "dpo"}]


def two_steps(table, sizes, mapped=False):
    """Returns the metrics and the state after two steps on a mesh, or under pmap, as host arrays."""
    model, loss = build_model(family("llama").architecture(CONFIG)), losses.build(ACROSS)
    tx = optim.build("rmsprop", learning_rate=1e-3, warmup_steps=2)
    sizes = (*sizes[:2], 1, 1, *sizes[2:])
    devices, kinds = jax.devices()[: int(np.prod(sizes))], (AxisType.Auto,) * len(sharding.AXES)
    mesh = jax.make_mesh(sizes, sharding.AXES, devices=devices, axis_types=kinds)
    start = jax.jit(model.init)(jax.random.key(0))
    state = init_state(start, tx, loss)
    shape = pack.choose_layout(table, max_length=32, batch_size=BATCH, rows=4, length=128)
    reference = np.random.default_rng(0).normal(size=(len(table), 2, 1)).astype(np.float32) - 60
    batch, count, _ = pack.build_batch(table, np.arange(BATCH), shape, np.repeat(reference, 2, axis=2))
    if mapped:
        pure = make_train_step(model, loss, tx, collectives=sharding.pmap_collectives(mesh))
        step = jax.pmap(pure, sharding.MAPPED, in_axes=(None, 1, None), out_axes=None)
        batch = jax.tree.map(lambda x: x.reshape(x.shape[0], sizes[0], -1, *x.shape[2:]), batch)
    else:
        params = sharding.param_shardings(mesh, model.axes, start)
        rows = sharding.mesh_collectives(mesh, (params, None))
        step = jax.jit(make_train_step(gather_on_use(model, rows, params), loss, tx, collectives=rows))
        state = sharding.put_params(jax.device_get(state), sharding.state_shardings_like(mesh, params, state))
        batch = sharding.put_batch(mesh, batch)
    assert count > 1
    for _ in range(2):
        state, metrics = step(state, batch, np.int32(count))
    return jax.device_get((metrics, state))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [(2, 1, 2), *(pytest.param(sizes, marks=pytest.mark.milestone) for sizes in ((1, 2, 1), (4, 1, 1))), "pmap"],
    ids=str,
)
def test_a_loss_across_comparisons_sees_those_of_all_devices(table, layout):
    """Ranks and means are of the whole step, and each device goes backward from its own comparisons' gradients."""
    metrics, state = two_steps(table, (1, 1, 1))
    found = two_steps(table, (4, 1, 1), mapped=True) if layout == "pmap" else two_steps(table, layout)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), metrics, found[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, found[1].params)
    np.testing.assert_allclose(state.running, found[1].running, atol=1e-6)
    assert state.running[1] != 0
