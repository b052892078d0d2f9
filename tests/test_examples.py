"""The scripts in scripts/examples: cells that open as notebooks, and what each of them says that it shows."""

import ast
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launched import ROOT, own_environment

FILES = sorted((ROOT / "scripts/examples").glob("*.py"))
CELL = re.compile(r"^# %%(?: \[markdown\])?$")
NUMBER = r"(-?\d[\d.]*)"
example = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def cells(file: Path) -> list[tuple[str, list[str]]]:
    """Returns the cells of a file in percent format: the line that starts each, and its other lines."""
    found = []
    for line in file.read_text().splitlines():
        if line.startswith("# %%"):
            found.append((line, []))
        else:
            found[-1][1].append(line)  # fails for a line before the first cell
    return found


@example
def test_a_file_is_in_percent_format_and_short(file):
    found = cells(file)
    assert all(CELL.match(head) for head, _ in found), [head for head, _ in found]
    title, *code = found
    assert title[0] == "# %% [markdown]"
    text = ast.get_docstring(ast.parse("\n".join(title[1])))
    assert text is not None
    assert text.startswith("# ")
    for head, lines in code:
        written = [line for line in lines if line]
        assert written
        if head.endswith("[markdown]"):
            assert all(line == "#" or line.startswith("# ") for line in written)
        else:
            assert ast.parse("\n".join(lines)).body
    assert 40 <= len(file.read_text().splitlines()) < 120


@example
def test_a_file_stands_alone(file):
    """It imports the package, the standard library and dependencies of the package, and no file beside it."""
    names = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    others = {"dpo_jax", "jax", "matplotlib", "numpy", "optax", "safetensors"}
    assert {name.split(".")[0] for name in names} <= others | sys.stdlib_module_names


def run(name: str, folder: Path, *arguments: str) -> str:
    """Runs an example as it is, in a folder of its own; returns what it prints."""
    env = own_environment() | {"DPO_JAX_CACHE": str(folder / "cache"), "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    env["XLA_FLAGS"] = " ".join(flags)  # one device, unless the example asks for more
    command = [sys.executable, str(ROOT / f"scripts/examples/{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> tuple[float, ...]:
    """Returns the numbers in the groups of a pattern, which must be in the text."""
    match = re.search(pattern, text)
    assert match, f"{pattern}\n{text}"
    return tuple(map(float, match.groups()))


def test_every_example_is_run_below():
    tests = {name.removeprefix("test_run_") for name in globals() if name.startswith("test_run_")}
    assert tests == {file.stem for file in FILES}


@pytest.mark.slow
def test_run_dpo_in_one_page(tmp_path):
    out = run("dpo_in_one_page", tmp_path)
    (first,) = numbers(rf"step  0  loss {NUMBER}", out)
    assert first == pytest.approx(math.log(2), abs=1e-4)
    before, after = numbers(rf"before: true reward {NUMBER},(?s:.*)\nafter: true reward {NUMBER},", out)
    assert after > before + 0.5


@pytest.mark.slow
@pytest.mark.milestone
def test_run_ablate_a_loss(tmp_path):
    """With gamma 0 the own loss is DPO; a larger beta keeps the margin in nats smaller; the figure is written."""
    out = run("ablate_a_loss", tmp_path, "figures")
    pair = rf"\[{NUMBER} +{NUMBER}\]"
    values = numbers(f"gamma=0: {pair}  DPO: {pair}", out)
    assert values[:2] == values[2:]
    found = np.array([numbers(rf"beta {b} +accuracy {NUMBER}  margin +{NUMBER} nats", out) for b in ("0.01", "5.0")])
    assert (found[:, 0] > 0.6).all()
    assert found[0, 1] > 2 * found[1, 1] > 0
    assert "</svg>" in (tmp_path / "figures/beta.svg").read_text()
    assert len(list((tmp_path / "figures/runs").iterdir())) == 5


@pytest.mark.slow
def test_run_lora(tmp_path):
    """The policy is the base at first; 2 layers of 7 projections have adapters of rank 8."""
    out = run("lora", tmp_path, "runs")
    assert numbers(rf"held-out loss {NUMBER} ->", out)[0] == pytest.approx(math.log(2), abs=1e-4)
    d, mlp = 64, 128
    assert f"{2 * 8 * (4 * (d + d) + 3 * (d + mlp)):,} parameters are trained" in out
    ours, theirs = numbers(rf"margin {NUMBER} by the functions, {NUMBER} by the run", out)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert (tmp_path / "runs/lora/adapter/adapter_config.json").is_file()


@pytest.mark.slow
def test_run_devices(tmp_path):
    out = run("devices", tmp_path)
    assert out.startswith("4 devices: ")
    found = [numbers(rf"{name} +\[{NUMBER} +{NUMBER} +{NUMBER}\]", out) for name in ("one device", "pmap", "mesh")]
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0][2] < 0.6  # from step 1 on the losses depend on the updates
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=1e-5)


@pytest.mark.slow
@pytest.mark.milestone
def test_run_evaluate_a_run(tmp_path):
    """The intervals of the true reward lie apart: the policy is better than its reference."""
    out = run("evaluate_a_run", tmp_path, "runs")
    interval = rf" +{NUMBER} +{NUMBER} \.\. +{NUMBER} +{NUMBER}"
    mean, low, high, n = numbers(rf"eval_rewards/accuracies{interval}", out)
    assert 0.5 < low < mean < high < 1
    assert n == 300
    policy, reference = (numbers(rf"true reward of the {who}{interval}", out) for who in ("policy", "reference"))
    assert policy[1] > reference[2]
