"""What a command imports before it does anything: nothing that it does not use. Counted, since times are noise."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax import cli
from dpo_jax.config.commands import COMMAND_CONFIGS

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("jax", "numpy", "scipy", "flax", "optax", "orbax", "transformers", "datasets", "matplotlib", "torch")
COUNT = f"print('imported:', *(name for name in {HEAVY} if name in sys.modules))"
HELP = f"""
import sys
from dpo_jax import cli
try:
    cli.run(sys.argv[1:])
finally:
    {COUNT}
"""
START = f"import importlib, sys; importlib.import_module('dpo_jax.' + sys.argv[1] + '_command'); {COUNT}"
USED = {
    "train": {"jax", "numpy", "flax", "optax", "orbax"},
    "losses": {"jax", "numpy"},
    "models": {"jax", "numpy", "flax"},
    "report": {"numpy"},
}


def imported(code, *argv):
    """Returns what a process prints before it says what it has imported, and that."""
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said, _, names = done.stdout.rpartition("imported:")
    return said, set(names.split())


@pytest.mark.parametrize("command", [*cli.COMMANDS, ""])
def test_help_imports_nothing_heavy(command):
    said, names = imported(HELP, *filter(None, [command, "--help"]))
    assert "dpo-jax" in said
    assert names == set()
    if command in COMMAND_CONFIGS:  # of the options of losses too, which their functions have
        assert ("Strength of the KL constraint" in said) == (command not in ("pairs", "frontier"))


def test_help_is_of_the_loss_and_optimiser_that_are_chosen():
    for argv in (["configs/synthetic_reward.yaml"], ["--loss.name", "bradley_terry"]):
        said, names = imported(HELP, "train", *argv, "--optim.name", "adamw", "-h")
        assert "--optim.b2" in said
        assert "--loss.beta" not in said
        assert names == set()


@pytest.mark.parametrize("command", USED)
def test_a_command_imports_what_it_uses(command):
    assert imported(START, command)[1] == USED[command]
