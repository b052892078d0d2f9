"""Kernels of attention: equal to a dense reference where they can run, refused where they differ or fail."""

import dataclasses
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from test_attention import PLAIN, D, H, K, R, dense, inputs, layout, visible, with_gradient

from dpo_jax import admit, config, losses, models, prepare, reference, sharding
from dpo_jax.experiments import setup
from dpo_jax.models.attention import Scoring, packed_attention
from dpo_jax.models.kernels import KERNELS, cudnn, splash
from dpo_jax.records import UserError

LLAMA = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN_MODEL = models.architecture_of(LLAMA)
MODEL = dataclasses.replace(PLAIN_MODEL, windows=(0, 16), score_cap=5.0)
INTERPRETED = partial(splash, interpret=True)  # the TPU's kernel, run on a processor
BY_XLA = partial(cudnn, implementation="xla")  # what is asked of cuDNN, done by XLA
CALLS = {"cuda": r"__cudnn\$\w+", "tpu": "@tpu_custom_call"}


def has(monkeypatch, attend, name="splash"):
    """Makes this processor one that has a kernel."""
    monkeypatch.setitem(KERNELS, name, KERNELS[name]._replace(platform=jax.default_backend(), attend=attend))


def long_case(window):
    """Rows of more than two blocks, some of which nobody sees and some of which all see, and inputs."""
    _, rows = admit.case(PLAIN_MODEL, "float32", window)
    keys, length = jax.random.split(jax.random.key(1), 4), rows.group.shape[1]
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
    """Splash's kernel itself, and what is asked of cuDNN."""
    rows, given = long_case(window) if long else (layout(window), inputs())
    seen = visible(rows)
    found = with_gradient(lambda *x: attend(*x, rows, scoring), *given)
    theirs = with_gradient(lambda *x: dense(*x, seen, scoring), *given)
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()))


def test_blocks_of_which_nothing_is_seen_are_not_computed():
    """What is NaN there would be seen in everything it is multiplied with."""
    rows, (q, k, v, _) = long_case(None)
    unseen = ~visible(rows)[0, 256:, :128].any()
    assert unseen  # of the first row, the last block of queries and the first of keys
    broken = k.at[0, :128].set(jnp.nan), v.at[0, :128].set(jnp.nan)
    run = jax.jit(lambda *x: INTERPRETED(*x, rows, PLAIN))
    np.testing.assert_array_equal(run(q, *broken)[0, 256:], run(q, k, v)[0, 256:])


def test_the_backward_pass_keeps_no_mask():
    rows, (q, k, v, _) = long_case(9)
    length = -(-q.shape[1] // 128) * 128
    back = jax.eval_shape(lambda *x: jax.vjp(lambda *y: INTERPRETED(*y, rows, PLAIN), *x)[1], q, k, v)
    assert max(leaf.size for leaf in jax.tree.leaves(back)) == R * length * H * D < R * length**2


# Attention that is wrong in one way each.


def _blind(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows._replace(branch=rows.branch * 0), scoring)


def _neighbours(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows._replace(group=jnp.minimum(rows.group, 1)), scoring)


def _wide(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows if rows.window is None else rows._replace(window=rows.window + 1), scoring)


def _hot(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows, scoring._replace(scale=1.1 * scoring.scale))


def _uncapped(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows, scoring._replace(cap=None))


def _other_heads(q, k, v, rows, scoring):
    return packed_attention(q, k[:, :, ::-1], v[:, :, ::-1], rows, scoring)


def _untaught(q, k, v, rows, scoring):
    return packed_attention(q, jax.lax.stop_gradient(k), v, rows, scoring)


def _nan(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows, scoring).at[0, 0].set(jnp.nan)


WRONG = [_blind, _neighbours, _wide, _hot, _uncapped, _other_heads, _untaught, _nan]


@pytest.mark.parametrize(("wrong", "compute"), [*((wrong, "bfloat16") for wrong in WRONG), (_wide, "float32")])
def test_a_wrong_kernel_is_refused(wrong, compute, monkeypatch):
    has(monkeypatch, wrong)
    assert admit.refusal("splash", MODEL, compute).startswith("is not equal to chunks here (the ")


@pytest.mark.parametrize(("model", "compute"), [(MODEL, "float32"), (PLAIN_MODEL, "bfloat16")])
def test_a_right_kernel_is_admitted(model, compute, monkeypatch):
    has(monkeypatch, INTERPRETED)
    assert admit.refusal("splash", model, compute) == ""


def test_exact_and_chunks_are_compared_with_each_other_too():
    """Their distance is that of the dtype's rounding."""
    for compute, low, high in (("float32", 0.0, 2e-6), ("bfloat16", 1e-3, 1e-2)):
        found = np.asarray(admit.distances(packed_attention, PLAIN, *admit.case(PLAIN_MODEL, compute)))
        assert (found[:, 0] == found[:, 1]).all()
        assert (low <= found).all()
        assert (found <= high).all()


def test_what_cannot_run_says_why():
    here = jax.default_backend()
    other = "splash" if here == "gpu" else "cudnn"
    platform = KERNELS[other].platform
    assert admit.refusal(other, PLAIN_MODEL, "bfloat16") == f"runs on a {platform}, and this is a {here}"


def test_an_error_of_a_kernel_is_said_in_one_line(monkeypatch):
    class MosaicError(Exception):
        """As Pallas raises: of no kind of error."""

    def fails(*_):
        raise MosaicError("no layout\nmore of it")

    has(monkeypatch, fails)
    assert admit.refusal("splash", PLAIN_MODEL, "float32") == "fails here (MosaicError: no layout)"
    has(monkeypatch, BY_XLA, "cudnn")
    said = "fails here (NotImplementedError: cannot cap scores, which this model does)"
    assert admit.refusal("cudnn", MODEL, "bfloat16") == said
    said = "takes bfloat16, and model.compute is float32"
    assert admit.refusal("cudnn", PLAIN_MODEL, "float32") == said


def test_heads_that_cannot_be_shared(monkeypatch):
    has(monkeypatch, packed_attention)
    said = "cannot share 2 key-value heads evenly among 4 devices (mesh.tensor)"
    assert admit.refusal("splash", PLAIN_MODEL, "float32", 4) == said
    with pytest.raises(UserError, match=re.escape(said)):
        choose("splash", sharding.make_mesh(1, 1, 4))


def choose(attention, mesh=None):
    return admit.with_attention(models.build(PLAIN_MODEL), config.Model(attention=attention), mesh)


def test_chunks_are_what_a_processor_has():
    assert config.Model().attention == "auto"
    if jax.default_backend() == "cpu":
        model, said = choose("auto")
        assert (model.attention, said) == ("chunks", "")
        with pytest.raises(UserError, match=r"^model.attention: splash runs on a tpu, and this is a cpu; take chunks"):
            choose("splash")


def test_auto_takes_the_devices_kernel_and_says_so(monkeypatch):
    ran = []

    def attend(*args):
        ran.append(args[0].shape)
        return packed_attention(*args)

    has(monkeypatch, attend)
    model, said = choose("auto")
    assert (model.attention, said) == ("splash", "attention: splash, which equals chunks on this device")
    ran.clear()
    row = jnp.ones((1, 4), jnp.int32)
    jax.eval_shape(lambda k: model.hidden(model.init(k), row, row, row, row), jax.random.key(0))
    assert set(ran) == {(1, 4, 4, 16)}
    ran.clear()
    model, said = choose("chunks")
    assert (model.attention, said, ran) == ("chunks", "", [])


def test_auto_falls_back_and_says_why_where_a_name_is_an_error(monkeypatch):
    has(monkeypatch, _blind)
    model, said = choose("auto")
    assert model.attention == "chunks"
    assert said.startswith("attention: chunks, as splash is not equal to chunks here (the output is ")
    with pytest.raises(UserError, match=r"^model.attention: splash is not equal to chunks here .*; take chunks, or"):
        choose("splash")


def test_experiments_refuse_a_kernel():
    settings = setup.Frontier(reward="happy", model=config.Model(path="x", attention="cudnn"))
    with pytest.raises(UserError, match=r"model.attention: cudnn: experiments compute it by chunks"):
        setup.check(settings)


def test_a_reference_column_is_of_one_kernel():
    table = SimpleNamespace(digest="d")
    keys = {reference.key(table, "w", "bfloat16", name) for name in ("chunks", "splash", "cudnn")}
    assert len(keys) == 3
    assert reference.key(table, "w", "bfloat16") in keys


# Programs for devices that are not here.


@pytest.fixture
def some_cudnn(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def gradient_of(attend, remat, compute="bfloat16", windows=(0, 16)):
    """Returns the gradient of a model's hidden states, and what it is of."""
    model = models.build(dataclasses.replace(PLAIN_MODEL, windows=windows), compute=compute, remat=remat)
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    row = jax.ShapeDtypeStruct((2, 200), jnp.int32)

    def loss(params, *fields):
        return model.hidden(params, *fields, attend=attend).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)), (params, row, row, row, row)


@pytest.mark.parametrize(("platform", "attend", "passes"), [("cuda", cudnn, (1, 1)), ("tpu", splash, (1, 2))])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_models_compile_for_a_device_and_do_no_pass_twice_but_with_full_remat(
    platform, attend, passes, remat, some_cudnn
):
    """The kernel takes the shapes and dtypes; how often it is called is how often a layer runs it."""
    function, args = gradient_of(attend, remat)
    text = function.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    forward, backward = passes
    assert len(re.findall(CALLS[platform], text)) == (2 if remat == "full" else 1) * forward + backward


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize(("platform", "attend"), [("cuda", cudnn), ("tpu", splash)])
def test_kernels_compile_inside_of_split_rows(platform, attend, sizes, some_cudnn):
    """XLA cannot split a kernel: JAX refuses one that is not called where every axis of the mesh is manual."""
    mesh = sharding.make_mesh(*sizes)
    rows = sharding.split_rows(mesh, {"w": sharding.replicated(mesh)})
    attend = sharding.split_heads(mesh, attend)

    def run(params, batch, count):
        q, kv, group = batch

        def one(q, kv):
            return attend(q, kv, kv, layout()._replace(group=group[0], branch=group[0] * 0), PLAIN)

        out, back = jax.vjp(one, q[0], kv[0])
        return [x[None] for x in (out, *back(out))]

    shapes = [((1, 8, 128, 4, 16), jnp.bfloat16), ((1, 8, 128, 2, 16), jnp.bfloat16), ((1, 8, 128), jnp.int32)]
    where = sharding.of_batch(mesh)
    batch = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    lowered = jax.jit(rows.each(run)).trace({"w": jnp.ones(())}, batch, 0).lower(lowering_platforms=(platform,))
    assert len(re.findall(CALLS[platform], lowered.as_text())) == (2 if platform == "cuda" else 3)


def test_runs_of_a_sweep_do_not_share_a_kernel(monkeypatch):
    """Several runs in one program are a further axis of rows, which kernels do not all take."""
    sizes, loss = [], losses.build({"name": "dpo"})
    monkeypatch.setattr(prepare, "at_once", lambda count: count)
    monkeypatch.setattr(jax.lax, "map", lambda function, xs, batch_size=None: sizes.append(batch_size) or 1 / 0)
    for name in ("chunks", "splash"):
        run = SimpleNamespace(config=config.Config(), model=SimpleNamespace(attention=name), loss=loss)
        parts = SimpleNamespace(mesh=sharding.make_mesh(), rows=sharding.ALONE, model=None)
        with pytest.raises(ZeroDivisionError):
            prepare.compiled_step(run, parts, {}, 2)([{}, {}], {}, 0, None, [{}, {}])
    assert sizes == [2, None]


# On a device that has one.


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_of_this_device(name, compute):
    kernel = KERNELS[name]
    if jax.default_backend() != kernel.platform:
        pytest.skip(f"no {kernel.platform} here, on which {name} would be compared with chunks")
    if compute not in kernel.dtypes:
        pytest.skip(f"{name} does not take {compute}")
    model = MODEL if name == "splash" else dataclasses.replace(MODEL, score_cap=None, head_dim=64)
    assert admit.refusal(name, model, compute) == ""
