"""Rows whose tokens are split over devices: the attention, the layout, and trajectories against whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import D, H, K, R, dense, inputs, layout, visible, with_gradient

from dpo_jax import losses, optim, reference, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.models.attention import RowMask, Scoring
from dpo_jax.models.blocks import block_attention, blocks_seen
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Sync, Tokens
from dpo_jax.step import init_state, make_eval_step, make_train_step
from dpo_jax.training.shard import gather_on_use

PLAIN = Scoring(D**-0.5)


# Attention of some queries.


@pytest.mark.parametrize(
    ("window", "scoring", "block"), [(None, PLAIN, 25), (9, PLAIN, 15), (None, Scoring(0.5, 2.0), 5), (2, PLAIN, 512)]
)
def test_blocks_equal_dense_attention_and_its_gradient(window, scoring, block):
    """Of 30 queries in any order, over keys in another order."""
    rows, rng = layout(window), np.random.default_rng(0)
    queries, keys = rng.permutation(75)[:30], rng.permutation(75)
    q, k, v, g = inputs()
    seen = visible(rows)[:, queries][:, :, keys]
    mask = RowMask(*(jax.tree.map(lambda x, at=at: x[:, at], rows.queries) for at in (queries, keys)), rows.window)
    given = q[:, queries], k[:, keys], v[:, keys], g[:, queries]
    ours = with_gradient(lambda *x: block_attention(*x, mask, scoring, block=block), *given)
    theirs = with_gradient(lambda *x: dense(*x, seen, scoring), *given)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("window", [None, 9])
def test_blocks_of_which_nothing_is_seen_are_left_out(window):
    """Every block of which a query sees a key is computed, once, and few others."""
    rows, size = layout(window), 15
    seen = visible(rows).any(0).reshape(5, 15, 5, 15).any((1, 3))
    order, count = blocks_seen(RowMask(rows.queries, rows.keys, rows.window), (size, size))
    computed = [set(np.asarray(order)[i, : int(n)].tolist()) for i, n in enumerate(count)]
    assert all(set(np.flatnonzero(seen[i])) <= computed[i] for i in range(5))
    assert int(count.sum()) == sum(map(len, computed)) <= int(seen.sum()) + 1


def test_later_keys_other_segments_and_other_branches_are_left_out():
    ids = [[1] * 8 + [2] * 24, [0] * 16 + [1] * 8 + [2] * 8]  # segment 1, then a prompt and two responses
    rows = RowMask.of(*(jnp.array([x]) for x in ids))
    order, count = blocks_seen(rows, (8, 8))
    assert [sorted(np.asarray(order)[i, :n].tolist()) for i, n in enumerate(count)] == [[0], [1], [1, 2], [1, 3]]


# The layout.


def test_devices_share_the_work_of_a_causal_row_and_find_their_tokens():
    """Device i has the blocks i and 7 - i of 8; `locate` finds every token on one device, at its place there."""
    mesh, length = sharding.make_mesh(1, 1, 1, 4), 64
    shared = sharding.mesh_collectives(mesh, {"w": sharding.replicated(mesh)})
    split = shared.split

    def body(params, batch, count):
        own = split.own(batch[0])[None]
        mine, where = split.locate(batch[0], length)
        found = jnp.where(mine, jnp.take_along_axis(own[0], where, axis=1), 0)
        both = split.gather(own[0][..., None, None])[..., 0, 0], split.in_order(batch[0])
        return jax.lax.all_gather(own, "sequence"), jax.lax.psum(found, "sequence")[None], *(x[None] for x in both)

    own, found, gathered, ordered = jax.jit(shared.map_rows(body))({"w": jnp.ones(())}, jnp.arange(64)[None, None], 0)
    own = np.asarray(own).reshape(4, 16)
    assert own.sum(1).tolist() == [504] * 4
    assert own[1].tolist() == [*range(8, 16), *range(48, 56)]
    np.testing.assert_array_equal(found[0, 0], np.arange(64))
    np.testing.assert_array_equal(gathered, ordered)
    np.testing.assert_array_equal(ordered[0, 0], own.ravel())


def test_parameters_are_sharded_over_the_devices_that_share_rows():
    mesh = sharding.make_mesh(1, 2, 1, 2)
    shapes = {"q": jax.ShapeDtypeStruct((8, 2), np.float32), "odd": jax.ShapeDtypeStruct((6,), np.float32)}
    laid = sharding.param_shardings(mesh, {"q": ("embed", "heads"), "odd": ("embed",)}, shapes)
    assert tuple(laid["q"].spec) == (("fsdp", "sequence"), "tensor")
    assert tuple(laid["odd"].spec) == (None,)
    assert (sharding.row_devices(mesh), sharding.token_devices(mesh), sharding.independent_devices(mesh)) == (2, 2, 4)
    alone = sharding.param_shardings(sharding.make_mesh(1, 1, 1, 4), {"q": ("embed", "heads")}, {"q": shapes["q"]})
    assert tuple(alone["q"].spec) == ("sequence", "tensor")


def table_of(count=24, seed=0, score=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(1, 128, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 60), (ids(2, 90), ids(2, 90))) for _ in range(count))


def test_row_lengths_are_shared_evenly():
    table = table_of()
    shape = pack.choose_layout(table, max_length=150, batch_size=8, parts=4)
    assert shape.length == 512
    assert pack.choose_layout(table, max_length=150, batch_size=8, parts=3).length % 384 == 0
    with pytest.raises(UserError, match=r"data.row_length 640: with mesh.sequence 4 give a multiple of 512"):
        pack.choose_layout(table, max_length=150, batch_size=8, length=640, parts=4)


def test_pmap_has_whole_rows():
    with pytest.raises(UserError, match=r"set mesh.fsdp, mesh.tensor and mesh.sequence to 1"):
        sharding.pmap_collectives(sharding.make_mesh(2, 1, 1, 2))


# Trajectories.

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SUM = [{"name": "bco", "beta": 0.5, "weight": 0.5}, {"name": "aot", "beta": 0.5}, {"name": "dpo", "ld_alpha": 0.5}]


def run(sizes, loss=SUM, config=LLAMA, remat="none", steps=2, score=False):
    """Returns reference log-probs, metrics of an evaluation and of each step, and the state, on a mesh."""
    model, loss = build_model(family(config["model_type"]).architecture(config), remat=remat), losses.build(loss)
    tx, table = optim.build("rmsprop", learning_rate=1e-3, warmup_steps=1), table_of()
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[: int(np.prod(sizes))]).reshape(*sizes[:2], sizes[3], sizes[2]),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
    )
    start = jax.jit(model.init)(jax.random.key(0))
    sync = Sync(1, 0.5)
    state = init_state(start, tx, loss, jax.tree.map(lambda x: 0.9 * x, start))
    shape = pack.choose_layout(table, max_length=240, batch_size=len(table), rows=2, length=512)
    batch, count, _ = pack.build_batch(table, np.arange(len(table)), shape)
    assert count > 1
    params = sharding.param_shardings(mesh, model.axes, start)
    shared = sharding.mesh_collectives(mesh, (params, None))
    split = gather_on_use(model, shared, params)
    where = sharding.state_shardings_like(mesh, params, state)
    state = sharding.put_params(jax.device_get(state), where)
    own = sharding.mesh_collectives(mesh, params)
    ref_logps = reference.make_ref_logps_fn(losses_fn(split), own)
    step = jax.jit(make_train_step(split, loss, tx, collectives=shared, sync=sync), out_shardings=(where, None))
    evaluate = jax.jit(make_eval_step(split, loss, collectives=shared))
    out, batch = [], sharding.put_batch(mesh, batch)
    for _ in range(steps):
        batch = batch._replace(ref_logps=ref_logps(state.reference, batch, np.int32(count)))
        out.append((batch.ref_logps, evaluate(state.params, batch, np.int32(count), state.running)))
        state, metrics = step(state, batch, np.int32(count))
        out.append(metrics)
    return jax.device_get((out, state))


def losses_fn(model):
    from dpo_jax.logprobs import batch_logps

    return lambda params, micro: batch_logps(model, params, micro)
