"""The command `dpo-jax`, and `python -m dpo_jax`."""

import contextlib
import os
import sys
from pathlib import Path

HUGE_PAGES = "glibc.malloc.hugetlb=1"
TRAINING = {"train", "sweep", "frontier"}


def use_huge_pages(enabled: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> None:
    """Starts this process again with huge pages for large arrays, where Linux leaves that to programs (madvise).

    A step on a CPU maps its memory anew, and the kernel clears it page by page: a sixth of the step's time with pages
    of 4 KiB. glibc reads $GLIBC_TUNABLES when a process starts, and has no other way to choose.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not enabled.is_file() or "[madvise]" not in enabled.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, HUGE_PAGES)))
    with contextlib.suppress(OSError):  # another user's Python may be one that only its owner can start
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run() -> None:
    """Runs the command line."""
    if TRAINING & set(sys.argv[1:2]):
        use_huge_pages()
    from dpo_jax.cli import main  # imported late: a process that starts again imports it once

    main()


if __name__ == "__main__":
    run()
