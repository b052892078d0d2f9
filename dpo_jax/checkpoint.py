"""Checkpoints by orbax, each with a manifest of checksums, since orbax restores a flipped byte without a word."""

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax.records import TrainState

MANIFEST = "manifest.json"


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _write_manifest(folder: Path) -> None:
    """Writes the checksums of all files; from then on the checkpoint counts."""
    entries = {str(p.relative_to(folder)): _digest(p) for p in _files(folder)}
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w") as f:
        json.dump(entries, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / MANIFEST)


def problem(folder: Path) -> str:
    """Returns what is wrong with a checkpoint folder, or an empty string."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return "it was not finished"
    except ValueError:
        return "its manifest is damaged"
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            return f"{name} is {'damaged' if path.is_file() else 'missing'}"
    return ""


class Checkpoints:
    """The checkpoints of a run: asynchronous saves, checked restores."""

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False):
        """Opens the folder.

        Args:
          folder: where the checkpoints lie; made unless `read_only`.
          keep: how many to keep, at least 2, so that a damaged newest leaves one before it.
          read_only: touch nothing, for a reader beside a run that may still be going on.
        """
        self.folder, self.read_only = folder.absolute(), read_only
        logging.getLogger("absl").setLevel(logging.ERROR)
        writer = {} if read_only else {"max_to_keep": keep, "cleanup_tmp_directories": True}
        options = ocp.CheckpointManagerOptions(create=not read_only, read_only=read_only, **writer)
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.worker = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, state: TrainState, step: int) -> None:
        """Saves a state without waiting for the disk; a failure of the save before it is raised here."""
        self.wait()
        self.manager.save(step, args=ocp.args.StandardSave(state), force=True)
        self.pending = self.worker.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self.manager.wait_until_finished()
        if jax.process_index() == 0:
            _write_manifest(self.folder / str(step))

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def restore(self, like: TrainState) -> TrainState | None:
        """Returns the newest checkpoint that is whole, or None.

        Damaged ones are moved to `damaged/` beside the folder (a reader skips them), and said so.

        Args:
          like: shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves).
        """
        for step in sorted((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), reverse=True):
            why = problem(self.folder / str(step))
            if not why:
                restored: Any = self.manager.restore(step, args=ocp.args.StandardRestore(like))
                return restored
            self._set_aside(step, why)
        return None

    def _set_aside(self, step: int, why: str) -> None:
        if self.read_only:
            print(f"checkpoint {step}: {why}; using the one before it")
            return
        aside = self.folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        target = aside / f"{step}-{sum(1 for _ in aside.iterdir())}"
        shutil.move(self.folder / str(step), target)
        self.manager.reload()
        print(f"checkpoint {step}: {why}; moved to {target}, using the one before it")

    def close(self) -> None:
        """Waits for the disk and ends the threads."""
        try:
            self.wait()
        finally:
            self.worker.shutdown()
            self.manager.close()
