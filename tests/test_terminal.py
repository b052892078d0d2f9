"""The terminal: text is shown as text, and errors are one line at any width, in any encoding, with closed outputs."""

import asyncio
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from launched import ROOT
from rich.console import Console

from dpo_jax import cli
from dpo_jax.commands import common
from dpo_jax.errors import printable


def test_characters_that_a_terminal_obeys_are_escaped():
    assert printable("a\x1b]0;owned\x07\x1b[2J b\x9b1m \u202ecba\ud800") == (
        r"a\x1b]0;owned\x07\x1b[2J b\x9b1m \u202ecba\ud800"
    )
    assert printable("é 漢字 👩‍👩‍👧\tb\nc") == "é 漢字 👩‍👩‍👧\tb\nc"


def test_samples_are_shown_as_they_are(monkeypatch, capsys):
    monkeypatch.setattr(common, "Console", lambda: Console(width=200, force_terminal=True))
    common.print_samples([("[red]p[/b]", "x\x1b[2J\ny", "\ud800")], ("policy", "[bold]reference"))
    shown = capsys.readouterr().out
    assert "[red]p[/b]" in shown
    assert "[bold]reference" in shown
    assert r"x\x1b[2J / y" in shown
    assert r"\ud800" in shown


def command(argv, **more):
    """Runs the command line in a process of its own, with what a shell may do to its terminal."""
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"PYTHONPATH": str(ROOT)}
    environment |= more.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "dpo_jax", *argv], env=environment, capture_output=True, timeout=120, **more, check=False
    )


def test_errors_are_one_line_in_any_width_and_encoding(tmp_path):
    for env in ({"COLUMNS": "5"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "0", "PYTHONIOENCODING": "latin-1"}):
        done = command(["train", "x.yaml", "--batch_size", "é\x1b[2J"], env=env, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1
        assert b"x.yaml: cannot be read" in done.stderr
        assert b"\x1b" not in done.stderr
    (tmp_path / "x.yaml").write_text("batch_size: é\n")
    wide, narrow = (command(["train", "x.yaml"], env={"COLUMNS": c}, cwd=tmp_path).stderr for c in ("200", "5"))
    assert wide == narrow
    assert b"batch_size" in wide.splitlines()[0]


def test_help_on_a_narrow_terminal_ends():
    assert command(["train", "--help"], env={"COLUMNS": "5"}).returncode == 0


def test_arguments_that_are_no_utf8_are_refused(tmp_path):
    done = command(["data", b"\xff.yaml"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"dpo-jax: argument '\\udcff.yaml' is not UTF-8; write it in UTF-8, or rename the file\n"


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both", "pipe", "full"])
def test_output_that_cannot_be_written_ends_without_a_traceback(closed):
    redirected = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-", "pipe": "| true", "full": ">/dev/full"}[closed]
    line = f"{sys.executable} -m dpo_jax losses {redirected}; echo ${{PIPESTATUS[0]}} >&3"
    read, write = os.pipe()
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&{write}; {line}"], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        capture_output=True, pass_fds=[write], timeout=120,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as pipe:
        code = int(pipe.read())
    assert b"Traceback" not in done.stderr
    assert code in {"pipe": (0, 1, 141), "full": (2,)}.get(closed, (0,))
    assert not done.stderr or (closed == "full" and done.stderr.count(b"\n") == 1)


def test_a_callback_that_outlives_a_failed_save_says_nothing(monkeypatch):
    """tensorstore's callbacks report to sys.unraisablehook. Other errors, and those of our own code, are shown."""
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda unraisable: shown.append(unraisable))
    (loop := asyncio.new_event_loop()).close()
    with pytest.raises(RuntimeError) as raised:
        loop.call_soon_threadsafe(print)
    error, ours = raised.value, raised.value.__traceback__
    cli.show_unraisable(SimpleNamespace(exc_value=error, exc_traceback=ours.tb_next))
    assert shown == []
    others = [(error, ours), (error, None)]
    others += [(other, ours.tb_next) for other in (RuntimeError("bad news"), OSError("Event loop is closed"))]
    given = [SimpleNamespace(exc_value=value, exc_traceback=trace) for value, trace in others]
    for unraisable in given:
        cli.show_unraisable(unraisable)
    assert shown == given


HEAD = ("method", "true reward (95%)", "KL to the reference (95%)", "accuracy", "length", "gap to the optimum")
ROW = ["dpo, beta 0.05", "2.68 (2.41 .. 2.95)", "3.51 (3.02 .. 4.00)", "0.712", "41.3", "0.14 +- 0.09"]


@pytest.mark.parametrize("width", [10, 40, 60, 80, 200])
@pytest.mark.parametrize("wrap", [False, True])
def test_no_number_of_a_table_is_cut(width, wrap, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    common.print_table(HEAD, [ROW, ROW], wrap=wrap)
    said = capsys.readouterr().out
    words = said.split()
    assert "\u2026" not in said
    for number in re.findall(r"[\d.]*\d", " ".join(ROW)):
        assert sum(number in word for word in words) >= 2, number
    if width == 200:
        assert max(map(len, said.splitlines())) > 100  # a table
