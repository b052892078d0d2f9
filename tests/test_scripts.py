"""Scripts that measure: they are run here on tiny models, so that they work where there is a device."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
device_check = SimpleNamespace(**runpy.run_path(str(SCRIPTS / "device_check")))
parts = SimpleNamespace(**runpy.run_path(str(SCRIPTS / "_device_parts.py")))
GROUP = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""


def test_the_parts_share_the_time_and_what_earlier_ones_left_over():
    assert sum(part.limit for part in device_check.PARTS) <= device_check.SECONDS < 480
    two = [device_check.Part(name, (), (), limit) for name, limit in (("a", 30), ("b", 10))]
    assert device_check.share_of(two, 80) == 60  # 80 * 30 / 40
    assert device_check.share_of(two, 40) == 30
    assert device_check.share_of(two[1:], 80 - 15) == 65  # the last one has all that is left
    assert [part.name for part in device_check.PARTS][:4] == ["kernels", "llama", "memory", "pythia"]


def test_a_part_that_is_stopped_takes_its_own_processes_with_it(tmp_path):
    (tmp_path / "group.py").write_text(GROUP)
    part = device_check.Part("group", (str(tmp_path / "group.py"),), (), 1)
    found = device_check.run_part(part, tmp_path, 6)
    assert (found["exit"], found["state"]) == (None, "stopped at its limit of 6 s")
    (child,) = map(int, found["lines"])
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)


def is_running(pid):
    """Whether a process is there and does not just wait to be collected by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_for_which_no_time_is_left_is_named_at_the_head_of_the_page(tmp_path):
    part = device_check.Part("late", ("nothing.py",), (), 1)
    late = device_check.run_part(part, tmp_path, device_check.LEAST - 1)
    assert (late["exit"], late["seconds"]) == (None, 0)
    done = {"part": "early", "state": "ok", "exit": 0, "seconds": 3, "command": "x", "lines": ["fine"]}
    head = dict.fromkeys(("device", "date", "command", "commit", "versions"), "-")
    page = device_check.markdown({**head, "parts": [done, late]})
    assert "Not complete:\n\n- late: not run, the time is over; give --only late or more --seconds\n\n## early" in page
    assert "## late: not run" in page


def test_a_tpu_is_measured_without_systems_that_need_cuda():
    llama = next(part for part in device_check.PARTS if part.name == "llama")
    assert device_check.command_of(llama, False, "gpu") == llama.command
    found = device_check.command_of(llama, False, "tpu")
    assert found[:7] == ("bench", "--dtype", "bfloat16", "--against", "nobody", "--model", "llama_1b")
    assert found[-2:] == ("--json", "{out}/llama.json")
    assert device_check.command_of(llama, True, "tpu")[-2:] == ("--against", "nobody")
    assert device_check.command_of(device_check.PARTS[0], False, "tpu") == device_check.PARTS[0].command


def test_a_kernel_that_fails_or_differs_is_a_fault_and_one_that_lacks_something_is_none():
    def one(kernel, refused, **more):
        return {"kernel": kernel, "heads": "64", "dtype": "bfloat16", "refused": refused, **more}

    assert not parts.kernel_faults([
        one("flash", ""), one("cudnn", "cannot add attention sinks, which this model has"),
        one("cudnn", "fails on this device (NotImplementedError: cannot cap scores, which this model does)"),
    ])  # fmt: skip
    differs, fails = "differs from chunks on this device (...)", "fails on this device (XlaRuntimeError: INTERNAL)"
    lacks = "fails on this device (NotImplementedError: Unimplemented primitive in Pallas)"
    faults = parts.kernel_faults([
        one("flash", differs), one("cudnn", fails), one("flash", lacks), one("flash", fails, interpreted="gpu")
    ])  # fmt: skip
    assert faults == [
        f"flash, heads of 64, bfloat16: {differs}", f"cudnn, heads of 64, bfloat16: {fails}",
        f"flash, heads of 64, bfloat16: {lacks}", f"flash, interpreted for a gpu, heads of 64, bfloat16: {fails}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("peak", "passes", "text"), [(210, True, "+5.0%"), (230, False, "+15.0%"), (170, False, "-15.0%"), (None, True, "")]
)
def test_the_peak_is_that_of_the_largest_program(peak, passes, text):
    fits, line = parts.peak_verdict({"step": 100, "reference": 200}, peak)
    assert fits == passes
    assert text in line
    assert peak is None or "the reference" in line


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12),
        ("TPU v6e", 918e12), ("TPU7x", 2307e12 / 2), ("cpu", None),
    ],
)  # fmt: skip
def test_devices_have_the_peak_of_their_data_sheet(bench, device, peak):
    assert bench("_bench_work").sheet_peak(device, "bfloat16") == peak
    assert bench("_bench_work").sheet_peak(device, "float32") is None


@pytest.fixture
def bench(monkeypatch):
    """Imports a file that belongs to scripts/bench."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_useful_is_of_the_matmuls_here_and_mfu_of_the_data_sheet(bench):
    """A step of 2 s does 3 passes and one of the reference, 1e12 each: 2e12 a second, 1.5e12 for its gradient."""
    step, system = bench("_bench_list").Step, bench("_bench_list").System
    bench_script = SimpleNamespace(**runpy.run_path(str(SCRIPTS / "bench")))
    steps = [step(0.7, seconds, 0.1, 50.0, "flash") for seconds in (9.0, 2.0, 2.0)]
    work, rates = bench_script.Work(600.0, 1e12), {"best": 4e12, "sheet": 8e12}
    row = bench_script.summary(system("dpo_jax", "bfloat16"), steps, 1, 8, work, rates)
    assert (row["useful"], row["mfu"], row["comparisons_per_second"], row["attention"]) == (0.5, 3 / 16, 4.0, "flash")
    cached = system("dpo_jax cached", "bfloat16", precomputed=True)
    assert bench_script.summary(cached, steps, 1, 8, work, rates)["mfu"] == 3 / 16
    assert bench_script.summary(cached, steps, 1, 8, work, rates | {"sheet": None})["mfu"] is None


def test_smollm2_is_a_name_and_other_names_must_be_known(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("SMOLLM2", str(tmp_path))
    assert bench("_bench_work").model_path("smollm2") == str(tmp_path)
    local_folder = runpy.run_path(str(SCRIPTS / "bench"))["local_folder"]
    assert local_folder("smollm2") == tmp_path
    with pytest.raises(
        SystemExit, match=r"^bench: --model llama: give one of tiny, llama_25m, .*, smollm2, a folder or a hub"
    ):
        local_folder("llama")
    monkeypatch.delenv("SMOLLM2")
    assert bench("_bench_work").model_path("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_systems_alone_end_before_the_next_one_starts(bench, monkeypatch):
    match, events = bench("_bench_match"), []

    class Worker:
        def __init__(self, system, *_):
            self.name = system
            events.append(f"start {system}")

        def step(self):
            events.append(self.name)

        def close(self):
            events.append(f"end {self.name}")

    monkeypatch.setattr(match, "Worker", Worker)
    assert match.measure(["a", "b"], None, (1, 1, 8), alone=True) == [[None] * 2] * 2
    assert events == ["start a", "a", "a", "end a", "start b", "b", "b", "end b"]
    events.clear()
    match.measure(["a", "b"], None, (1, 1, 8))
    assert events == ["start a", "start b", "a", "b", "b", "a", "end a", "end b"]


def test_trl_at_its_best_has_flash_attention_where_it_is_installed(bench, monkeypatch):
    systems, found = bench("_bench_systems"), []
    monkeypatch.setattr(systems.importlib.util, "find_spec", lambda _: found or None)
    best, defaults = (bench("_bench_list").System(name, "bfloat16") for name in ("TRL best", "TRL defaults"))
    assert [systems.trl_attention(best, cuda) for cuda in (True, False)] == ["sdpa", None]
    found.append("flash_attn")
    assert systems.trl_attention(best, True) == "flash_attention_2"
    assert systems.trl_attention(best._replace(dtype="float32"), True) == "sdpa"  # it takes 16 bits only
    assert systems.trl_attention(defaults, True) is None


@pytest.mark.slow
@pytest.mark.milestone
def test_the_device_check_passes_with_tiny_models(tmp_path, shared):
    """It runs the bench beside TRL and beside transformers' generate, too."""
    environment = os.environ | {"XLA_FLAGS": "", "DPO_JAX_SHARED": str(shared), "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, SCRIPTS / "device_check", "--tiny", "--out", tmp_path, "--seconds", "550"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert {one["part"]: one["exit"] for one in found["parts"]} == dict.fromkeys(
        ("kernels", "llama", "memory", "pythia", "generate", "profile"), 0
    ), done.stdout[-3000:]
    assert done.returncode == 0
    match = json.loads((tmp_path / "llama.json").read_text())["comparisons"][0]
    assert match["same_work"]
    assert match["loss_difference"] <= 1e-4
    assert json.loads((tmp_path / "generate.json").read_text())["greedy_agreement"] > 0.9
    page = (tmp_path / "device_check.md").read_text()
    assert "## memory: ok" in page
    assert "GiB" in page


@pytest.mark.slow
def test_the_part_that_fails_is_named_and_the_others_run(tmp_path):
    """Without data the bench cannot start."""
    environment = os.environ | {"DPO_JAX_SHARED": str(tmp_path / "none"), "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, SCRIPTS / "device_check", "--tiny", "--out", tmp_path, "--only", "kernels", "llama"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    codes = [(one["part"], one["exit"]) for one in json.loads((tmp_path / "device_check.json").read_text())["parts"]]
    assert codes == [("kernels", 0), ("llama", 1)]
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    found = [one for one in kernels if "interpreted" in one]
    assert [(one["interpreted"], one["refused"]) for one in found] == [("tpu", "")] * 2 + [("gpu", "")] * 2
    assert {one["heads"] for one in found} == {"64, cap and window", "64, sinks and window"}
    # Blocks run here, with each kind of heads and both dtypes.
    blocks = [(one["kernel"], one["refused"]) for one in kernels if "interpreted" not in one]
    assert set(blocks) == {("blocks", "")}
    assert len(blocks) >= 2 * 2
    assert "bench: no data at" in done.stdout
    assert "## llama: failed (1)" in (tmp_path / "device_check.md").read_text()


@pytest.mark.slow
@pytest.mark.milestone
def test_the_profile_adds_up_to_the_step(shared):
    environment = os.environ | {"XLA_FLAGS": "", "DPO_JAX_SHARED": str(shared), "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, SCRIPTS / "bench", "--tiny", "--profile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    tables = re.findall(r"a step on one core takes .*?\nsum +\S+ +(\S+)%", done.stdout, re.DOTALL)
    assert len(tables) == len(re.findall("^(?:float32|bfloat16),", done.stdout, re.MULTILINE)) >= 1
    assert all(50 < float(share) <= 102 for share in tables)
    assert re.search(r"^products of layers +\S+ +\S+% +[1-9]\d* +[1-9]\d*$", done.stdout, re.MULTILINE)
