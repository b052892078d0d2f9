"""Attention kernels: equal to a dense reference where they run, and compiled for devices that are not here."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from test_attention import PLAIN, D, H, K, R, dense, inputs, layout, visible, with_gradient

from dpo_jax import sharding
from dpo_jax.models.attention import RowMask, Scoring, packed_attention
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.flash import flash_attention
from dpo_jax.models.kernels import cudnn, splash
from dpo_jax.models.model import build_model
from dpo_jax.training.attention_check import attention_case

LLAMA = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN_MODEL = architecture_of(LLAMA)
INTERPRETED = partial(splash, interpret=True)  # the TPU kernel, run on the CPU
BY_XLA = partial(cudnn, implementation="xla")  # the call to cuDNN, executed by XLA
CALLS = {"cuda": r"__cudnn\$\w+|__gpu\$xla.gpu.triton", "tpu": "@tpu_custom_call"}


def long_case(window):
    """Rows of more than two blocks, some fully masked and some fully visible, and inputs."""
    _, rows = attention_case(PLAIN_MODEL, "float32", window)
    keys, length = jax.random.split(jax.random.key(1), 4), rows.queries.index.shape[1]
    return rows, [jax.random.normal(key, (R, length, n, D)) for key, n in zip(keys, (H, K, K, H), strict=True)]


@pytest.mark.parametrize(
    ("attend", "window", "scoring", "long"),
    [
        (INTERPRETED, 9, Scoring(0.5, 2.0), False),
        (INTERPRETED, None, PLAIN, True),
        (INTERPRETED, 9, Scoring(0.5, 2.0), True),
        (BY_XLA, 9, Scoring(0.5), False),
        (BY_XLA, None, PLAIN, True),
    ],
)
def test_equals_dense_attention_and_its_gradient(attend, window, scoring, long):
    """Splash attention itself, and the call to cuDNN."""
    rows, given = long_case(window) if long else (layout(window), inputs())
    seen = visible(rows)
    found = with_gradient(lambda *x: attend(*x, rows, scoring), *given)
    theirs = with_gradient(lambda *x: dense(*x, seen, scoring), *given)
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()))


def test_fully_masked_blocks_are_not_computed():
    """NaN in such a block would spread to every product with it."""
    rows, (q, k, v, _) = long_case(None)
    unseen = ~visible(rows)[0, 256:, :128].any()
    assert unseen  # of the first row, the last block of queries and the first of keys
    broken = k.at[0, :128].set(jnp.nan), v.at[0, :128].set(jnp.nan)
    run = jax.jit(lambda *x: INTERPRETED(*x, rows, PLAIN))
    np.testing.assert_array_equal(run(q, *broken)[0, 256:], run(q, k, v)[0, 256:])


def test_the_backward_pass_saves_no_mask():
    rows, (q, k, v, _) = long_case(9)
    length = -(-q.shape[1] // 128) * 128
    back = jax.eval_shape(lambda *x: jax.vjp(lambda *y: INTERPRETED(*y, rows, PLAIN), *x)[1], q, k, v)
    assert max(leaf.size for leaf in jax.tree.leaves(back)) == R * length * H * D < R * length**2


# Programs compiled for devices that are not here.


@pytest.fixture
def some_cudnn(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def gradient_of(attend, remat, compute="bfloat16", windows=(0, 16), length=200):
    """Returns the gradient function of a model's hidden states, and its abstract arguments."""
    model = build_model(dataclasses.replace(PLAIN_MODEL, windows=windows), compute=compute, remat=remat)
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    row = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(params, *fields):
        return model.hidden(params, *fields, attend=attend).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)), (params, row, row, row, row)


@pytest.mark.parametrize(
    ("platform", "attend", "passes"),
    [
        ("cuda", cudnn, (1, 1)),
        ("cuda", flash_attention, (1, 2)),
        ("tpu", splash, (1, 2)),
        ("tpu", flash_attention, (1, 2)),
    ],
)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_models_compile_for_a_device_and_recompute_attention_only_with_full_remat(
    platform, attend, passes, remat, some_cudnn
):
    """The kernel accepts the shapes and dtypes; the number of calls is the number of runs per layer."""
    function, args = gradient_of(attend, remat)
    text = function.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    forward, backward = passes
    assert len(re.findall(CALLS[platform], text)) == (2 if remat == "full" else 1) * forward + backward


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 1, 4)])
def test_each_device_has_its_own_heads_and_rows(sizes):
    mesh, heads, kv_heads, seen = sharding.make_mesh(*sizes), 8, 4, []

    def attend(q, k, v, rows, scoring):
        seen.append((q.shape[0], q.shape[2], k.shape[2], rows.queries.index.shape[0]))
        return packed_attention(q, k, v, rows, scoring)

    def run(attend, params, batch, count):
        q, k, v, g, *rows = (x[0] for x in batch)
        out, back = jax.vjp(lambda *x: attend(*x, RowMask.of(*rows, jnp.int32(9)), Scoring(0.5, 2.0)), q, k, v)
        return [x[None] for x in (out, *back(g))]

    one, rows = layout(9), sharding.mesh_collectives(mesh, {"w": sharding.replicated(mesh)})
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, 4, one.queries.index.shape[1], n, D) for n in (heads, kv_heads, kv_heads, heads)]
    given = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    batch = [*given, *(jnp.concatenate([x, x])[None] for x in one.queries[1:])]
    split = rows.map_rows(partial(run, sharding.shard_heads(mesh, attend)))
    found = jax.jit(split)({"w": jnp.ones(())}, jax.device_put(batch, sharding.batch_sharding(mesh)), 0)
    theirs = jax.jit(partial(run, packed_attention))({}, batch, 0)
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()))
    data, tensor = sizes[0] * sizes[1], sizes[2]
    assert set(seen) == {(4 // data, heads // tensor, kv_heads // tensor, 4 // data)}


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize(
    ("platform", "attend"), [("cuda", cudnn), ("tpu", splash), ("cuda", flash_attention), ("tpu", flash_attention)]
)
def test_kernels_compile_inside_of_split_rows(platform, attend, sizes, some_cudnn):
    """XLA cannot partition a kernel: JAX refuses it unless every axis of the mesh is manual."""
    mesh = sharding.make_mesh(*sizes)
    rows = sharding.mesh_collectives(mesh, {"w": sharding.replicated(mesh)})
    calls, attend = (2 if attend is cudnn else 3), sharding.shard_heads(mesh, attend)

    def run(params, batch, count):
        q, kv, group = batch

        def one(q, kv):
            return attend(q, kv, kv, RowMask.of(group[0], group[0] * 0), PLAIN)

        out, back = jax.vjp(one, q[0], kv[0])
        return [x[None] for x in (out, *back(out))]

    shapes = [((1, 8, 128, 4, 16), jnp.bfloat16), ((1, 8, 128, 2, 16), jnp.bfloat16), ((1, 8, 128), jnp.int32)]
    where = sharding.batch_sharding(mesh)
    batch = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    lowered = jax.jit(rows.map_rows(run)).trace({"w": jnp.ones(())}, batch, 0).lower(lowering_platforms=(platform,))
    assert len(re.findall(CALLS[platform], lowered.as_text())) == calls
