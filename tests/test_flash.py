"""Attention in O(T) memory: equal to dense attention where it runs, and compiled programs without an array of T x T."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import by_cuda, shapes_in, tpu_compiler
from test_attention import PLAIN, dense, inputs, layout, visible, with_gradient
from test_kernels import gradient_of, long_case

from dpo_jax import sharding
from dpo_jax.data import pack
from dpo_jax.data.encode import encode
from dpo_jax.data.sources import hh
from dpo_jax.models import flash_gpu, flash_tpu
from dpo_jax.models.attention import RowMask, Scoring, packed_attention, visible_keys
from dpo_jax.models.blocks import block_attention
from dpo_jax.models.flash import flash_attention
from dpo_jax.models.flash_blocks import LARGEST, Blocks, lists_of, padded_ids, visible_blocks
from dpo_jax.models.model import _attend_all as attend_all
from dpo_jax.training.targets import parse_target, target_devices

PLATFORMS = ("tpu", "gpu")
REAL = (
    (flash_tpu, "BLOCK", flash_tpu.BLOCK),
    (flash_gpu, "BLOCK", flash_gpu.BLOCK),
    (flash_tpu, "HEADS", flash_tpu.HEADS),
)
CAPPED = Scoring(0.5, 2.0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that short rows have several, and few heads in a step."""
    for (module, name, _), value in zip(REAL, (128, 32, 3), strict=True):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def real_blocks(small_blocks, monkeypatch):
    """The blocks and heads of a real run."""
    for setting in REAL:
        monkeypatch.setattr(*setting)


def interpreted(platform):
    return partial(flash_attention, platform=platform, interpret=True)


def assert_close(found, expected, tolerance=3e-6):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max()))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("window", "scoring", "long"),
    [
        (9, CAPPED, False),
        pytest.param(None, PLAIN, True, marks=pytest.mark.slow),
        pytest.param(40, CAPPED, True, marks=pytest.mark.slow),
    ],
)
def test_equals_dense_attention_and_its_gradient(platform, window, scoring, long):
    """Packed comparisons of one to three responses and padding, six heads for two of keys, lengths of no full block."""
    rows, given = long_case(window) if long else (layout(window), inputs())
    found = with_gradient(lambda *x: interpreted(platform)(*x, rows, scoring), *given)
    seen = visible(rows)
    assert_close(found, with_gradient(lambda *x: dense(*x, seen, scoring), *given))


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "dtype", "tolerance"),
    [
        pytest.param(64, 4, 4, "float32", 1e-5, marks=pytest.mark.milestone),
        pytest.param(80, 2, 2, "float32", 1e-5, marks=pytest.mark.milestone),
        (96, 6, 2, "float32", 1e-5),
        pytest.param(128, 4, 1, "float32", 1e-5, marks=pytest.mark.milestone),
        pytest.param(256, 2, 1, "float32", 1e-5, marks=pytest.mark.milestone),
        pytest.param(80, 12, 1, "bfloat16", 0.02, marks=pytest.mark.milestone),
        (128, 4, 2, "bfloat16", 0.02),
    ],
)
def test_every_head_dimension_equals_chunks(platform, dim, heads, kv_heads, dtype, tolerance, real_blocks):
    """On a row of one long segment, and one of two comparisons; more heads than one step of a TPU takes."""
    parts = [[(1, 0, 90), (1, 1, 80)], [(1, 0, 20), (1, 1, 30), (1, 2, 25), (2, 0, 40), (2, 1, 45), (0, 0, 10)]]
    rows = RowMask.of(*(jnp.array([[x[i] for x in row for _ in range(x[2])] for row in parts]) for i in (0, 1)))
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 170, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    given = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]
    scoring = Scoring(2 * dim**-0.5)
    found = with_gradient(lambda *x: interpreted(platform)(*x, rows, scoring), *given)
    exact = [x.astype(jnp.float32) for x in given]
    assert [x.dtype for x in found] == [jnp.dtype(dtype)] * 4
    assert_close(
        [x.astype(jnp.float32) for x in found],
        with_gradient(lambda *x: packed_attention(*x, rows, scoring), *exact),
        tolerance,
    )


def part_of(ids, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], ids)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_queries_may_be_a_part_of_the_row(platform):
    """As where devices share a row: a part of the output, and its part of the gradients of all keys."""
    rows, (q, k, v, g) = layout(9), inputs()
    start, stop = 40, 61
    few = rows._replace(queries=part_of(rows.queries, start, stop))
    part = with_gradient(
        lambda q, k, v: interpreted(platform)(q, k, v, few, CAPPED),
        *(q[:, start:stop], k, v, g[:, start:stop]),
    )
    only = jnp.zeros_like(g).at[:, start:stop].set(g[:, start:stop])
    whole = with_gradient(lambda *x: packed_attention(*x, rows, CAPPED), q, k, v, only)
    assert_close(part, [whole[0][:, start:stop], whole[1][:, start:stop], *whole[2:]])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_devices_that_share_rows_have_the_attention_of_whole_rows(platform):
    """Four devices with two of eight blocks each: the output and its gradients, keys and values all-gathered."""
    mesh = sharding.make_mesh(1, 1, 1, 4)
    shared = sharding.mesh_collectives(mesh, {"w": sharding.replicated(mesh)})
    split, given = shared.split, [x[:, :72] for x in inputs()]
    ids, window = part_of(layout(9).queries, 0, 72), jnp.int32(9)

    def body(params, batch, count):
        ids, *whole = (jax.tree.map(lambda x: x[0], field) for field in batch)
        own, order = split.own(ids.index)[0], split.in_order(ids.index)[0]
        mask = RowMask(jax.tree.map(split.own, ids), jax.tree.map(split.in_order, ids), window)
        q, k, v, g = (x[:, own] for x in whole)
        found = with_gradient(lambda *x: attend_all(interpreted(platform), split, *x, mask, CAPPED), q, k, v, g)
        every = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in found)
        return tuple(jnp.zeros_like(x).at[:, order].set(x)[None] for x in every)

    batch = jax.tree.map(lambda x: x[None], (ids, *given))
    found = jax.jit(shared.map_rows(body))({"w": jnp.ones(())}, batch, 0)
    rows = RowMask(ids, ids, window)
    assert_close([x[0] for x in found], with_gradient(lambda *x: packed_attention(*x, rows, CAPPED), *given))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_query_that_sees_nothing_gets_0_and_no_gradient(platform):
    """Here the keys are those of the last 35 tokens, of which the first 40 queries see none."""
    rows, (q, k, v, g) = layout(), inputs()
    few = rows._replace(keys=part_of(rows.keys, 40, 75))
    out, dq, dk, dv = with_gradient(
        lambda q, k, v: interpreted(platform)(q, k, v, few, CAPPED),
        *(q, k[:, 40:], v[:, 40:], g),
    )
    assert not out[:, :40].any()
    assert not dq[:, :40].any()
    assert out[:, 40:].any((2, 3)).all()
    assert all(jnp.isfinite(x).all() and x.any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_blocks_of_which_nothing_is_seen_are_not_computed(platform):
    """NaN in such a block would spread to every product with it, forward and backward."""
    rows, (q, k, v, _) = long_case(None)
    assert not visible(rows)[0, 256:, :128].any()
    broken = [x.at[0, :128].set(jnp.nan) for x in (k, v)]
    run = jax.jit(lambda *x: jax.vjp(lambda *y: interpreted(platform)(*y, rows, PLAIN), *x)[0])
    np.testing.assert_array_equal(run(q, *broken)[0, 256:], run(q, k, v)[0, 256:])


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_sink_is_a_key_of_value_0_that_all_see(platform):
    rows, (q, k, v, g) = layout(), inputs()
    sinks, seen = jnp.linspace(-2.0, 3.0, q.shape[2]), visible(rows)

    def ours(q, k, v, sinks):
        return interpreted(platform)(q, k, v, rows, PLAIN, sinks)

    def theirs(q, k, v, sinks):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.where(seen[:, None], jnp.einsum("rqhd,rkhd->rhqk", q, k) * PLAIN.scale, -jnp.inf)
        column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        p = jax.nn.softmax(jnp.concatenate([scores, column], -1), axis=-1)[..., :-1]
        return jnp.einsum("rhqk,rkhd->rqhd", p, v)

    found, expected = (jax.jit(lambda *x, f=f: (f(*x), *jax.vjp(f, *x)[1](g)))(q, k, v, sinks) for f in (ours, theirs))
    assert_close(found, expected, 5e-6)


def test_the_backward_pass_saves_output_and_log_sum_exp_only():
    rows, (q, k, v, _) = long_case(9)
    back = jax.eval_shape(lambda *x: jax.vjp(lambda *y: interpreted("tpu")(*y, rows, PLAIN), *x)[1], q, k, v)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(back))
    r, t, h, _ = q.shape
    ids = [1] + [r * t] * 6  # window; index, segments, branches and positions, some of them the same array
    assert sizes[-5:] == sorted([r * t * h, k.size, v.size, q.size, q.size])
    assert sum(sizes[:-5]) <= 2 * sum(ids)


# Which blocks are visited.


def random_rows(seed, length):
    """Returns RowMask of a row: comparisons of random lengths, prompts of one to three responses, padding."""
    rng, parts, segment = np.random.default_rng(seed), [], 0
    while sum(n for *_, n in parts) < length:
        segment += 1
        sizes = rng.integers(1, rng.choice([20, 90]), size=rng.integers(2, 5))
        prompt = sizes[0]
        parts += [(segment, branch, 0 if branch == 0 else prompt, n) for branch, n in enumerate(sizes)]
    rows = np.array([(s, b, start + i) for s, b, start, n in parts for i in range(n)])[:length]
    rows[length - rng.integers(0, 20) :, :] = 0
    segments, branches, positions = (jnp.asarray(x[None], jnp.int32) for x in rows.T)
    return RowMask.of(segments, branches, positions, jnp.int32(rng.integers(1, 120)) if seed % 2 else None)


@pytest.mark.parametrize("seed", range(12))
def test_all_blocks_with_a_visible_pair_are_visited_and_few_others(seed):
    rows, block = random_rows(seed, 320), Blocks(16, 32)
    ids = rows.queries
    found = visible_blocks(
        padded_ids(ids, block.queries, -1), padded_ids(ids, block.keys, LARGEST), rows.window, block
    )[0]
    needed = visible_keys(rows)[0].reshape(20, 16, 10, 32).any((1, 3))
    assert not (needed & ~found).any()
    assert (found & ~needed).sum() <= (0 if rows.window is None else 0.25 * needed.sum())


def test_lists_have_the_visited_blocks_first_and_in_order():
    visited = jnp.array([[[True, False, True, True], [False, False, False, False], [False, True, False, False]]])
    found = lists_of(visited)
    assert found.counts.tolist() == [[3, 0, 1]]
    assert found.blocks[0, 0, :3].tolist() == [0, 2, 3]
    assert found.blocks[0, 2, 0] == 1


@pytest.mark.parametrize(("length", "rows", "block"), [(100, 2, 128), (2048, 2, 256), (131072, 1, 512)])
def test_lists_of_long_rows_fit_in_the_scalar_memory_of_a_tpu(length, rows, block, real_blocks):
    x = jax.ShapeDtypeStruct((rows, length, 8, 128), jnp.bfloat16)
    found = flash_tpu.TPU.blocks(x, x)
    assert found == (block, block)
    assert 4 * rows * math.ceil(length / block) ** 2 <= 1 << 18


@pytest.mark.parametrize(("kv_heads", "shared"), [(8, 1), (12, 1), (2, 3), (32, 4), (8, 7), (4, 8), (1, 71)])
def test_a_step_of_a_tpu_has_whole_groups_of_heads(kv_heads, shared, real_blocks):
    """All query heads of several key-value heads, or a part of those of one."""
    for block, head_bytes, most in ((256, 256, 8), (512, 256, 4), (256, 1024, 2), (128, 128, 8)):
        step = flash_tpu.step_of(kv_heads, shared, block, head_bytes)
        assert kv_heads % step.kv_heads == shared % step.shared == 0
        assert step.kv_heads == 1 or step.shared == shared
        assert len(list(step.heads())) <= most


@pytest.mark.slow
def test_the_share_of_scores_that_are_computed_on_real_rows(shared):
    """Of HH's helpful-base, packed as for training: of all T x T scores. Chunks compute 56% and 53%."""
    from transformers import AutoTokenizer  # imported late: it takes seconds to import

    items = itertools.islice(hh.read((str(shared / "data" / "hh" / "helpful-base"),), "test", 2), 600)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "pythia")
    options = {"truncation": "paper_keep_end", "degenerate": "drop", "add_bos": None}
    table, _ = encode(items, tokenizer, max_length=512, max_prompt_length=256, **options)
    found = {}
    for length in (1024, 2048):
        sizes = pack.choose_layout(table, max_length=512, batch_size=64, length=length, rows=1)
        batches = [pack.build_batch(table, np.arange(i, i + 64), sizes) for i in range(0, 512, 64)]
        segments, branches = (
            jnp.asarray(np.concatenate([getattr(batch, name)[:count, 0] for batch, count, _ in batches]))
            for name in ("segment_ids", "branch_ids")
        )
        ids = RowMask.of(segments, branches).queries
        for size in (64, 128, 256):
            places = padded_ids(ids, size, -1), padded_ids(ids, size, LARGEST)
            found[length, size] = round(float(visible_blocks(*places, None, Blocks(size, size)).mean()), 2)
    assert found == {
        (1024, 64): 0.23,
        (1024, 128): 0.31,
        (1024, 256): 0.47,
        (2048, 64): 0.14,
        (2048, 128): 0.19,
        (2048, 256): 0.27,
    }


# Programs compiled for devices that are not here.

LENGTH = 1408  # a number that nothing else in the programs has


def compiled_gradient(target, attend=flash_attention):
    """Returns the text of the gradient of a model of two layers, one with a window, for one device of a target."""
    devices = target_devices(parse_target(target))
    place = jax.sharding.SingleDeviceSharding(devices[0])
    function, given = gradient_of(attend, "dots", length=LENGTH)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given)
    return function.lower(*shapes).compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "call"),
    [
        pytest.param("tpu:v5e:2x2", 'custom_call_target="tpu_custom_call"', marks=tpu_compiler),
        ("gpu:h100:1x1", "__gpu$xla.gpu.triton"),
    ],
)
def test_no_compiled_program_has_an_array_of_length_by_length(target, call, real_blocks):
    if target.startswith("tpu"):
        text = compiled_gradient(target)
    else:
        text = by_cuda(f"import test_flash\nprint(test_flash.compiled_gradient({target!r}))")
    shapes = shapes_in(text)
    assert max(math.prod(shape) for shape in shapes) < LENGTH**2
    assert not [shape for shape in shapes if sum(n == LENGTH for n in shape) > 1]
    assert text.count(call) == 3
    for kernel in ("flash_forward", "flash_query_gradient", "flash_key_gradient"):
        assert kernel in text


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param("tpu:v5e:2x2", marks=tpu_compiler), "gpu:h100:1x1"])
def test_nor_has_a_compiled_program_of_blocks_to_which_auto_falls_back(target):
    if target.startswith("tpu"):
        text = compiled_gradient(target, block_attention)
    else:
        text = by_cuda(f"import test_flash as t\nprint(t.compiled_gradient({target!r}, t.block_attention))")
    shapes = shapes_in(text)
    assert max(math.prod(shape) for shape in shapes) < LENGTH**2
    assert not [shape for shape in shapes if sum(n == LENGTH for n in shape) > 1]


def compiled_memory(target, attend, rows, length, heads, kv_heads):
    """Returns the MiB that output and gradients of one layer's attention need beside inputs and outputs."""
    place = jax.sharding.SingleDeviceSharding(target_devices(parse_target(target))[0])

    def run(q, k, v, g, segment_ids, branch_ids):
        mask = RowMask.of(segment_ids, branch_ids)
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, Scoring(0.1)), q, k, v)
        return out, back(g)

    def shape(count, dtype, *rest):
        return jax.ShapeDtypeStruct((rows, length, *count, *rest), dtype, sharding=place)

    q, k = (shape((n,), jnp.bfloat16, 128) for n in (heads, kv_heads))
    ids = shape((), jnp.int32)
    memory = jax.jit(run).lower(q, k, k, q, ids, ids).compile().memory_analysis()
    return memory.temp_size_in_bytes / 2**20


# MiB, of the table in dpo_jax/models/README.md; compilers of later days need not give the same.
MEMORY = [
    ("tpu:v5e:2x2", "flash_attention", (2, 2048, 32, 32), 36),
    ("tpu:v5e:2x2", "block_attention", (2, 2048, 32, 32), 259),
    ("tpu:v5e:2x2", "flash_attention", (1, 8192, 32, 8), 128),
    ("tpu:v5e:2x2", "block_attention", (1, 8192, 32, 8), 257),
    ("gpu:h100:1x1", "flash_attention", (1, 8192, 32, 8), 2),
    ("gpu:h100:1x1", "block_attention", (1, 8192, 32, 8), 339),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "attend", "sizes", "expected"), MEMORY)
def test_the_memory_of_one_layers_attention(target, attend, sizes, expected, real_blocks):
    if target.startswith("tpu"):
        found = compiled_memory(target, globals()[attend], *sizes)
    else:
        found = float(by_cuda(f"import test_flash as t\nprint(t.compiled_memory({target!r}, t.{attend}, *{sizes}))"))
    assert found == pytest.approx(expected, rel=0.1, abs=1)
