"""Layouts over devices: what is sent between them, and that the trajectory is one."""

import runpy
from functools import cache
from pathlib import Path

import jax
import launched
import numpy as np
import pytest
from tiny import for_milestones

from dpo_jax import sharding
from dpo_jax.errors import UserError

ROOT = Path(__file__).parent.parent
compiled_step = runpy.run_path(str(ROOT / "scripts" / "_collectives.py"))["compiled_step"]
ROWS = 12  # no parameter has an axis of 12
SEGMENTS = 21  # comparisons of a row, for each of which 20 numbers are sent


@pytest.fixture(scope="module")
def compiled():
    """Returns `(data, fsdp, tensor) -> (collectives, shapes of parameters, program)` of the step, each made once."""
    return cache(lambda *sizes, compute="float32": compiled_step(sizes, ROWS, compute))


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
    assert [sizes[-1] for _, sizes in logps.shapes] == [20 * SEGMENTS]  # numbers of a row
    shapes = sorted(sizes for _, sizes in gradient.shapes if sizes)
    assert shapes == sorted(x.shape for x in jax.tree.leaves(params))


def test_fsdp_gathers_a_layer_at_a_time_and_nothing_else(compiled):
    """Every gather is of one layer's parameter, the last norm, the head, or ids, whose embeddings are sent."""
    found, params, _ = compiled(1, 4, 1)
    layer = {x.shape[1:] for x in jax.tree.leaves(params["layers"])}
    top = {params["head"].shape, (32,), (4, ROWS // 4, 128)}
    (logps,) = [c for c in found if c.kind == "all-gather" and "while" not in c.path]
    gathers = [c for c in found if c.kind == "all-gather" and c is not logps]
    assert {c.shapes[0][1] for c in gathers if c.loops == 2} == layer
    assert {c.shapes[0][1] for c in gathers if c.loops < 2} == top
    assert {len(c.shapes) for c in gathers} == {1}
    scatters = [c for c in found if c.kind == "reduce-scatter"]
    assert elements_of(scatters, 2) == elements(params["layers"]) // 3 // 4
    assert elements_of(scatters, 1) == elements({k: params[k] for k in ("head", "final_norm")}) // 4
    sent = [c for c in found if c.kind == "all-to-all"]
    assert {(c.loops, sum(int(np.prod(sizes)) for _, sizes in c.shapes)) for c in sent} == {(1, ROWS // 4 * 128 * 32)}
    assert len(sent) == 2  # embeddings, and their gradients
    rest = [c for c in found if c.kind not in ("all-gather", "reduce-scatter", "all-to-all")]
    assert {c.kind for c in rest} == {"all-reduce"}
    assert {sizes for c in rest for _, sizes in c.shapes} == {()}  # metrics and the gradient's norm
    assert {c.loops for c in rest} == {0}


def elements_of(found, loops):
    return sum(int(np.prod(sizes)) for c in found if c.loops == loops for _, sizes in c.shapes)


@pytest.mark.slow
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


@pytest.mark.slow
def test_with_both_fsdp_gathers_leave_tensor_parts_alone(compiled):
    found, params, _ = compiled(1, 2, 2)
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {c.devices for c in gathers} == {2}
    sizes = {c.shapes[0][1] for c in gathers}
    assert (32, 24) in sizes  # an MLP of 48, half on each of two devices
    assert (64, 32) in sizes  # 128 words, half on each
    assert not sizes & {(32, 48), (128, 32)}
    assert elements({k: v for k, v in params.items() if k == "head"}) == 128 * 32


@pytest.mark.slow
def test_whole_parameters_are_not_kept_for_the_backward_pass(compiled):
    """No array of the compiled program holds a parameter of all layers whole; nor, in bfloat16, its copy."""
    for compute, dtype in (("float32", "f32"), ("bfloat16", "bf16")):
        _, params, program = compiled(1, 4, 1, compute=compute)
        text = program.as_text()
        for leaf in (x for x in jax.tree.leaves(params["layers"]) if x.ndim > 2):  # small ones are like anything
            assert f"{dtype}[{','.join(map(str, leaf.shape))}]" not in text


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), pytest.param((2, 2, 1), marks=pytest.mark.slow)])
def test_what_a_step_sends_is_what_the_page_says(compiled, sizes):
    """But for what losses see of each comparison, and scalars."""
    found, params, _ = compiled(*sizes)
    data, fsdp, _ = sizes
    layers, microbatches, tokens = 4 * elements(params["layers"]), 3, ROWS // (data * fsdp) * 128
    embedding = 4 * params["embedding"].size
    head = 4 * elements(params) - layers - embedding  # and the last norm; a CPU's compiler gathers both once a step
    wanted = {
        "all-gather": (fsdp > 1) * ((2 * layers + 4 * tokens * fsdp) * microbatches + head),
        "reduce-scatter": (fsdp > 1) * (layers + head) / fsdp * microbatches,
        "all-to-all": (fsdp > 1) * 2 * 4 * tokens * 32 * microbatches,
        "all-reduce": (data > 1) * (layers + head + embedding) / fsdp,
    }
    counted = dict.fromkeys(wanted, 0)
    for c in found:
        if c.kind != "all-gather" or "while" in c.path:
            counted[c.kind] += c.bytes * c.times
    # The backward pass needs the scales of two norms in a layer no second time.
    assert counted == pytest.approx(wanted, rel=0.004, abs=300)


def test_pmap_is_for_whole_parameters():
    with pytest.raises(UserError, match=r"parameters are replicated; set mesh.fsdp"):
        sharding.pmap_collectives(sharding.make_mesh(2, 2, 1))


# The command line on many devices.

LAYOUTS = {
    "two devices": (2, []),
    "four devices, pmap": (4, ["--mesh.mode", "pmap"]),
    "8x1x1": (8, []),
    "1x8x1": (8, ["--mesh.data", "1", "--mesh.fsdp", "8"]),
    "2x2x2": (8, ["--mesh.fsdp", "2", "--mesh.tensor", "2"]),
    "1x1x1x4": (4, ["--mesh.sequence", "4"]),
    "2x1x1x2": (4, ["--mesh.sequence", "2"]),
    "1x2x2x2": (8, ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.sequence", "2"]),
    "rows of a microbatch: 1": (1, ["--data.rows", "1"]),
    "rows of a microbatch: 3": (1, ["--data.rows", "3"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a small run, done on one device."""
    folder = launched.make_world(tmp_path_factory.mktemp("layouts"), warmup_steps=10)
    launched.finish(launched.start(folder, "one"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", for_milestones(LAYOUTS, "four devices, pmap", "1x2x2x2"))
def test_one_trajectory(world, layout):
    devices, options = LAYOUTS[layout]
    name = "".join(c for c in layout if c.isalnum())
    launched.finish(launched.start(world, name, *options, devices=devices))
    launched.assert_one_trajectory(world, name)


@pytest.mark.slow
def test_adapters_and_the_divergence_are_the_same_with_split_rows(world):
    """LoRA's reference is its base, of other parameters than the policy; `eval_kl` reads completions of the policy."""
    options = ["--lora.rank", "4", "--samples.kl_prompts", "8", "--max_steps", "6"]
    split = ["--mesh.fsdp", "2", "--mesh.sequence", "2"]
    launched.finish(launched.start(world, "lora", *options))
    launched.finish(launched.start(world, "lora split", *options, *split, devices=4))
    for a, b in zip(launched.lines(world, "lora split"), launched.lines(world, "lora"), strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "eval_loss", "eval_kl", "logps/chosen", "grad_norm"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=3e-4, abs=1e-4), (a["step"], key)
    assert b["eval_kl"] != 0


@pytest.mark.slow
def test_a_checkpoint_resumes_on_any_other_layout(world):
    """Ten steps on 2x2x2, five under pmap, the rest on two processes with fsdp: the trajectory of one device.

    The two processes share every row: each device has a part of its tokens.
    """
    mixed, split = ["--mesh.fsdp", "2", "--mesh.tensor", "2"], ["--mesh.fsdp", "1", "--mesh.sequence", "4"]
    launched.finish(launched.start(world, "moved", "--max-steps", "10", *mixed, devices=8))
    launched.finish(launched.start(world, "moved", "--max-steps", "15", "--mesh.mode", "pmap", devices=4))
    out, _ = launched.finish(launched.start(world, "moved", *split, launch=launched.launch_local(2, 2)))
    assert "resuming at step 15 of 20" in out
    launched.assert_one_trajectory(world, "moved")


@pytest.mark.slow
def test_two_processes_train_as_one(world):
    """Each builds its own rows and holds its own part of the parameters; one of them writes."""
    out, _ = launched.finish(launched.start(world, "two", "--mesh.fsdp", "2", launch=launched.launch_local(2, 1)))
    assert out.count("20 steps of 16 comparisons") == 1
    launched.assert_one_trajectory(world, "two")


@pytest.mark.slow
@pytest.mark.milestone
def test_four_processes_train_as_one(world):
    launched.finish(launched.start(world, "four", "--mesh.fsdp", "4", launch=launched.launch_local(4, 2)))
    launched.assert_one_trajectory(world, "four")
