"""Targets: their names and numbers, meshes over slices, times by data sheets, what TPUs' compiler makes of a step."""

import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from compilers import tpu_compiler

from dpo_jax import cli, sharding
from dpo_jax.commands.target import collective_rows, speed_advice
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data.pack import Layout
from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture, Mixture
from dpo_jax.training import attention_check, plan, plan_records, targets
from dpo_jax.training.program import Collective, axes_of
from dpo_jax.training.roofline import Passes, leaves, matmul_weights, roofline, score_work, step_work
from dpo_jax.training.targets import CHIPS, Chip, Target, gpu_text, parse_target

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2}
LLAMA |= {"intermediate_size": 384, "max_position_embeddings": 512, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("text", "target", "devices"),
    [
        ("tpu:v5p:4x4x4", Target("v5p", 1, (4, 4, 4)), 64),
        ("tpu:2xv5p:4x4x4", Target("v5p", 2, (4, 4, 4)), 128),
        ("tpu:tpu7x:2x2x2", Target("tpu7x", 1, (2, 2, 2)), 16),  # two of a chip
        ("gpu:h100:1x8", Target("h100", 1, (1, 8)), 8),
        ("gpu:h100:4x8", Target("h100", 4, (1, 8)), 32),  # a host is a slice of its own
        ("gpu:2xb200:9x4", Target("b200", 2, (9, 4)), 72),
    ],
)
def test_a_text_names_a_target(text, target, devices):
    found = parse_target(text)
    assert found == target
    assert len(found.groups) == devices
    assert len(set(found.groups)) == target.slices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p:4x4x4", "write tpu:v5p:4x4x4"),
        ("tpu:v5p", "has no shape; write tpu:v5p:4x4x4"),
        ("gpu:h100:8", "write hosts x GPUs of each, as in gpu:h100:1x8"),
        ("gpu:h100:0x8", "has no devices; every number must be at least 1"),
        ("tpu:0xv5e:2x2", "has no devices; every number must be at least 1"),
        ("tpu:h100:1x8", "h100 is not known; choose one of v4, v5e, v5p, v6e, tpu7x"),
        ("gpu:v100:1x8", "v100 is not known; choose one of a100, h100, h200, b200"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_target(text)


def test_data_sheets_have_sources_and_plausible_ratios():
    """Every chip multiplies some hundred numbers for each byte of memory, and its links are slower than its memory."""
    for name, chip in CHIPS.items():
        assert chip.source
        assert 100 < chip.peak / chip.bandwidth < 600, name
        assert chip.network < chip.link < chip.bandwidth
        assert 2**34 <= chip.memory < 2**38
    assert CHIPS["tpu7x"].device().peak == 2307e12 / 2  # JAX sees two devices in a chip
    assert set(targets.GPUS) == {name for name, chip in CHIPS.items() if chip.platform == "gpu"}


def test_cuda_gets_a_gpus_numbers_as_text():
    text = gpu_text("h200")
    assert "major: 9 " in text
    assert f"device_memory_size: {143_771 * 2**20}" in text
    assert "memory_bandwidth: 4800000000000\n" in text
    assert text.count("{") == text.count("}") == 4
    assert "core_count: 108 " in gpu_text("a100")


@pytest.mark.parametrize(("target", "extra"), [("tpu:v5e:2x4", "aot-tpu"), ("gpu:h100:1x8", "aot-gpu")])
def test_a_compiler_that_is_not_installed_is_one_line(monkeypatch, target, extra):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"not installed; run: pip install 'dpo_jax\[{extra}\]'"):
        targets.target_devices(parse_target(target))
    # Before the model is looked for, which need not be there.
    with pytest.raises(UserError, match="not installed"):
        cli.run_command(["plan", "configs/paper/hh_dpo.yaml", "--target", target])


def fake(platform, slices, hosts, chips, told=True):
    """Devices in the order of their ids; those of a slice are told apart by `slice_index` if `told`."""
    where = [(s, s * hosts + h) for s in range(slices) for h in range(hosts) for _ in range(chips)]
    return [
        SimpleNamespace(
            platform=platform, device_kind="fake", id=i, process_index=process, slice_index=s if told else 0
        )
        for i, (s, process) in enumerate(where)
    ]  # fmt: skip


def test_only_data_leaves_a_slice():
    devices = fake("gpu", slices=4, hosts=1, chips=8)
    for sizes in ((4, 8, 1, 1, 1), (4, 4, 1, 1, 2), (8, 2, 1, 2, 1), (4, 2, 4, 1, 1), (32, 1, 1, 1, 1)):
        laid = sharding.device_layout(sizes, devices, sharding.link_groups(devices))
        assert sorted(d.id for d in laid.flat) == list(range(32))
        inner = laid.reshape(sizes[0], -1)
        assert all(len({d.slice_index for d in row}) == 1 for row in inner)
        # Neighbours along data, other than at the edge of a slice, are in one slice.
        assert [d.slice_index for d in inner[:, 0]] == sorted(d.slice_index for d in inner[:, 0])


def test_an_axis_that_must_leave_a_slice_is_told(caplog):
    devices = fake("gpu", slices=4, hosts=1, chips=8)
    caplog.set_level("INFO")
    laid = sharding.device_layout((2, 16, 1, 1, 1), devices, sharding.link_groups(devices))
    assert [len({d.slice_index for d in row}) for row in laid.reshape(2, -1)] == [2, 2]
    assert "mesh.fsdp spans 2 slices or machines; make mesh.data a multiple of 4" in caplog.text
    assert sharding.axes_across((6, 4), 8) == [2, 4]
    with pytest.raises(UserError, match=r"slices or machines have \[8, 4\] devices; use equal ones"):
        sharding.device_layout((12, 1, 1, 1, 1), devices[:12], [0] * 8 + [1] * 4)


def test_groups_of_gpus_are_machines():
    assert sharding.link_groups(fake("gpu", 2, 2, 4, told=False)) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert sharding.link_groups(fake("gpu", 2, 2, 4)) == [0] * 8 + [1] * 8  # slices of two machines
    assert sharding.link_groups(fake("gpu", 1, 8, 1, told=False)) == [0] * 8  # a process a GPU says nothing
    assert sharding.link_groups(fake("cpu", 1, 4, 2, told=False)) == [0] * 8
    assert sharding.link_groups(fake("tpu", 1, 4, 4)) == [0] * 16


TINY = Architecture(
    family="llama", vocab=100, width=8, layers=3, heads=2, kv_heads=1, head_dim=4, mlp=16, norm="rms", eps=1e-5,
    activation="silu", gated=True, rope=None, parallel=False, qkv_bias=False, out_bias=False, mlp_bias=False,
    tied=False, max_positions=64,
)  # fmt: skip
SHAPE = Layout(microbatches=2, rows=4, length=10, segments=2, scored=5)


def work(adapters=False, remat="none", extra=0, model=TINY, experts=1):
    numbers = {"state": 1000, "gradients": 100, "itemsize": 2, "devices": 4, "split": 2, "experts": experts}
    return step_work(model, SHAPE, Passes(adapters, remat, extra), **numbers)


def test_work_in_closed_form():
    weights = 3 * (8 * (2 + 2) * 4 + 2 * 4 * 8 + 3 * 8 * 16)
    assert matmul_weights(TINY) == weights
    layers, attention, head = 2 * weights * 80, 4 * 3 * 2 * 4 * 8 * 55, 2 * 8 * 100 * 40
    forward = layers + attention + head
    one = work()
    assert (one.tokens, one.useful) == (80, 3 * forward)
    assert one.executed == 3 * forward + head + attention / 2
    assert work(remat="full").executed == one.executed + layers + attention
    assert work(adapters=True).useful == 2 * (layers + head) + 3 * attention
    assert work(extra=1).useful == one.useful  # a pass of the reference trains nothing
    assert work(extra=1).executed == one.executed + forward
    own = 2 * 1100 + 2 * 100 * 2
    through = 4 * 8 + (2 * 2 + 2) * 4 + 4 * 16
    assert one.traffic == own + 2 * (weights + 1600) * 2 * 3 / 2 + 2 * through * 3 * 80 * 3 / 4


def test_a_window_bounds_the_keys_of_a_query():
    """Of 10 tokens and a window of 4: 1, 2 and 3 keys, then seven times 4, so 34 pairs in place of 55."""
    windows = replace(TINY, windows=(4, 0, 10))
    assert score_work(TINY, 10) == 2 * 2 * 8 * 3 * 55
    assert score_work(windows, 10) == 2 * 2 * 8 * (34 + 55 + 55)
    # Of 8 rows, forward and backward.
    assert work().useful - work(model=windows).useful == 3 * 8 * 2 * 2 * 8 * (55 - 34)


def test_a_device_reads_the_experts_that_it_has():
    """Of 4 experts in 3 layers, 2 on each of two devices: forward and backward of two microbatches, split by tensor.

    Each processes two rows of a token, and two of a token of the other device; the MLP of all tokens has its own.
    """
    for shared in (None, 24):
        mixture = replace(TINY, mixture=Mixture(4, 2, renormalized=True, shared=shared))
        whole, half = (work(model=mixture, experts=n) for n in (1, 2))
        weights = 2 * (3 * 2 * 3 * 8 * 16) * 2 * 3 / 2
        rows = 2 * 3 * 2 * (4 * 16 + 4 * 8) * 80 * 3 / 4
        assert whole.traffic - half.traffic == weights - rows
        assert whole.executed == half.executed


def collective(kind, elements, groups, times, overlapped):
    return Collective(kind, (("f32", (elements,)),), groups, times, 0, overlapped, "")


def test_a_step_takes_the_longest_of_what_runs_at_once():
    chip = Chip("gpu", peak=1e6, memory=0, bandwidth=1e9, link=1000, network=100, source="")
    within, across = ((0, 1), (2, 3)), ((0, 2), (1, 3))
    groups = [0, 0, 1, 1]
    found = [
        collective("all-gather", 500, within, 2, True),  # 2,000 bytes, half of them sent, twice
        collective("all-reduce", 100, across, 1, False),  # 400 bytes over the network
    ]
    assert [leaves(c, groups) for c in found] == [False, True]
    bound = roofline(work(), found, chip, groups)
    assert bound.matmul == work().executed / 4 / 1e6
    assert (bound.overlapped, bound.exposed) == (2.0, 4.0)
    assert bound.seconds == max(bound.matmul, 2.0) + 4.0
    assert bound.tokens_per_second == 80 / bound.seconds
    assert bound.mfu == work().useful / 4 / 1e6 / bound.seconds


def test_advice_names_what_makes_a_step_slow():
    target, mesh = Target("h100", 2, (1, 2)), {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    gather = collective("all-gather", 10**9, ((0, 1), (2, 3)), 10, True)
    across = collective("all-reduce", 10**9, ((0, 2), (1, 3)), 1, False)
    whole = collective("all-reduce", 10**9, ((0, 1), (2, 3)), 10, False)

    def advice(*found):
        bound = roofline(work(), found, target.chip, target.groups)
        made = plan_records.Compiled(target, mesh, target.groups, "", "chunks", 0.0, "", list(found), work(), bound)
        return speed_advice(made), collective_rows(made)

    lines, rows = advice(gather, across)
    # 0.08 s, gathers 0.04
    assert "communication takes long, most of all all-reduce over data through the network" in lines[0]
    assert [(row["axis"], row["count"], row["sent"], row["network"]) for row in rows] == [
        ("fsdp", 10, 2e10, False), ("data", 1, 4e9, True)
    ]  # fmt: skip
    assert "sums whole arrays over fsdp in place of gathering" in advice(whole, across)[0][1]
    assert not [line for line in lines if "sums whole" in line]


def test_auto_attention_is_what_the_target_would_use():
    model = SimpleNamespace(architecture=dataclasses.replace(TINY, kv_heads=2), hidden=lambda **_: None)
    model._replace = lambda **new: SimpleNamespace(**{**vars(model), **new})
    planned = attention_check.planned_attention
    mesh = sharding.make_mesh(4, 1, 1)
    for platform in ("tpu", "gpu"):
        found, note = planned(model, "auto", "bfloat16", mesh, platform)
        assert found.attention == "flash"
        assert "if it passes its test on the device" in note
    assert planned(model, "chunks", "bfloat16", mesh, "tpu")[0] is model
    assert planned(model, "auto", "bfloat16", sharding.make_mesh(1, 1, 4), "tpu")[1] == "attention: chunks"
    with pytest.raises(UserError, match=r"cudnn needs model\.compute bfloat16, got float32"):
        planned(model, "cudnn", "float32", mesh, "gpu")
    with pytest.raises(UserError, match=r"splash needs whole rows \(mesh\.sequence 1\)"):
        planned(model, "splash", "bfloat16", sharding.make_mesh(1, 1, 1, 4), "tpu")
    with pytest.raises(UserError, match="splash runs on a tpu, this device is a gpu"):
        planned(model, "splash", "bfloat16", mesh, "gpu")
    with pytest.raises(UserError, match="cannot shard 2 key-value heads evenly over 4 devices"):
        planned(model, "splash", "bfloat16", sharding.make_mesh(1, 1, 4), "tpu")


def test_remat_that_cannot_fit_is_not_compiled(monkeypatch):
    tried = []
    monkeypatch.setattr(plan, "least_activations", lambda config, target: 100)
    monkeypatch.setattr(plan, "plan_run", lambda config, target: tried.append(config.model.remat))
    config = parse_config(Config, None, ["--model.config", "x"], prog="x")
    plan.fitting_plan(config, 99, parse_target("tpu:v5e:2x4"))
    assert tried == ["full"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "tpu:v5e:2x4", "--devices", "8"], "--devices: the target says how many there are; remove it"),
        (["--json"], "--json: is for a plan with --target"),
        (["--target", "tpu:v9:2x4"], "v9 is not known"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    (tmp_path / "x.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=message):
        cli.run_command(["plan", str(tmp_path / "x.yaml"), *options])


# What TPUs' compiler makes of a step of two layers.


def config_of(folder, *options):
    (folder / "config.json").write_text(json.dumps(LLAMA))
    fixed = ["--model.config", str(folder / "config.json"), "--model.compute", "bfloat16", "--model.remat", "full"]
    fixed += ["--data.max_length", "128", "--data.row_length", "256", "--batch_size", "32", "--data.rows", "8"]
    return parse_config(Config, None, [*fixed, *options], prog="x")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The plan of a step for 8 v5e, 2 x 4 over data and fsdp, in four microbatches."""
    config = config_of(tmp_path_factory.mktemp("tpu"), "--mesh.data", "2", "--mesh.fsdp", "4")
    return plan.plan_run(config, parse_target("tpu:v5e:2x4"))


LAYER = {(256, 2, 128), (2, 128, 256), (256, 384), (384, 256), (256,)}  # one layer's parameters, whole
# Norms are gathered in float32, in which they compute.
GATHERED_IN = {"bf16"}


@tpu_compiler
@pytest.mark.slow
def test_in_a_layer_parameters_are_gathered_and_gradients_scattered(eight):
    inside = [c for c in eight.compiled.collectives if c.loops == 2]
    assert {axes_of(c, eight.compiled.mesh) for c in inside} == {"fsdp"}
    for c in inside:
        for dtype, sizes in c.shapes:
            whole = tuple(n for n in sizes if n != 1)
            if c.kind == "all-gather":
                assert whole in LAYER, (c, "not a parameter")
                assert dtype in GATHERED_IN or whole == (256,), c
            elif c.kind == "reduce-scatter":
                assert 4 * np.prod(sizes) in {np.prod(shape) for shape in LAYER}, (c, "not a quarter of a gradient")
            else:  # XLA sums gradients of norms whole, and takes its part
                assert (c.kind, whole) == ("all-reduce", (256,)), c
    times = {c.times for c in inside}
    assert times == {4 * 2}
    assert sum(c.kind == "all-gather" and c.shapes[0][1] != (1, 256) for c in inside) == 2 * 7  # forward, backward


@tpu_compiler
@pytest.mark.slow
def test_gradients_cross_data_once_a_step(eight):
    crossing = [c for c in eight.compiled.collectives if "data" in axes_of(c, eight.compiled.mesh)]
    assert {(c.loops, c.times) for c in crossing} == {(0, 1)}
    gradient = max(crossing, key=lambda c: c.bytes)
    assert gradient.kind == "all-reduce"
    assert sum(int(np.prod(sizes)) for _, sizes in gradient.shapes) == eight.parameters / 4
    assert sum(c.bytes for c in crossing if c is not gradient) < 0.05 * gradient.bytes


@tpu_compiler
@pytest.mark.slow
def test_memory_is_what_the_compiler_says(eight):
    memory = eight.memory
    assert memory.trained == eight.parameters  # a quarter of 4 bytes each
    assert memory.gradients == memory.trained
    assert memory.total > memory.trained + memory.optimizer + memory.gradients + memory.batch
    assert memory.other > 0  # the program itself
    assert eight.compiled.attention.startswith("attention: flash")
    assert "tpu_custom_call" in eight.compiled.text
    assert eight.compiled.roofline.mfu < 1


@tpu_compiler
@pytest.mark.slow
def test_between_slices_only_the_gradients_are_sent(tmp_path):
    """Two slices of four v5e: what goes over the network happens once a step."""
    sliced = plan.plan_run(config_of(tmp_path, "--mesh.fsdp", "4"), parse_target("tpu:2xv5e:2x2"))
    found = sliced.compiled
    assert found.groups == [0] * 4 + [1] * 4
    network = [c for c in found.collectives if leaves(c, found.groups)]
    assert network
    assert {(axes_of(c, found.mesh), c.loops, c.times) for c in network} == {("data", 0, 1)}
    assert {c.kind for c in network} == {"all-reduce", "all-gather"}  # and what losses see
    sums = sum(c.bytes for c in network if c.kind == "all-reduce")
    gradients = sliced.memory.gradients
    assert gradients <= sums < 1.15 * gradients  # padded


@tpu_compiler
@pytest.mark.slow
def test_the_command_prints_json(tmp_path, monkeypatch, capsys):
    config_of(tmp_path)
    options = "model: {config: config.json, remat: full, attention: chunks}\nbatch_size: 8\nmesh: {fsdp: 4}\n"
    (tmp_path / "my.yaml").write_text(options + "data: {max_length: 64, row_length: 128, rows: 4}\n")
    monkeypatch.chdir(tmp_path)
    cli.run_command(["plan", "my.yaml", "--target", "tpu:v5e:2x2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 1}
    assert found["memory"]["device"] == 16 * 2**30
    assert found["memory"]["usable"] == int(0.9 * 16 * 2**30)
    assert found["attention"] == "attention: chunks"
    assert {row["axis"] for row in found["collectives"]} == {"fsdp"}
    programs = {"step": found["memory"]} | found["passes"]
    assert found["largest"] == max(programs, key=lambda name: programs[name]["total"])
    whole = 4 * (2 * 512 * 256 + 2 * (4 * 256 * 256 + 3 * 256 * 384))  # parameters in float32, without norms
    assert set(found["passes"]) == {"reference", "sampling"}
    for one in found["passes"].values():
        assert (one["trained"], one["frozen"]) == (found["memory"]["trained"], found["memory"]["frozen"])
        assert one["gradients"] == 0
    assert found["memory"]["frozen"] == found["memory"]["trained"]  # the reference stays, for KL of the samples
    assert found["passes"]["sampling"]["other"] > whole / 2  # a whole copy in bfloat16, and the cache
    assert found["passes"]["reference"]["activations"] < whole / 2
