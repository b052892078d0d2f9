"""What a command imports before it does anything: nothing that it does not use. Counted, since times are noise."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_jax
from dpo_jax import cli, libtpu
from dpo_jax.config.commands import COMMAND_CONFIGS
from dpo_jax.data.sources.synthetic import synthetic_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("jax", "numpy", "scipy", "flax", "optax", "orbax", "transformers", "datasets", "matplotlib", "torch")
COUNT = f"print('imported:', *(name for name in {HEAVY} if name in sys.modules))"
HELP = f"""
import sys
from dpo_jax import cli
try:
    cli.run_command(sys.argv[1:])
finally:
    {COUNT}
"""
START = f"import importlib, sys; importlib.import_module('dpo_jax.commands.' + sys.argv[1]); {COUNT}"
USED = {
    "train": {"jax", "numpy", "flax", "optax"},
    "losses": {"jax", "numpy"},
    "models": {"jax", "numpy"},
    "report": {"numpy"},
}


def imported(code, *argv):
    """Returns what a process prints before it says what it has imported, and that."""
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said, _, names = done.stdout.rpartition("imported:")
    return said, set(names.split())


@pytest.mark.parametrize("every", ["--help", "--help-all"])
@pytest.mark.parametrize("command", [*cli.COMMANDS, ""])
def test_help_imports_nothing_heavy(command, every):
    said, names = imported(HELP, *filter(None, [command, every if command else "--help"]))
    assert "dpo-jax" in said
    assert names == set()
    assert [line for line in said.splitlines() if len(line) > 80] == []
    if command:
        assert said.startswith(f"usage: dpo-jax {command}")
        assert cli.COMMANDS[command].what in said
    if command in COMMAND_CONFIGS:
        assert ("--data.path TEXT ..." in said) == (every == "--help-all" and command not in ("export", "leaderboard"))
        assert ("\n  --help-all\n" in said) == (every == "--help")


@pytest.mark.parametrize("argv", [["configs/synthetic_reward.yaml"], ["--loss.name", "bradley_terry"]])
def test_help_is_of_the_loss_and_optimizer_that_are_chosen(argv):
    said, names = imported(HELP, "train", *argv, "--optim.name", "adamw", "--help-all")
    assert "--optim.b2" in said
    assert "--loss.center" in said
    assert "\n  --loss.beta" not in said
    assert names == set()


def test_help_of_a_sweep_over_losses_is_of_the_first():
    said, _ = imported(HELP, "sweep", "configs/synthetic_dpo.yaml", "--loss.name", "ipo,dpo", "--help-all")
    assert "\n  --loss.beta" in said
    assert "--loss.label_smoothing" not in said


FIRST_LINE = f"""
import importlib, sys
from dpo_jax import cli
def stop(name):
    {COUNT}
    raise SystemExit
importlib.import_module = stop
cli.run_command(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "configs/synthetic_dpo.yaml", "--run", "configs"], "reading configs/synthetic_dpo.yaml\n"),
        (["report", "configs", "tests"], "reading configs, tests\n"),
        (["export", "configs", "tests"], "reading configs\n"),
        (["sample", "owner/model", "--prompt", "README.md"], "loading JAX\n"),
        (["losses"], "loading JAX\n"),
        (["train", "configs/synthetic_dpo.yaml", "--distributed", "auto"], ""),
    ],
)
def test_a_command_says_what_it_reads_before_it_imports_anything(argv, said):
    assert imported(FIRST_LINE, *argv) == (said, set())


def test_the_version():
    assert imported(HELP, "--version")[0].split() == ["dpo_jax", dpo_jax.__version__]


def test_importing_the_package_imports_nothing_and_each_name_its_own_module():
    code = f"import sys, dpo_jax; {COUNT}"
    assert imported(code)[1] == set()
    _, names = imported(f"import sys, dpo_jax; dpo_jax.UserError; dpo_jax.Config; dpo_jax.Batch; {COUNT}")
    assert names == {"numpy"}
    done = imported(
        f"import sys, dpo_jax; [getattr(dpo_jax, n) for n in dpo_jax.__all__]; print(*dir(dpo_jax)); {COUNT}"
    )
    assert set(dpo_jax.__all__) <= set(done[0].split())


@pytest.mark.parametrize("command", USED)
def test_a_command_imports_what_it_uses(command):
    assert imported(START, command)[1] == USED[command]


def test_libtpu_is_told_what_a_machine_without_a_tpu_lacks(tmp_path, monkeypatch):
    for name in libtpu.WITHOUT_TPU:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(libtpu, "DEVICES", tmp_path)
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: None)
    libtpu.quiet_libtpu()
    assert "TPU_WORKER_HOSTNAMES" not in os.environ  # it is not installed
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "vendor").write_text("0x1ae0\n")
    libtpu.quiet_libtpu()
    assert "TPU_WORKER_HOSTNAMES" not in os.environ  # there may be a TPU
    (tmp_path / "0" / "vendor").write_text("0x10de\n")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    libtpu.quiet_libtpu()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v5p-8"  # what a user has set stays


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or libtpu.has_google_device(), reason="no libtpu here, or a TPU"
)
def test_jax_finds_its_devices_without_a_word_of_libtpu():
    plain = {name: value for name, value in os.environ.items() if name[:4] not in ("TPU_", "JAX_")}
    code = "import dpo_jax, jax; print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=plain)
    assert done.stderr == ""


TOKENIZER = f"""
import sys
from dpo_jax.models.huggingface.folder import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
tokenizer.decode(tokenizer("I saw")["input_ids"])
{COUNT}
from transformers.modeling_rope_utils import torch as late
import torch
assert late.float32 is torch.float32 and type(late) is not type(torch)
"""


def test_a_tokenizer_leaves_torch_alone(tmp_path):
    """Transformers imports it for rotary positions; what asks for it there later gets the real one."""
    synthetic_tokenizer().save_pretrained(tmp_path)
    _, names = imported(TOKENIZER, str(tmp_path))
    assert "transformers" in names
    assert "torch" not in names
