"""Runs of the command line on a small random model, to be compared with one another."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from dpo_jax import cli, sharding
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data.sources import synthetic
from dpo_jax.training import setup
from dpo_jax.training.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
STEPS = 20
TIMES = ("examples_per_second", "save_seconds", "save_stall_seconds")  # all that may differ between equal runs


def make_world(folder: Path, warmup_steps: int = 2) -> Path:
    """Writes pairs, the config of a small random model and `dpo.yaml`, a run of 20 steps; returns the folder.

    RMSprop's first updates are large. With a short warm-up they amplify rounding a thousandfold within 20 steps.
    """
    rows = [r for r, _ in zip(synthetic.read((), "train", 2), range(220), strict=False)]
    with (folder / "pairs.jsonl").open("w") as f:
        for r in rows:
            f.write(json.dumps({"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]}) + "\n")
    config = json.loads((ROOT / "configs/models/synthetic.json").read_text())
    (folder / "tiny.json").write_text(json.dumps(config | {"hidden_size": 32, "intermediate_size": 64}))
    dpo = {
        "data": {"path": ["pairs.jsonl"], "max_length": 96, "max_prompt_length": 32, "eval_fraction": 0.2},
        "samples": {"prompts": 2, "max_new_tokens": 8, "kl_prompts": 0},
        "model": {"config": "tiny.json", "tokenizer": "synthetic"},
        "optim": {"learning_rate": 1e-3, "warmup_steps": warmup_steps},
        **{"batch_size": 16, "max_steps": STEPS, "epochs": 3, "save_every": 5, "eval_every": 80},
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(dpo))
    return folder


def own_environment() -> dict[str, str]:
    """Returns the environment of a process that keeps its compiled programs in its own cache: it may be killed."""
    return {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}


def start(
    folder: Path, name: str, *options: str, launch: tuple[str, ...] = (), devices: int = 1, cache: str = "cache"
) -> subprocess.Popen:
    """Starts `dpo-jax train` into runs/<name>.

    Args:
      folder: from `make_world`.
      name: of the run.
      options: further arguments.
      launch: what stands before `train`; by default this Python.
      devices: pretend devices of a process.
      cache: the name of its cache folder.
    """
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    env = own_environment() | {
        "DPO_JAX_CACHE": str(folder / cache),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
    }
    args = [*(launch or (sys.executable, "-m", "dpo_jax")), "train", "dpo.yaml", "--run", f"runs/{name}", *options]
    return subprocess.Popen(args, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Returns what a process wrote, having checked how it ended."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, f"{process.returncode}\n{out}{err}"
    return out, err


def train_here(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *options: str, devices: int = 1) -> None:
    """Trains into runs/<name> in this process, on the first of its devices."""
    make_mesh = sharding.make_mesh
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        patch.setattr(sharding, "make_mesh", partial(make_mesh, devices=jax.devices()[:devices]))
        cli.run_command(["train", "dpo.yaml", "--run", f"runs/{name}", *options])


def export_start(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *options: str) -> None:
    """Exports into runs/<name> what a run starts from."""
    monkeypatch.chdir(folder)
    run = setup.setup_run(parse_config(Config, "dpo.yaml", ["--run", f"runs/{name}", *options], prog="x"))
    with run.lock:
        run.export(run.config, run.params, run.folder / "model", 0)


def launch_local(processes: int, devices: int, *options: str) -> tuple[str, ...]:
    """Returns what stands before `train` to have it in several processes."""
    return (
        sys.executable,
        str(ROOT / "scripts/launch_local"),
        "-n",
        str(processes),
        "--devices",
        str(devices),
        *options,
    )


def wait_for(folder: Path, name: str, step: int) -> None:
    """Waits until a run has written the metrics of a step."""
    path, deadline = folder / "runs" / name / "metrics.jsonl", time.monotonic() + 200
    while not (path.exists() and any(row["step"] >= step for row in read_metrics(path))):
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)


def peers(name: str) -> list[int]:
    """Returns the ids of the several processes that train into runs/<name>, in their order."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                args = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended meanwhile
                continue
            if f"runs/{name}" in args and "--distributed" in args and "dpo_jax" in args:
                index = args[args.index("--distributed") + 1].rpartition(",")[2]
                found[int(entry.name) if index == "auto" else int(index)] = int(entry.name)
    return [found[i] for i in sorted(found)]


def lines(folder: Path, name: str) -> list[dict]:
    """Returns the metrics of a run, without times."""
    rows = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_one_trajectory(
    folder: Path, name: str, other: str = "one", steps: int = STEPS, left: float | None = 0.75
) -> None:
    """Losses to 1e-5, log-probs to rounding, the very same lines; final over initial loss is below `left`.

    After few steps that says little (None): compare the exported models by `assert_same_weights`.
    """
    ours, theirs = lines(folder, name), lines(folder, other)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert len([r for r in ours if "loss" in r]) == steps
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "eval_loss"} & b.keys():
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)
        for key in {"logps/chosen", "eval_logps/chosen", "rewards/margins", "grad_norm"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=3e-4, abs=1e-4), (a["step"], key)
    # It has learned, so the comparison says something.
    assert left is None or theirs[-2]["loss"] < left * theirs[1]["loss"]


def assert_same_weights(folder: Path, name: str, other: str, start: str) -> None:
    """Exported weights differ by less than a hundredth of how far training has moved them from the run `start`'s."""
    (file,) = {path.name for path in (folder / "runs" / other / "model").glob("*model.safetensors")}
    ours, theirs, first = (load_file(folder / "runs" / n / "model" / file) for n in (name, other, start))
    assert ours.keys() == theirs.keys() == first.keys()
    apart, moved = (sum(np.sum((a[k] - theirs[k]) ** 2) for k in theirs) ** 0.5 for a in (ours, first))
    assert 100 * apart < moved, (apart, moved)


def assert_same_run(folder: Path, name: str, other: str = "one") -> None:
    """Bit-identical parameters, the same metrics and samples, nothing twice."""
    ours, theirs = (load_file(folder / "runs" / n / "model/model.safetensors") for n in (name, other))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    assert lines(folder, name) == lines(folder, other)
    samples = [(folder / "runs" / n / "samples.jsonl").read_text() for n in (name, other)]
    assert samples[0] == samples[1]
