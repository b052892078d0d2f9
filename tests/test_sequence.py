"""Rows whose tokens are split over devices: the attention, the layout, and trajectories against whole rows."""

import functools
import math
import re
import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_attention import D, dense, inputs, layout, visible, with_gradient

from dpo_jax import losses, optim, reference, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.logprobs import _Columns, _own_columns, batch_logps
from dpo_jax.models import reward_head
from dpo_jax.models.attention import RowMask, Scoring
from dpo_jax.models.blocks import block_attention, blocks_seen
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Sync, Tokens
from dpo_jax.step import init_state, make_eval_step, make_train_step
from dpo_jax.training.shard import gather_on_use

ROOT = Path(__file__).parent.parent
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
    assert int(count.sum()) == sum(map(len, computed)) <= int(seen.sum()) + 3


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


def table_of(count=24):
    rng = np.random.default_rng(0)

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
    with pytest.raises(UserError, match=r"set mesh.fsdp, mesh.tensor, mesh.sequence and mesh.expert to 1"):
        sharding.pmap_collectives(sharding.make_mesh(2, 1, 1, 2))


def test_every_scored_token_is_on_one_device():
    """Of responses of two tokens to prompts of one, 16 tokens of a row predict up to 22."""
    table = Table.of(Tokens(np.full(1, 1), (np.array([2, 3]), np.array([4, 5]))) for _ in range(21))
    shape = pack.Layout(1, 1, 64, 21, 128)
    batch, _, _ = pack.build_batch(table, np.arange(21), shape)
    mesh = sharding.make_mesh(1, 1, 1, 4)
    shared = sharding.mesh_collectives(mesh, {"w": sharding.replicated(mesh)})

    def body(params, batch, count):
        given = _Columns(batch.source[0], batch.target[0], batch.slot[0], batch.slot[0] < 0, ())
        own = _own_columns(shared.split, given, 64, 21)
        read = jnp.take_along_axis(shared.split.own(batch.tokens[0]), own.source, axis=1)
        each = jnp.stack([*own[1:3], read])
        return jax.lax.all_gather(jnp.where(own.slot >= 0, each, -1), "sequence")[None]

    found = jax.jit(shared.map_rows(body))({"w": jnp.ones(())}, sharding.put_batch(mesh, batch), 0)
    # 4 devices x (target, slot, the token that predicts it); a prompt's 1 predicts 2 and 4, these predict 3 and 5.
    columns = np.moveaxis(np.asarray(found)[0], 1, -1).reshape(-1, 3)
    columns = sorted(map(tuple, columns[columns[:, 1] >= 0].tolist()))
    assert columns == sorted(
        (target, 2 * g + p, read)
        for g in range(21)
        for p in (0, 1)
        for target, read in ((2 + 2 * p, 1), (3 + 2 * p, 2 + 2 * p))
    )


# Trajectories.


def test_a_sum_over_parts_passes_its_gradient_on_once():
    """psum's own transpose would multiply it by the number of devices."""
    mesh = sharding.make_mesh(1, 1, 1, 4)
    shared = sharding.mesh_collectives(mesh, {"w": sharding.replicated(mesh)})

    def body(params, batch, count):
        (own,) = batch
        value, slope = jax.value_and_grad(lambda x: jnp.sin(shared.split.sum(x.sum())))(shared.split.own(own))
        return value[None, None], jax.lax.all_gather(slope, "sequence")[:, 0][None]

    value, slope = jax.jit(shared.map_rows(body))({"w": jnp.ones(())}, jnp.ones((1, 1, 16)), 0)
    np.testing.assert_allclose(value, np.sin(16.0), rtol=1e-5)
    np.testing.assert_allclose(slope, np.cos(16.0), rtol=1e-5)


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
GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
MODELS = {"llama": LLAMA, "gemma2": GEMMA2, "reward": LLAMA}
# Ranks and a running mean of all comparisons, the shared part of responses, and weights that ask for the confidence.
SUM = [{"name": "bco"}, {"name": "aot"}, {"name": "dpo", "ld_alpha": 0.5}, {"name": "ipo", "wpo": True}]


@functools.cache
def two_steps(name, sizes, remat="none"):
    """Returns what two steps on a mesh (data, fsdp, tensor, sequence) give, and the state.

    Before each step, the log-probs of a moving reference and an evaluation.
    """
    architecture, reward = family(MODELS[name]["model_type"]).architecture(MODELS[name]), name == "reward"
    architecture = reward_head.as_reward_architecture(architecture) if reward else architecture
    model = build_model(architecture, remat=remat)
    loss = losses.build({"name": "bradley_terry"} if reward else SUM)
    tx, table = optim.build("rmsprop", learning_rate=1e-3, warmup_steps=1), table_of()
    data, fsdp, tensor, sequence = sizes
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(data, fsdp, 1, sequence, tensor)
    mesh = jax.sharding.Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
    start = jax.jit(model.init)(jax.random.key(0))
    state = init_state(start, tx, loss, jax.tree.map(lambda x: 0.9 * x, start))
    shape = pack.choose_layout(table, max_length=240, batch_size=len(table), rows=2, length=512)
    batch, count, _ = pack.build_batch(table, np.arange(len(table)), shape)
    params = sharding.param_shardings(mesh, model.axes, start)
    shared, own = (sharding.mesh_collectives(mesh, tree) for tree in ((params, None), params))
    split, where = gather_on_use(model, shared, params), sharding.state_shardings_like(mesh, params, state)
    state, batch, count = sharding.put_params(jax.device_get(state), where), sharding.put_batch(mesh, batch), count
    step = make_train_step(split, loss, tx, collectives=shared, sync=None if reward else Sync(1, 0.5))
    step, evaluate = (
        jax.jit(step, out_shardings=(where, None)),
        jax.jit(make_eval_step(split, loss, collectives=shared)),
    )
    ref_logps = reference.make_ref_logps_fn(partial(batch_logps, split), own)
    assert count > 1
    out = []
    for _ in range(2):
        if not reward:
            batch = batch._replace(ref_logps=ref_logps(state.reference, batch, np.int32(count)))
        out += [batch.ref_logps, evaluate(state.params, batch, np.int32(count), state.running)]
        state, metrics = step(state, batch, np.int32(count))
        out += [metrics]
    return jax.device_get((out, state))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "remat"),
    [
        pytest.param("llama", (1, 1, 1, 4), "none", marks=pytest.mark.milestone),
        pytest.param("llama", (2, 1, 1, 2), "dots", marks=pytest.mark.milestone),
        ("gemma2", (1, 2, 1, 2), "full"),
        pytest.param("gemma2", (1, 1, 2, 2), "none", marks=pytest.mark.milestone),
        ("reward", (1, 1, 1, 4), "none"),
    ],
    ids=str,
)
def test_one_trajectory(name, sizes, remat):
    """Reference, evaluation, metrics and parameters are those of one device; with windows and caps for Gemma 2."""
    (out, state), (expected, alone) = two_steps(name, sizes, remat), two_steps(name, (1, 1, 1, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), out, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, alone.params)
    np.testing.assert_allclose(state.running, alone.running, atol=1e-6)
    assert all(metrics["grad_norm"] > 0.1 for metrics in out[2::3])


# The program.


@pytest.fixture(scope="module")
def program():
    """Returns the collectives of the step of rows of 512 tokens over 4 devices, its shapes and its text."""
    compiled = runpy.run_path(str(ROOT / "scripts" / "_collectives.py"))["compiled_step"]
    found, params, made = compiled((1, 1, 1, 4), 2, length=512)
    return found, params, made.as_text()


def test_keys_and_values_of_a_layer_are_all_that_tokens_send(program):
    """Beside parameters: gathered forward and again backward, their gradients scattered; one number per response."""
    found, params, _ = program
    layer = {x.shape[1:] for x in jax.tree.leaves(params["layers"])}
    sent = [(c.kind, *c.shapes[0][1]) for c in found if c.loops == 2 and c.shapes[0][1] not in layer]
    assert sent.count(("all-gather", 2, 512, 2, 8)) == 4
    assert sent.count(("reduce-scatter", 2, 128, 2, 8)) == 2
    # All other reduce-scatters are of parameters' gradients, a quarter of each.
    parts = [c for c in found if c.kind == "reduce-scatter" and c.shapes[0][1] != (2, 128, 2, 8)]
    count = {loops: sum(math.prod(c.shapes[0][1]) for c in parts if c.loops == loops) for loops in (1, 2)}
    sizes = jax.tree.map(lambda x: x.size, params)
    layers = sum(jax.tree.leaves(sizes.pop("layers"))) // 3
    ends = sum(jax.tree.leaves(sizes)) - sizes["embedding"]  # whose gradient is exchanged as that of its tokens
    assert count == {2: layers // 4, 1: ends // 4}
    rest = [c for c in found if c.kind == "all-reduce" and c.loops]
    assert [(c.loops, len(c.shapes[0][1])) for c in rest] == [(1, 3)]  # [R, G, P]


def test_each_device_has_the_activations_and_logits_of_its_tokens(program):
    """No array has the width of the model, or the vocabulary, for all tokens of a row."""
    _, _, text = program
    shapes = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    assert not [s for s in shapes if (s[:2] == (2, 512) or 1024 in s) and s[-1] in (32, 48, 128)]
    logits = [s[1] for s in shapes if len(s) == 3 and s[0] == 2 and s[2] == 128]
    assert 128 <= max(logits) <= 128 + 32  # the tokens of a device, and a second response to each prompt
