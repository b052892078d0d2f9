"""What the compilers of TPUs and of CUDA make of collectives, and of a run's programs with flash attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import LLAMA, by_cuda, planned_texts, shapes_in, tpu_compiler
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.training.program import collectives
from dpo_jax.training.targets import parse_target, target_devices

MIB = 2**20


def compiled(target, sizes, function, given, out, *shapes):
    """Returns the text of a function of sharded arrays, for a mesh (a, b)."""
    devices = np.array(target_devices(parse_target(target))).reshape(sizes)
    mesh = Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
    where = NamedSharding(mesh, given)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    return jax.jit(mapped).lower(*arrays).compile().as_text()


@tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_a_gradient_that_a_tpu_scatters_is_sent_once(axis):
    """Of 4,096 x 11,264 float32 numbers 7 of 8 parts leave a device; a sum would send them twice.

    Along its first axis the program has a fusion with a sum inside, of 33 x 128 rows: 528 for each device, 16 too many.
    So the last device has to be sent 7 x 16 rows of its own.
    """

    def scatter(x, y):
        whole = jnp.einsum("tm,tn->mn", x, y, preferred_element_type=jnp.float32)
        return jax.lax.psum_scatter(whole, "b", scatter_dimension=axis, tiled=True)

    out = PartitionSpec(*[None] * axis, "b")
    shapes = ((8 * 2048, 4096), jnp.bfloat16), ((8 * 2048, 11264), jnp.bfloat16)
    text = compiled("tpu:v5e:2x4", (1, 8), scatter, PartitionSpec("b"), out, *shapes)
    found = collectives(text, 8)
    assert ("calls=%all-reduce-scatter" in text) == (axis == 0)
    assert [c.kind for c in found] == ["reduce-scatter", "collective-permute"][: 2 - axis]
    rows = 4096 if axis else 33 * 128
    assert [c.sent for c in found] == [7 / 8 * 4 * rows * 11264, 4 * 7 * 16 * 11264][: 2 - axis]


@tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "function", "given", "out", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "a", tiled=True), ("a",), (), 2),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "a", tiled=True), (), ("a",), 2),
        ("all-reduce", lambda x: jax.lax.psum(x, "a"), (), (), 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "a", 0, 1, tiled=True), ("a",), (None, "a"), 1),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), ("a",), ("a",), 2),
    ],
    ids=["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"],
)
def test_slices_of_tpus_send_each_other_what_the_operation_needs(kind, function, given, out, sent):
    """Of an array of 4 MiB, of which each of two slices has a half: to gather it a device sends its half."""
    specs = PartitionSpec(*given), PartitionSpec(*out)
    (found,) = collectives(
        compiled("tpu:2xv5e:2x2", (2, 4), function, *specs, ((1024, 1024), jnp.float32)), 8, slices=2
    )
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    assert (found.kind, found.sent) == (kind, sent * MIB)
    assert found.groups[:4] == pairs


@tpu_compiler
@pytest.mark.slow
def test_the_gradient_of_a_block_of_a_head_is_scattered(tmp_path):
    """Two blocks of 4,008 = 24 x 167 words are rounded up to 4,032: of 4,008 each device would get the whole sum."""
    wide = LLAMA | {"vocab_size": 8016, "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 1}
    rows = ("--data.max_length", "128", "--data.row_length", "256", "--data.rows", "8", "--batch_size", "8")
    step, _ = planned_texts(tmp_path, "tpu:v5e:2x4", *rows, "--mesh.fsdp", "8", "--mesh.data", "1", model=wide)
    found = [c for c in collectives(step, 8) if any(4032 in sizes for _, sizes in c.shapes)]
    assert {c.kind for c in found} == {"all-gather", "reduce-scatter"}


LENGTH = 1792  # of a row; neither it nor its half is another size of the model, whose largest is 512
MESHES = {"fsdp": ("--mesh.fsdp", "8"), "sequence": ("--mesh.fsdp", "4", "--mesh.sequence", "2")}


def programs(folder, target, mesh):
    """Returns the train step and the reference's pass of two layers with flash attention, for eight devices."""
    rows = ("--data.max_length", str(LENGTH // 2), "--data.row_length", str(LENGTH), "--data.rows", "8")
    return planned_texts(folder, target, *rows, "--batch_size", "32", "--model.attention", "flash", *MESHES[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("target", [pytest.param("tpu:v5e:2x4", marks=tpu_compiler), "gpu:h100:1x8"])
def test_no_program_of_a_run_has_an_array_of_length_by_length(target, mesh, tmp_path):
    """Nor of a device's queries by the keys of the row, if `sequence` shards it."""
    if target.startswith("tpu"):
        texts = programs(tmp_path, target, mesh)
    else:
        code = f"import pathlib, test_compilers as t\nfor x in t.programs(pathlib.Path({str(tmp_path)!r}), "
        texts = by_cuda(f"{code}{target!r}, {mesh!r}): print(x, end='\\0')").split("\0")[:2]
    own = LENGTH // (2 if mesh == "sequence" else 1)
    kernels = "flash_forward", "flash_query_gradient", "flash_key_gradient"
    for text, used in zip(texts, (kernels, kernels[:1]), strict=True):
        assert all(kernel in text for kernel in used)
        shapes = shapes_in(text)
        assert any(own in shape for shape in shapes)
        assert not [shape for shape in shapes if sum(n >= own for n in shape) > 1]
        assert max(map(math.prod, shapes)) < LENGTH * own  # in whatever shape
