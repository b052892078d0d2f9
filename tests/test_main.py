"""The start of the command: huge pages for the arrays of a step on a CPU."""

import os
import subprocess
import sys

import pytest

from dpo_jax.__main__ import HUGE_PAGES, TRAINING, run, use_huge_pages
from dpo_jax.cli import COMMANDS

CODE = """
import os, sys
from pathlib import Path
from dpo_jax.__main__ import use_huge_pages
use_huge_pages(Path(sys.argv[1]))
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[2:])
"""


def start(folder, mode, tunables=None):
    """Returns the process id before, and what the process prints of itself in the end."""
    (enabled := folder / "enabled").write_text(mode)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-c", CODE, enabled, "--loss.beta", "a b"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        output = process.communicate()[0]
    assert process.returncode == 0
    return [str(process.pid), *output.split()]


def test_a_process_starts_again_with_huge_pages_and_its_arguments(tmp_path):
    before, after, *rest = start(tmp_path, "always [madvise] never\n")
    assert before == after
    assert rest == [HUGE_PAGES, "--loss.beta", "a", "b"]


def test_other_tunables_are_kept(tmp_path):
    assert start(tmp_path, "[madvise]", "glibc.malloc.check=0")[2] == f"glibc.malloc.check=0:{HUGE_PAGES}"


@pytest.mark.parametrize(
    ("mode", "tunables"),
    [("[always] madvise never", None), ("always madvise [never]", None), ("[madvise]", "glibc.malloc.hugetlb=0")],
)
def test_the_choice_of_the_system_and_of_the_user_stays(tmp_path, mode, tunables):
    assert start(tmp_path, mode, tunables)[2] == str(tunables)


def test_nothing_happens_without_linux(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *args: started.append(args))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    use_huge_pages(tmp_path / "none")
    assert started == []
    assert "GLIBC_TUNABLES" not in os.environ


def test_a_process_that_cannot_start_again_goes_on(tmp_path, monkeypatch):
    (enabled := tmp_path / "enabled").write_text("[madvise]")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    tried, execute = [], os.execv
    monkeypatch.setattr(os, "execv", lambda *args: tried.append(args) or execute(*args))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    use_huge_pages(enabled)
    assert [path for path, _ in tried] == [str(tmp_path / "no-python")]


@pytest.mark.parametrize(("command", "expected"), [("train", ["pages", "main"]), ("losses", ["main"]), ("", ["main"])])
def test_commands_that_train_use_them(monkeypatch, command, expected):
    assert set(COMMANDS) > TRAINING
    called = []
    monkeypatch.setattr("dpo_jax.__main__.use_huge_pages", lambda: called.append("pages"))
    monkeypatch.setattr("dpo_jax.cli.main", lambda: called.append("main"))
    monkeypatch.setattr(sys, "argv", ["dpo-jax", command])
    run()
    assert called == expected
