"""Scripts that measure: they are run here on tiny models, so that they work where there is a device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.slow
@pytest.mark.milestone
def test_the_device_check_passes_with_tiny_models(tmp_path, shared):
    """It runs the bench beside TRL and beside transformers' generate, too."""
    environment = os.environ | {"XLA_FLAGS": "", "DPO_JAX_SHARED": str(shared), "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, SCRIPTS / "device_check", "--tiny", "--out", tmp_path, "--seconds", "550"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert {one["part"]: one["exit"] for one in found["parts"]} == dict.fromkeys(
        ("kernels", "memory", "llama", "pythia", "profile", "generate"), 0
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
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert [(one["interpreted"], one["refused"]) for one in kernels] == [("tpu", ""), ("gpu", "")]
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
