"""A small part of `scripts/fuzz`: nonsense in configs, rows, chat templates and headers ends in one line."""

import subprocess
import sys

from launched import ROOT


def test_nonsense_of_every_kind_ends_in_one_line():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/fuzz"), "250", "--seed", "1000000"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counts = [line.split(":")[0] for line in done.stdout.splitlines() if "refused in one line, 0 wrong" in line]
    assert counts == ["configs", "rows", "templates", "headers"]
