"""Launchers for clusters; stand-ins for the commands of the clusters run everything on this machine."""

import json
import math
import os
import re
import signal
import subprocess
import sys

import launched
import pytest
import yaml

from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.training import interrupts
from dpo_jax.training.targets import parse_target

SCRIPTS = launched.ROOT / "scripts"
# Two tasks, each told who it is as Slurm does; ends with the highest exit code, having ended all if one fails.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
args = sys.argv[1:]
while args[0].startswith("--"):
    args.pop(0)
def task(i):
    who = {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost",
           "SLURM_STEP_NUM_NODES": "1"}}
    return subprocess.Popen(args, env=os.environ | who, start_new_session=True)
tasks = [task(i) for i in range(2)]
while None in (codes := [t.poll() for t in tasks]):
    if any(codes):
        time.sleep(1)
        for t in tasks:
            if t.poll() is None:
                os.killpg(t.pid, signal.SIGKILL)
    time.sleep(0.05)
sys.exit(max(c if c >= 0 else 128 - c for c in codes))
"""
SCONTROL = '#!/bin/sh\necho "scontrol $@" >>"$CALLS"\n'
# Notes what it was asked, then ends with the next of the codes in a file.
GCLOUD = """#!/bin/sh
echo "$@" >>"$CALLS"
code=$(head -n 1 "$CODES")
sed -i 1d "$CODES"
exit "$code"
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Puts the stand-ins on the path; returns the file that records their calls."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "gcloud": GCLOUD}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SLURM_JOB_ID", "123")  # from which JAX makes the port
    monkeypatch.setenv("PYTHON", sys.executable)
    return tmp_path / "calls"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a small run, trained by two processes."""
    folder = launched.make_world(tmp_path_factory.mktemp("launch"))
    launched.finish(launched.start(folder, "one", launch=launched.launch_local(2, 1)))
    return folder


SLURM = ("bash", str(SCRIPTS / "launch_slurm"))


@pytest.mark.slow
def test_slurm_starts_again_after_a_crash(world, stand_ins):
    process = launched.start(world, "crashed", launch=SLURM)
    launched.wait_for(world, "crashed", 12)  # the save at 10 has waited until that at 5 was whole
    os.kill(launched.peers("crashed")[1], signal.SIGKILL)
    out, err = launched.finish(process)
    assert re.search(r"launch_slurm: ended with code \d+; starting again", err)
    assert re.search(r"resuming at step \d+ of 20", out)
    launched.assert_same_run(world, "crashed")
    assert not list(world.glob(".launch-*"))


@pytest.mark.slow
def test_slurm_requeues_a_run_that_was_asked_to_stop(world, stand_ins):
    process = launched.start(world, "asked", launch=SLURM)
    launched.wait_for(world, "asked", 2)
    os.kill(launched.peers("asked")[0], signal.SIGTERM)
    _, err = launched.finish(process)
    assert "all is saved; back to the queue" in err
    assert stand_ins.read_text() == "scontrol requeue 123\n"


@pytest.mark.slow
def test_slurm_does_not_retry_user_errors(world, stand_ins):
    _, err = launched.finish(launched.start(world, "wrong", "--optim.learning_rate", "nan", launch=SLURM), 2)
    assert "optim.learning_rate: nan" in err
    assert "starting again" not in err


# A run whose first task dies, up to the fourth start, after a save into the folder $WHERE if that is set.
DYING = """#!/bin/sh
if [ "$SLURM_PROCID" != 0 ]; then exit 0; fi
echo started >>"$CALLS"
if [ -n "$WHERE" ]; then mkdir -p "$WHERE/checkpoints/5" && date >"$WHERE/checkpoints/5/manifest.json"; fi
if [ "$(wc -l <"$CALLS")" -ge 4 ]; then exit 0; fi
exit 1
"""


@pytest.mark.parametrize(
    ("options", "run_key", "where", "starts", "ends"),
    [
        ([], "", "", 2, 1),  # RESTARTS is 1
        ([], "", "runs/x", 4, 0),
        ([], "", "runs/x-sweep/one", 4, 0),
        ([], "run: null", "runs/x", 4, 0),
        ([], "", "runs/y", 2, 1),  # another run's checkpoints are none of its own
        (["--run", "else where"], "", "else where", 4, 0),
        (["--run=~/my run"], "", "home/my run", 4, 0),
        ([], "run: 'else where' # of the config", "else where", 4, 0),
        (["--run", "mine"], "run: other", "other", 2, 1),  # another run's checkpoints are none of its own
        (["--run", "linked"], "", "else where", 4, 0),
    ],
)
def test_slurm_counts_restarts_from_the_newest_checkpoint_of_the_run(
    stand_ins, tmp_path, options, run_key, where, starts, ends
):
    """Each start that saves into the run's folder sets the count of restarts back, so that the fourth is reached."""
    (tmp_path / "python").write_text(DYING)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "x.yaml").write_text(f"seed: 0\n{run_key}\n")
    (tmp_path / "else where").mkdir()
    (tmp_path / "linked").symlink_to("else where")
    done = subprocess.run(
        [*SLURM, "train", "x.yaml", *options], cwd=tmp_path, capture_output=True, text=True, timeout=100,
        env=os.environ | {"PYTHON": f"{tmp_path}/python", "RESTARTS": "1", "WHERE": where, "HOME": f"{tmp_path}/home"},
    )  # fmt: skip
    assert done.returncode == ends, done.stderr
    assert stand_ins.read_text() == "started\n" * starts
    assert ("without a newer checkpoint" in done.stderr) == (ends == 1)


@pytest.mark.parametrize(
    ("codes", "tries", "ends"),
    [([0], 1, 0), ([1, 255, 0], 3, 0), ([2, 0], 1, 2), ([interrupts.EXIT_AGAIN, 0], 2, 0), ([1, 1, 1, 1, 0], 3, 1)],
)
def test_a_tpu_pod_is_started_again(stand_ins, tmp_path, codes, tries, ends):
    (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
    handed = {"DPO_JAX_CACHE": "/the cache", "JAX_PLATFORMS": "tpu"}
    done = subprocess.run(
        [SCRIPTS / "launch_tpu_pod", "pod", "zone", "/a folder", "train", "x.yaml", "--run", "it's"],
        env=os.environ | {"CODES": str(tmp_path / "codes"), "RESTARTS": "2", "WAIT": "0"} | handed, capture_output=True,
    )  # fmt: skip
    assert done.returncode == ends
    calls = stand_ins.read_text().splitlines()
    command = r".venv/bin/python -m dpo_jax train x.yaml --run it\'s --distributed auto"
    command = rf"cd /a\ folder && DPO_JAX_CACHE=/the\ cache JAX_PLATFORMS=tpu {command}"
    expected = f"compute tpus tpu-vm ssh pod --zone zone --worker=all --command {command}"
    assert [call.strip() for call in calls] == [expected] * tries


def test_a_tpu_pod_without_arguments_prints_its_usage():
    done = subprocess.run([SCRIPTS / "launch_tpu_pod"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "scripts/launch_tpu_pod NAME ZONE DIRECTORY train x.yaml" in done.stderr


@pytest.mark.parametrize(("file", "kind", "devices"), [("gke.yaml", "tpu", 16), ("gke_gpu.yaml", "gpu", 16)])
def test_the_jobset_trains_on_all_hosts_and_stops_on_errors_of_the_user(file, kind, devices):
    """A rule of Kubernetes: what a failed job of the set does follows from the reason that its policy gives."""
    found = yaml.safe_load((LAUNCHING / file).read_text())
    (rule,), (slices,) = found["spec"]["failurePolicy"]["rules"], found["spec"]["replicatedJobs"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
    (container,), (on,) = pod["containers"], job["podFailurePolicy"]["rules"]
    exits = on["onExitCodes"]
    assert (on["action"], exits["operator"], exits["values"]) == ("FailJob", "In", [2])
    assert (exits["containerName"], pod["restartPolicy"], job["backoffLimit"]) == (container["name"], "Never", 0)
    (limit,) = container["resources"]["limits"].values()
    assert job["parallelism"] * limit == devices
    if kind == "tpu":
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert math.prod(map(int, topology.split("x"))) == devices
        assert container["command"][-2:] == ["--distributed", "auto"]
    else:
        first = f"{found['metadata']['name']}-{slices['name']}-0-0.{found['metadata']['name']}"
        text = f'--distributed "{first}:8476,{job["parallelism"]},$JOB_COMPLETION_INDEX"'
        assert (container["command"][-1].endswith(text), job["completionMode"]) == (True, "Indexed")
    assert job["completions"] == job["parallelism"]
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    planned = [(target, mesh) for page, target, mesh in PLANS if page == "gke.md" and target.platform == kind]
    assert [(math.prod((target.slices, *target.shape)), mesh) for target, mesh in planned] == [
        (devices, re.search(r"--mesh.fsdp (\d+)", " ".join(container["command"]))[1])
    ]


LAUNCHING = SCRIPTS / "launching"
PLAN = re.compile(r"^dpo-jax plan (\S+) --mesh.fsdp (\d+) --target (\S+)", re.MULTILINE)
PLANS = [
    (page.name, parse_target(target), fsdp)
    for page in sorted(LAUNCHING.glob("*.md"))
    for _, fsdp, target in PLAN.findall(page.read_text())
]


def test_every_page_plans_the_mesh_that_it_launches():
    """The JobSets of gke.md are files of their own, compared above."""
    assert {page for page, *_ in PLANS} == {page.name for page in LAUNCHING.glob("*.md")}
    for page, target, fsdp in PLANS:
        text = (LAUNCHING / page).read_text()
        assert page == "gke.md" or re.findall(r"train my\.yaml.*--mesh\.fsdp (\d+)", text) == [fsdp]
        assert target.shape[-1] % int(fsdp) == 0 or target.platform == "tpu"  # within a machine
        assert {file for file, _, _ in PLAN.findall(text)} == {"scripts/launching/llama_7b.yaml"}


def test_the_example_of_the_pages_is_a_run(monkeypatch):
    monkeypatch.chdir(launched.ROOT)
    config = parse_config(Config, "scripts/launching/llama_7b.yaml", [], prog="x")
    sizes = json.loads((launched.ROOT / config.model.config).read_text())
    assert (config.batch_size, config.data.row_length, config.model.remat) == (256, 2048, "full")
    # Two matrices of the vocabulary, and of each layer 4 D^2, 3 D M and two norms; one norm at the end.
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    assert 2 * sizes["vocab_size"] * width + sizes["num_hidden_layers"] * layer + width == 6_738_415_616


WHO = """
import sys
from dpo_jax import distributed
distributed.initialize("auto")
import jax
print(jax.process_index(), jax.process_count(), distributed.is_primary())
"""
SCHEDULERS = {
    "Slurm": lambda i: {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_NODES": "1",
    },
    "Open MPI": lambda i: {
        "OMPI_MCA_orte_hnp_uri": "319488.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_give_the_index_and_number_of_processes(scheduler):
    env = os.environ | {"PYTHONPATH": str(launched.ROOT), "XLA_FLAGS": ""}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WHO], env=env | SCHEDULERS[scheduler](i), stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    said = [p.communicate(timeout=100)[0].splitlines() for p in both]
    assert [[line for line in out if "Gloo" not in line] for out in said] == [["0 2 True"], ["1 2 False"]]


def test_auto_without_a_scheduler_is_refused():
    command = [sys.executable, "-m", "dpo_jax", "train", "x.yaml", "--distributed", "auto"]
    env = {k: v for k, v in os.environ.items() if "SLURM" not in k} | {"PYTHONPATH": str(launched.ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"dpo-jax: --distributed auto: .* or HOST:PORT,PROCESSES,INDEX\n", done.stderr)
