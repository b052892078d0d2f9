"""Layouts over devices: what is sent between them, and that the trajectory is one."""

import runpy
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from jax.sharding import AxisType

from dpo_jax import losses, models, optim, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import batch_logps
from dpo_jax.loop import in_parts
from dpo_jax.records import Tokens, UserError
from dpo_jax.step import init_state, make_train_step

ROOT = Path(__file__).parent.parent
collectives = runpy.run_path(str(ROOT / "scripts" / "_collectives.py"))["collectives"]
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
ROWS, BATCH = 12, 32  # no parameter has an axis of 12


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(1, 128, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 12), (ids(2, 20), ids(2, 20))) for _ in range(64))


@pytest.fixture(scope="module")
def compiled(table):
    """Returns `(data, fsdp, tensor) -> (collectives, shapes of parameters, program)` of the step, each made once."""
    made = {}

    def get(*sizes, compute="float32"):
        key = (*sizes, compute)
        if key not in made:
            made[key] = compile_step(table, sizes, compute)
        return made[key]

    return get


def compile_step(table, sizes, compute):
    model = models.build(models.family("llama").architecture(CONFIG), compute=compute)
    mesh, tx = sharding.make_mesh(*sizes), optim.build("rmsprop", learning_rate=1e-3, warmup_steps=2)
    shapes = jax.eval_shape(lambda k: init_state(model.init(k), tx), jax.random.key(0))
    params = sharding.of_params(mesh, model.axes, shapes.params)
    where = sharding.of_state(mesh, params, shapes)
    state = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    shape = pack.choose(table, max_length=32, batch_size=BATCH, rows=ROWS, length=128)
    batch = jax.eval_shape(lambda: pack.build(table, np.arange(BATCH), shape)[0])
    rows = sharding.split_rows(mesh, (params, None))
    step = make_train_step(
        partial(batch_logps, in_parts(model, rows, params)), losses.build({"name": "dpo", "beta": 0.5}), tx, rows=rows
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of_batch(mesh)), batch)
    out = (where, sharding.replicated(mesh))
    program = jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch, np.int32(1)).compile()
    return collectives(program.as_text()), shapes.params, program


def elements(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_data_parallel_sums_the_gradient_once_a_step(compiled):
    """Not once a microbatch, and nothing else is sent but the sum of the weights and what losses see, in one piece."""
    found, params, _ = compiled(4, 1, 1)
    assert {c.loops for c in found} == {0}
    scalars, gradient = sorted((c for c in found if c.kind == "all-reduce"), key=lambda c: c.bytes)
    assert scalars.bytes == 4
    (logps,) = [c for c in found if c.kind != "all-reduce"]
    assert logps.kind == "all-gather"
    assert [sizes[-1] for _, sizes in logps.shapes] == [18]  # numbers for each comparison
    shapes = sorted(sizes for _, sizes in gradient.shapes if sizes)
    assert shapes == sorted(x.shape for x in jax.tree.leaves(params))


def test_fsdp_gathers_a_layer_at_a_time_and_nothing_else(compiled):
    """Every gather is of one layer's parameter or of one outside the layers; every gradient goes to its part."""
    found, params, _ = compiled(1, 4, 1)
    layer = {x.shape[1:] for x in jax.tree.leaves(params["layers"])}
    top = {v.shape for k, v in params.items() if k in ("embedding", "head")} | {(32,)}
    (logps,) = [c for c in found if c.kind == "all-gather" and c.loops == 0]
    gathers = [c for c in found if c.kind == "all-gather" and c is not logps]
    assert {c.shapes[0][1] for c in gathers if c.loops == 2} == layer
    assert {c.shapes[0][1] for c in gathers if c.loops == 1} == top
    assert {len(c.shapes) for c in gathers} == {1}
    scatters = [c for c in found if c.kind == "reduce-scatter"]
    assert elements_of(scatters, 2) == elements(params["layers"]) // 3 // 4
    assert elements_of(scatters, 1) == elements({k: v for k, v in params.items() if k != "layers"}) // 4
    rest = [c for c in found if c.kind not in ("all-gather", "reduce-scatter")]
    assert {c.kind for c in rest} == {"all-reduce"}
    assert {sizes for c in rest for _, sizes in c.shapes} == {()}  # metrics and the gradient's norm
    assert {c.loops for c in rest} == {0}


def elements_of(found, loops):
    return sum(int(np.prod(sizes)) for c in found if c.loops == loops for _, sizes in c.shapes)


def test_tensor_parallel_never_gathers_a_parameter(compiled):
    found, _, _ = compiled(1, 1, 4)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "all-to-all"}
    # Two key-value heads cannot be split over four devices: their kernels' gradients are put together, once a step.
    whole = [c for c in found if c.kind == "all-gather" and not any(ROWS in sizes for _, sizes in c.shapes)]
    assert {(c.loops, *c.shapes) for c in whole} <= {(0, ("f32", (3, 32, 2, 8)))}


def test_logits_of_a_split_vocabulary_are_never_put_together(compiled):
    """Of the logits of 12 rows only their log-sum-exp and the target's are sent: one number a token."""
    found, _, _ = compiled(1, 1, 4)
    assert not [c for c in found for _, sizes in c.shapes if ROWS in sizes and sizes[-1] == 128]
    assert [c for c in found for _, sizes in c.shapes if c.loops == 2 and len(sizes) == 2 and sizes[0] == ROWS]


def test_with_both_fsdp_gathers_leave_tensor_parts_alone(compiled):
    found, params, _ = compiled(1, 2, 2)
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {c.devices for c in gathers} == {2}
    sizes = {c.shapes[0][1] for c in gathers}
    assert (32, 24) in sizes  # an MLP of 48, half on each of two devices
    assert (64, 32) in sizes  # 128 words, half on each
    assert not sizes & {(32, 48), (128, 32)}
    assert elements({k: v for k, v in params.items() if k == "head"}) == 128 * 32


def test_whole_parameters_are_not_kept_for_the_backward_pass(compiled):
    """No array of the compiled program holds a parameter of all layers whole; nor, in bfloat16, its copy."""
    for compute, dtype in (("float32", "f32"), ("bfloat16", "bf16")):
        _, params, program = compiled(1, 4, 1, compute=compute)
        text = program.as_text()
        for leaf in (x for x in jax.tree.leaves(params["layers"]) if x.ndim > 2):  # small ones are like anything
            assert f"{dtype}[{','.join(map(str, leaf.shape))}]" not in text


ACROSS = [{"name": "aot", "beta": 0.5}, {"name": "bco", "beta": 0.5, "weight": 0.5}, {"name": "dpo"}]


def two_steps(table, sizes, mapped=False):
    """Returns the metrics and the state after two steps on a mesh, or under pmap, as host arrays."""
    model, loss = models.build(models.family("llama").architecture(CONFIG)), losses.build(ACROSS)
    tx = optim.build("rmsprop", learning_rate=1e-3, warmup_steps=2)
    devices, kinds = jax.devices()[: int(np.prod(sizes))], (AxisType.Auto,) * 3
    mesh = jax.make_mesh(sizes, sharding.AXES, devices=devices, axis_types=kinds)
    start = jax.jit(model.init)(jax.random.key(0))
    state = init_state(start, tx, terms=len(ACROSS))
    shape = pack.choose(table, max_length=32, batch_size=BATCH, rows=4, length=128)
    reference = np.random.default_rng(0).normal(size=(len(table), 2, 1)).astype(np.float32) - 60
    batch, count, _ = pack.build(table, np.arange(BATCH), shape, np.repeat(reference, 2, axis=2))
    if mapped:
        pure = make_train_step(partial(batch_logps, model), loss, tx, rows=sharding.mapped_rows(mesh))
        step = jax.pmap(pure, sharding.MAPPED, in_axes=(None, 1, None), out_axes=None)
        batch = jax.tree.map(lambda x: x.reshape(x.shape[0], sizes[0], -1, *x.shape[2:]), batch)
    else:
        params = sharding.of_params(mesh, model.axes, start)
        rows = sharding.split_rows(mesh, (params, None))
        step = jax.jit(make_train_step(partial(batch_logps, in_parts(model, rows, params)), loss, tx, rows=rows))
        state = sharding.put(jax.device_get(state), sharding.of_state(mesh, params, state))
        batch = sharding.put_batch(mesh, batch)
    assert count > 1
    for _ in range(2):
        state, metrics = step(state, batch, np.int32(count))
    return jax.device_get((metrics, state))


@pytest.mark.parametrize("layout", [(4, 1, 1), (1, 2, 1), (2, 1, 2), "pmap"], ids=str)
def test_a_loss_across_comparisons_sees_those_of_all_devices(table, layout):
    """Ranks and means are of the whole step, and each device goes backward from its own comparisons' slopes."""
    metrics, state = two_steps(table, (1, 1, 1))
    found = two_steps(table, (4, 1, 1), mapped=True) if layout == "pmap" else two_steps(table, layout)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), metrics, found[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, found[1].params)
    np.testing.assert_allclose(state.running, found[1].running, atol=1e-6)
    assert state.running[1] != 0


def test_pmap_is_for_whole_parameters():
    with pytest.raises(UserError, match="every device holds all parameters"):
        sharding.mapped_rows(sharding.make_mesh(2, 2, 1))


# The command line on many devices.

LAYOUTS = {
    "two devices": (2, []),
    "four devices, pmap": (4, ["--mesh.mode", "pmap"]),
    "8x1x1": (8, []),
    "1x8x1": (8, ["--mesh.data", "1", "--mesh.fsdp", "8"]),
    "2x2x2": (8, ["--mesh.fsdp", "2", "--mesh.tensor", "2"]),
    "rows of a microbatch: 1": (1, ["--data.rows", "1"]),
    "rows of a microbatch: 3": (1, ["--data.rows", "3"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a small run, done on one device."""
    folder = runs.make_world(tmp_path_factory.mktemp("layouts"))
    runs.finish(runs.start(folder, "one"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_trajectory(world, layout):
    devices, options = LAYOUTS[layout]
    name = "".join(c for c in layout if c.isalnum())
    runs.finish(runs.start(world, name, *options, devices=devices))
    runs.assert_one_trajectory(world, name)


@pytest.mark.slow
def test_a_checkpoint_resumes_on_any_other_layout(world):
    """Ten steps on 2x2x2, five under pmap, the rest on two processes with fsdp: the trajectory of one device."""
    mixed, split = ["--mesh.fsdp", "2", "--mesh.tensor", "2"], ["--mesh.data", "1", "--mesh.fsdp", "4"]
    runs.finish(runs.start(world, "moved", "--max-steps", "10", *mixed, devices=8))
    runs.finish(runs.start(world, "moved", "--max-steps", "15", "--mesh.mode", "pmap", devices=4))
    out, _ = runs.finish(runs.start(world, "moved", *split, launch=runs.launch_local(2, 2)))
    assert "resuming at step 15 of 20" in out
    runs.assert_one_trajectory(world, "moved")


def test_two_processes_train_as_one(world):
    """Each builds its own rows and holds its own part of the parameters; one of them writes."""
    out, _ = runs.finish(runs.start(world, "two", "--mesh.fsdp", "2", launch=runs.launch_local(2, 1)))
    assert out.count("20 steps of 16 comparisons") == 1
    runs.assert_one_trajectory(world, "two")


@pytest.mark.slow
def test_four_processes_train_as_one(world):
    runs.finish(runs.start(world, "four", "--mesh.fsdp", "4", launch=runs.launch_local(4, 2)))
    runs.assert_one_trajectory(world, "four")
