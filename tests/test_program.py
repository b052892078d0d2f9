"""Reading compiled programs: short texts whose collectives, bytes and repetitions are known."""
# ruff: noqa: E501 (lines of programs are as XLA writes them)

import pytest

from dpo_jax.training.program import Collective, axes_of, collectives, custom_calls

TPU = """
HloModule jit_step, is_scheduled=true

%layer_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused_start (x: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) tuple(%x, %all-gather.1)
}

%fused_done (x: bf16[2,8]) -> bf16[8,8] {
  ROOT %all-gather.2 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%layer (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %async-collective-start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%a), kind=kCustom, calls=%fused_start
  %async-collective-done = bf16[8,8]{1,0} fusion(%b), kind=kCustom, calls=%fused_done
  %reduce-scatter.1 = f32[2,8]{1,0:T(8,128)S(1)} reduce-scatter(%c), channel_id=8, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add, metadata={op_name="jit(step)/while/body/while/body/reduce_scatter"}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %d)
}

%step_condition (p: (s32[], s32[])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%microbatch (p: (s32[], s32[])) -> (s32[], s32[]) {
  %while.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t), condition=%layer_condition, body=%layer
  ROOT %t = (s32[], s32[]) tuple(%i, %n)
}

ENTRY %main (p: f32[]) -> f32[] {
  %while.2 = (s32[]{:T(128)}, s32[]{:T(128)}) while(%t), condition=%step_condition, body=%microbatch, metadata={op_name="jit(step)/while"}
  %all-reduce.1 = (f32[2,8]{1,0:T(8,128)}, /*index=1*/f32[5]{0:T(256)}) all-reduce(%a, %b), channel_id=9, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %all-reduce.2 = f32[]{:T(128)} all-reduce(%c), channel_id=10, replica_groups={}, to_apply=%add
  %all-reduce.3 = f32[]{:T(128)} all-reduce(%c), channel_id=10, replica_groups={{0},{1}}, to_apply=%add
  ROOT %r = f32[]{:T(128)} add(%all-reduce.2, %all-reduce.2)
}
"""

GPU = """
HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-gather-start = ((f32[128]{0}, bf16[1,4]{1,0}), (f32[512]{0}, bf16[4,4]{0,1})) all-gather-start(%a, %b), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":false}}
  %all-gather-done = (f32[512]{0}, bf16[4,4]{0,1}) all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[512]{0}), f32[128]{0}) reduce-scatter-start(%c), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %d)
}

ENTRY %main (p: f32[]) -> f32[] {
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce-start = f32[64]{0} all-reduce-start(%a), channel_id=3, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}, to_apply=%add
  %send = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %r = f32[] add(%x, %x)
}
"""
SIZES = {"data": 2, "fsdp": 4, "tensor": 1}


def test_a_tpu_program_is_counted_as_often_as_it_runs():
    found = collectives(TPU, 8, (4,))
    assert [(c.kind, c.times, c.loops, c.overlapped) for c in found] == [
        ("all-gather", 12, 2, True),  # in three layers of four microbatches; its two parts are one
        ("reduce-scatter", 12, 2, False),
        ("all-reduce", 1, 0, False),
        ("all-reduce", 1, 0, False),
    ]
    assert [c.shapes for c in found][:3] == [
        (("bf16", (8, 8)),), (("f32", (2, 8)),), (("f32", (2, 8)), ("f32", (5,)))
    ]  # fmt: skip
    assert [c.bytes for c in found] == [128, 64, 84, 4]
    # A ring: (n - 1) / n of the whole, twice for a sum. The last one is of all eight devices.
    assert [c.sent for c in found] == [128 * 3 / 4, 64 * 3, 84, 2 * 4 * 7 / 8]
    assert [axes_of(c, SIZES) for c in found] == ["fsdp", "fsdp", "data", "data x fsdp"]
    assert found[1].path.endswith("while/body/reduce_scatter")


def test_a_loop_of_unknown_length_runs_once_unless_told():
    assert [c.times for c in collectives(TPU, 8)][:2] == [3, 3]


# As a TPU's compiler writes a gradient of [30, 8] that eight devices scatter: padded to 32, and a slice of 4 for each.
SCATTERED = """
%all-reduce-scatter.1 (input: f32[30,8]) -> f32[4,8] {
  %pad = f32[32,8]{1,0:T(8,128)} pad(%input, %zero), padding=0_2x0_0
  %all-reduce.1 = f32[32,8]{1,0:T(8,128)} all-reduce(%pad), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,8]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.1, %multiply.2, %zero), dynamic_slice_sizes={4,8}
}

%start (input: (f32[32,8], f32[16])) -> (f32[4,8], f32[2]) {
  %all-reduce.2 = (f32[32,8]{1,0}, f32[16]{0}) all-reduce(%a, %b), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add, frontend_attributes={chain_id="5"}
  %one = f32[32,8]{1,0} get-tuple-element(%all-reduce.2), index=0
  %two = f32[16]{0} get-tuple-element(%all-reduce.2), index=1
  %dynamic-slice.2 = f32[4,8]{1,0} dynamic-slice(%one, %i, %zero), dynamic_slice_sizes={4,8}
  %dynamic-slice.3 = f32[2]{0} dynamic-slice(%two, %i), dynamic_slice_sizes={2}
  ROOT %t = (f32[4,8]{1,0}, f32[2]{0}) tuple(%dynamic-slice.2, %dynamic-slice.3)
}

%both (input: f32[32]) -> (f32[32], f32[4]) {
  %all-reduce.3 = f32[32]{0} all-reduce(%input), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %dynamic-slice.4 = f32[4]{0} dynamic-slice(%all-reduce.3, %i), dynamic_slice_sizes={4}
  ROOT %t = (f32[32]{0}, f32[4]{0}) tuple(%all-reduce.3, %dynamic-slice.4)
}

ENTRY %main (p: f32[]) -> f32[] {
  %fusion.1 = f32[4,8]{1,0:T(8,128)S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = (f32[4,8]{1,0}, f32[2]{0}) fusion(%g), kind=kCustom, calls=%start
  %fusion.3 = (f32[4,8]{1,0}, f32[2]{0}) fusion(%g), kind=kCustom, calls=%start
  %fusion.4 = (f32[32]{0}, f32[4]{0}) fusion(%g), kind=kCustom, calls=%both
  %all-reduce.5 = f32[32,8]{1,0} all-reduce(%pad), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.5 = f32[4,8]{1,0} dynamic-slice(%all-reduce.5, %i, %zero), dynamic_slice_sizes={4,8}
}
"""


def test_a_fusion_that_keeps_slices_of_a_sum_scatters_it():
    found = collectives(SCATTERED, 8)
    assert [(c.kind, c.shapes, c.overlapped) for c in found] == [
        ("reduce-scatter", (("f32", (4, 8)),), False),
        ("reduce-scatter", (("f32", (4, 8)), ("f32", (2,))), True),  # in two parts
        ("all-reduce", (("f32", (32,)),), False),  # its whole is used too
        ("all-reduce", (("f32", (32, 8)),), False),  # outside a fusion the whole is in memory
    ]
    assert [c.sent for c in found] == [7 * 128, 7 * (128 + 8), 2 * 128 * 7 / 8, 2 * 1024 * 7 / 8]


BRANCHES = """
%small (p: f32[8]) -> f32[8] {
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add
}

%large (p: f32[8]) -> f32[8] {
  %all-reduce.2 = f32[8]{0} all-reduce(%p), channel_id=2, replica_groups={}, to_apply=%add
  ROOT %all-reduce.3 = f32[4]{0} all-reduce(%p), channel_id=3, replica_groups={}, to_apply=%add
}

%nothing (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (p: f32[]) -> f32[] {
  %conditional.1 = f32[8]{0} conditional(%i, %a, %a, %a), branch_computations={%small, %large, %nothing}
  ROOT %conditional.2 = f32[8]{0} conditional(%b, %a, %a), true_computation=%small, false_computation=%nothing
}
"""


def test_a_step_takes_the_branch_that_sends_the_most():
    assert [(c.bytes, c.sent) for c in collectives(BRANCHES, 2)] == [(32, 32.0), (16, 16.0), (32, 32.0)]


def test_branches_may_have_parts_of_one_collective_each():
    """With one chain_id in all lines, the third is part of the second, but none of the second is part of the first."""
    chained = BRANCHES.replace("to_apply=%add", 'to_apply=%add, frontend_attributes={chain_id="0"}')
    chained = chained.replace("%all-reduce.2 = f32[8]", "%all-reduce.2 = f32[16]")
    assert [c.bytes for c in collectives(chained, 2)] == [64, 32]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 8), ("s4", 4), ("u4", 4), ("u8", 8), ("f8e4m3fn", 8), ("f8e5m2", 8), ("bf16", 16), ("s16", 16),
     ("u16", 16), ("f32", 32), ("c64", 64), ("f64", 64), ("c128", 128), ("f4e2m1fn", 4), ("token", 0)],
)  # fmt: skip
def test_a_dtypes_name_says_its_bits(dtype, size):
    line = f"  %all-gather.1 = {dtype}[6,4]{{1,0}} all-gather(%a), channel_id=1, replica_groups={{{{0,1}}}}"
    (found,) = collectives(f"ENTRY %main (p: f32[]) -> f32[] {{\n{line}\n}}", 2)
    assert found.bytes == 24 * size // 8


SLICED = """
ENTRY %main (p: f32[]) -> f32[] {
  %all-reduce.1 = f32[16]{0:T(256)} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-reduce.2 = f32[]{:T(128)} all-reduce(%a), channel_id=4, replica_groups={}, to_apply=%add
  %send = (f32[49,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%b, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[49,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %r = f32[] add(%x, %x)
}
"""


def test_what_a_slice_gets_from_the_others_is_a_collective():
    within, all_of_it, across = collectives(SLICED, 8, slices=2)
    assert [axes_of(c, SIZES) for c in (within, all_of_it, across)] == ["fsdp", "fsdp", "data"]
    assert [c.sent for c in (within, all_of_it)] == [2 * 64 * 3 / 4, 2 * 4 * 3 / 4]
    assert across[:3] == ("all-reduce", (("f32", (49, 8, 128)),), ((0, 4), (1, 5), (2, 6), (3, 7)))
    assert across.sent == 4 * 49 * 8 * 128


def sliced(target, name, whole, part):
    """A program that has `part` of an array and gets its whole, or the reverse."""
    told = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{name}"'
    return f"""
ENTRY %main (p: f32[]) -> f32[] {{
  %send = (f32[{part}]{{0}}, u32[], token[]) send(%b, %after), channel_id=2, frontend_attributes={{{told}}}
  %recv = (f32[{whole}]{{0}}, u32[], token[]) recv(%after), channel_id=1, frontend_attributes={{{told}}}
  ROOT %r = f32[] add(%x, %x)
}}
"""


def test_what_slices_exchange_is_counted_by_its_results():
    """Of 4,096 bytes a device sends the half that it has, or the half that another sums; the ids are those of TPUs."""
    whole, half, all_of_them = 1024, 512, '"{1,2}x{0:1}"'
    (gathered,) = collectives(sliced(all_of_them, "ALL_GATHER", whole, half), 4, slices=2)
    (scattered,) = collectives(sliced(all_of_them, "REDUCE_SCATTER", half, whole), 4, slices=2)
    assert [(c.kind, c.bytes, c.sent) for c in (gathered, scattered)] == [
        ("all-gather", 4096, 2048.0),
        ("reduce-scatter", 2048, 2048.0),
    ]
    pairs = "{{100000,300000},{100001,300001},{200000,400000},{200001,400001}}"  # two of four slices each
    (some,) = collectives(sliced(pairs, "ALL_REDUCE", whole, whole), 8, slices=4)
    assert (some.groups, some.sent) == (((0, 4), (1, 5), (2, 6), (3, 7)), 4096)
    arrows = "{{100000->200000},{200000->100000}}"
    (moved,) = collectives(sliced(arrows, "ONE_TO_ONE", half, half), 2, slices=2)
    assert (moved.kind, moved.groups, moved.sent) == ("collective-permute", ((0, 1), (1, 0)), 2048)


def test_a_cuda_program_starts_and_ends_its_collectives():
    found = collectives(GPU, 8)
    assert [(c.kind, c.times, c.overlapped, c.bytes) for c in found] == [
        ("all-gather", 5, True, 4 * 512 + 2 * 16),  # of two arrays, their operands left out
        ("reduce-scatter", 5, False, 4 * 128),
        ("all-reduce", 1, True, 4 * 64),
        ("collective-permute", 1, True, 12),
    ]
    assert found[2].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert axes_of(found[2], SIZES) == "data"
    assert found[3].sent == 12


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1), (2, 3), (4, 5), (6, 7)), "tensor"),
        (((0, 2), (1, 3), (4, 6), (5, 7)), "fsdp"),
        (((0, 4), (1, 5), (2, 6), (3, 7)), "data"),
        (((0, 2, 4, 6), (1, 3, 5, 7)), "data x fsdp"),
        ((tuple(range(8)),), "data x fsdp x tensor"),
    ],
)
def test_axes_are_those_in_which_the_devices_of_a_group_differ(groups, axes):
    one = Collective("all-reduce", (("f32", ()),), groups, 1, 0, False, "")
    assert axes_of(one, {"data": 2, "fsdp": 2, "tensor": 2}) == axes


def test_kernels_are_counted_by_name():
    line = '  %k = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config="..."'
    assert custom_calls(f"{line}\n{line.replace('tpu_', 'other_')}\n{line}") == {
        "tpu_custom_call": 2,
        "other_custom_call": 1,
    }
