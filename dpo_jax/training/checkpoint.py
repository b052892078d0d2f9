"""Checkpoints by orbax with checksums, because orbax restores a flipped byte silently.

A checkpoint is a folder `<step>/` with orbax's files and `manifest.json`, which is written last: format, checksums of
every file and of every leaf, and the metrics of the evaluation at that step. The checksum of a leaf does not depend on
its sharding, so it is checked after the array is restored to the devices, with whatever mesh.
"""

import functools
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import distributed
from dpo_jax.errors import UserError
from dpo_jax.paths import written
from dpo_jax.records import Array, TrainState
from dpo_jax.training.metrics_file import with_current_names

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
EVALUATION = "eval.json"  # in the folder of a checkpoint, if the state was evaluated
FORMAT = 1  # of the manifest
LOWER = ("loss", "nll", "kl")  # lower is better for metrics with one of these in their name
ROOM = 1.1  # free disk space to require, as a multiple of the state's bytes


def _orbax() -> Any:
    """Returns orbax, imported at the first save or restore: it takes as long to import as the rest of the package."""
    import orbax.checkpoint

    return orbax.checkpoint


def checksums(tree: Any) -> dict[str, Array]:
    """Returns a uint32 for each leaf: the sum, modulo 2^32, of each element's bits times a weight of its index.

    Integer sums do not depend on the order of summation, so checksums do not depend on the sharding. Pure; for
    `jax.jit`.
    """
    return {jax.tree_util.keystr(path): _checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksum(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = (place ^ (place >> 15)) * jnp.uint32(0x9E3779B1) + index
    weight = (place ^ (place >> 13)) * jnp.uint32(0x85EBCA6B) | 1  # odd, so that any flipped bit changes the sum
    return jnp.sum(bits * weight, dtype=jnp.uint32)


_checksums = jax.jit(checksums)


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return file_digest(f, "blake2b").hexdigest()


def _write_manifest(folder: Path, leaves: Mapping[str, list], metrics: Mapping[str, float]) -> None:
    """Writes the manifest, which completes the checkpoint."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    digests = {str(p.relative_to(folder)): _digest(p) for p in files}
    content = {"format": FORMAT, "jax": jax.__version__, "orbax": _orbax().__version__}
    content |= {"files": digests, "leaves": dict(leaves), "metrics": dict(metrics)}
    with written(folder / MANIFEST) as f:
        json.dump(content, f)


def write_evaluation(path: Path, step: int, found: Mapping[str, Any]) -> None:
    """Writes an evaluation, metric -> mean, low, high and n, with its step."""
    with written(path) as file:
        json.dump({"step": step, "metrics": found}, file, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
      FileNotFoundError: there is no manifest; the checkpoint is incomplete.
      ValueError: the manifest is damaged.
      UserError: the format is another version's.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("no manifest")
    if content.get("format") != FORMAT:
        found = f"format {content.get('format')}, written with jax {content.get('jax')}, orbax {content.get('orbax')}"
        raise UserError(f"{folder}: {found}; this version reads format {FORMAT}: resume with the version that wrote it")
    if not all(isinstance(content.get(part), dict) for part in ("files", "leaves", "metrics")):
        raise ValueError("incomplete manifest")
    if not all(_is_leaf(leaf) for leaf in content["leaves"].values()):
        raise ValueError("a leaf is not dtype, shape and checksum")
    if not all(isinstance(value, int | float | None) for value in content["metrics"].values()):
        raise ValueError("a metric is no number")
    return content


def _is_leaf(leaf: Any) -> bool:
    return isinstance(leaf, list) and list(map(type, leaf)) == [str, list, int]


def checkpoint_problem(folder: Path) -> str:
    """Returns what is wrong with the files of a checkpoint; "" if they are intact.

    Raises:
      UserError: the format is another version's.
    """
    try:
        expected = read_manifest(folder)["files"]
    except FileNotFoundError:
        return "incomplete (no manifest)"
    except ValueError:
        return "its manifest is damaged"
    if not expected:
        return "its manifest lists no files"
    for name, digest in expected.items():
        path = folder / name
        if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
            return f"its manifest lists {name}, outside the checkpoint"
        if not path.is_file() or _digest(path) != digest:
            return f"{name} is {'damaged' if path.is_file() else 'missing'}"
    return ""


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, intact or not, newest first."""
    found = (p for p in folder.iterdir() if re.fullmatch("0|[1-9][0-9]{0,17}", p.name) and p.is_dir())
    return sorted((int(p.name) for p in found), reverse=True)


def goodness(metric: str, value: float | None) -> float:
    """Returns a number that is higher for better values of a metric; minus infinity for NaN and for no value."""
    if value is None or not math.isfinite(value):
        return -math.inf
    return -value if any(word in metric for word in LOWER) else value


def best_checkpoint(folder: Path, metric: str) -> int | None:
    """Returns the step of the complete checkpoint with the best value of a metric; ties go to the later step.

    A checkpoint with a damaged manifest is skipped, with a message.
    """
    found = []
    for step in steps_in(folder):
        try:
            metrics = with_current_names(read_manifest(folder / str(step))["metrics"])
        except FileNotFoundError:
            continue
        except ValueError as e:
            log.warning(f"checkpoint {step}: its manifest is damaged ({e}); it cannot be the best one")
            continue
        if metrics.get(metric) is not None:
            found.append((goodness(metric, metrics[metric]), step))
    return max(found)[1] if found else None


class Checkpoints:
    """The checkpoints of a run: asynchronous saves, verified restores. Call every method from all processes."""

    def __init__(self, folder: Path, *, keep: int = 2, best: str = "", read_only: bool = False):
        """Opens the folder.

        Args:
          folder: folder of the checkpoints; created unless `read_only`.
          keep: number of newest checkpoints to keep, at least 2, so that one is left if the newest is damaged.
          best: metric whose best checkpoint is kept too; "" for none.
          read_only: write, move and delete nothing, since the run may still be training.
        """
        self.folder, self.keep, self.best, self.read_only = folder.absolute(), keep, best, read_only
        self.worker = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.times: dict[str, float] = {}
        if distributed.is_primary() and not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            for torn in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(torn, ignore_errors=True)
        distributed.barrier("checkpoints")

    @functools.cached_property
    def orbax(self) -> Any:
        """The checkpointer of orbax."""
        for library in ("absl", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # failures are raised, not also logged
        return _orbax().StandardCheckpointer()

    def save(self, state: TrainState, step: int, found: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """Saves a state without waiting for the disk.

        Args:
          state: the state; it may be donated as soon as this returns.
          step: updates done.
          found: the evaluation at that step, if any: metric -> mean, low, high and n.

        Raises:
          UserError: the disk has too little space, or the save before this one failed.
        """
        start = time.perf_counter()
        self.wait()
        self.check_room(state)
        sums = _checksums(state)
        self.orbax.save(self.folder / str(step), state, force=True)
        self.times["save_stall_seconds"] = time.perf_counter() - start
        self.pending = self.worker.submit(self._finish, step, state_shapes(state), sums, found or {}, start)

    def _finish(self, step: int, shapes: dict[str, list], sums: dict[str, Array], found: Any, start: float) -> None:
        self.orbax.wait_until_finished()
        if distributed.is_primary():
            leaves = {name: [*shapes[name], int(value)] for name, value in sums.items()}
            if found:
                write_evaluation(self.folder / str(step) / EVALUATION, step, found)
            _write_manifest(self.folder / str(step), leaves, {name: entry["mean"] for name, entry in found.items()})
            self._prune()
        self.times["save_seconds"] = time.perf_counter() - start

    def _prune(self) -> None:
        """Deletes all complete checkpoints except the newest and the best."""
        finished = [s for s in steps_in(self.folder) if (self.folder / str(s) / MANIFEST).is_file()]
        kept = {*finished[: self.keep], best_checkpoint(self.folder, self.best) if self.best else None}
        for step in set(finished) - kept:
            (self.folder / str(step) / MANIFEST).unlink()  # first: a half deleted one is then incomplete
            shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def taken(self) -> dict[str, float]:
        """Returns, once, the seconds that the last save took and those for which it blocked training; else {}."""
        done, self.times = (self.times, {}) if self.pending is None or self.pending.done() else ({}, self.times)
        return done

    def check_room(self, state: Any) -> None:
        """Raises UserError if the disk has too little space for one more checkpoint."""
        needed = ROOM * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"{free / 1e9:.3g} GB are free, a checkpoint takes {needed / 1e9:.3g} GB"
            raise UserError(f"{self.folder}: {sizes}; free disk space, then run the same command again")

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: the save failed.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except (OSError, ValueError, RuntimeError) as e:  # orbax raises ValueError for a full disk
            why = str(e).partition("\n")[0][:300]
            raise UserError(f"{self.folder}: a checkpoint could not be saved ({why}); fix this, then run again") from e

    def step_of(self, which: str) -> int | None:
        """Returns the step of `best`, of `last` (None, see `restore`), or of a number as text.

        "" is the best one if the run keeps it, else the last.

        Raises:
          UserError: there is no such checkpoint.
        """
        step = best_checkpoint(self.folder, self.best) if self.best and which in ("", "best") else None
        if which == "last" or (which == "" and step is None):
            return None
        steps, step = steps_in(self.folder), which if step is None else step
        if str(step) not in map(str, steps):
            why = "keep_best of the run names no metric" if which == "best" and not self.best else "not found"
            known = ", ".join(map(str, reversed(steps))) or "none yet"
            names = "best, last" if self.best else "last"
            raise UserError(f"{self.folder}: checkpoint {which}: {why}; name {names} or one of the steps {known}")
        return int(step)

    def restore(self, like: TrainState, step: int | None = None, optimizer: bool = True) -> TrainState | None:
        """Returns the newest checkpoint that is intact and fits; None if there is none.

        Newer checkpoints that are damaged or do not fit are moved to `damaged/` beside the folder, with a message; with
        `read_only` they are skipped.

        Args:
          like: shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves).
          step: restore only the checkpoint of this step; None for the newest.
          optimizer: whether to read the state of the optimizer, which only training needs; `like` has () for it if not.

        Raises:
          UserError: a checkpoint of another format, or all intact ones are of another model, loss or optimizer.
        """
        wanted, skipped = state_shapes(like), set[int]()
        unread = "" if optimizer else ".opt_state"
        while True:
            chosen = distributed.broadcast_from_primary(
                self._newest(wanted, unread, skipped, step) if distributed.is_primary() else -1
            )
            if chosen < 0:
                return None
            leaves = read_manifest(self.folder / str(chosen))["leaves"]
            restored: Any = self._read(chosen, like, optimizer)
            wrong = [name for name, value in _checksums(restored).items() if int(value) != leaves[name][-1]]
            if not wrong:
                return restored
            skipped.add(chosen)
            if distributed.is_primary():
                self._set_aside(chosen, f"{wrong[0]} differs from what was saved")

    def _read(self, step: int, like: TrainState, optimizer: bool) -> TrainState:
        """Returns the arrays of a checkpoint, all or those of the fields that `like` has."""
        if optimizer:
            return self.orbax.restore(self.folder / str(step), like)
        fields = {name: value for name, value in like._asdict().items() if jax.tree.leaves(value)}
        ocp = _orbax()
        how = ocp.checkpoint_utils.construct_restore_args(fields)
        args = ocp.args.PyTreeRestore(item=fields, restore_args=how, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return like._replace(**reader.restore(self.folder / str(step), args=args))

    def _newest(self, wanted: Mapping[str, list], unread: str, skipped: set[int], only: int | None) -> int:
        """Returns the newest step that is intact and fits, or -1; sets newer checkpoints aside."""
        foreign: dict[int, str] = {}
        for step in steps_in(self.folder):
            if step in skipped or only not in (None, step):
                continue
            if why := checkpoint_problem(self.folder / str(step)):
                self._set_aside(step, why)
            elif why := _foreign(_read_leaves(self.folder / str(step), unread), wanted):
                foreign[step] = why
            else:
                for other, why in foreign.items():
                    self._set_aside(other, why)
                return step
        for step, why in foreign.items():
            raise UserError(f"{self.folder / str(step)}: {why}; set another --run")
        return -1

    def _set_aside(self, step: int, why: str) -> None:
        if self.read_only:
            log.warning(f"checkpoint {step}: {why}; skipped")
            return
        aside = self.folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        target = aside / f"{step}-{sum(1 for _ in aside.iterdir())}"
        shutil.move(self.folder / str(step), target)
        log.warning(f"checkpoint {step}: {why}; moved to {target}; using an earlier checkpoint")

    def close(self) -> None:
        """Waits for the last save and ends the threads."""
        try:
            self.wait()
        finally:
            self.worker.shutdown()
            if "orbax" in vars(self):
                self.orbax.close()


def _read_leaves(checkpoint: Path, unread: str) -> dict[str, list]:
    """Returns the manifest's leaves, but those whose path begins with `unread`."""
    leaves = read_manifest(checkpoint)["leaves"]
    return {name: leaf for name, leaf in leaves.items() if not (unread and name.startswith(unread))}


def state_shapes(state: Any) -> dict[str, list]:
    """Returns [dtype, shape] of each leaf, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): [np.dtype(x.dtype).name, list(x.shape)] for path, x in leaves}


def _foreign(leaves: Mapping[str, list], wanted: Mapping[str, list]) -> str:
    """Returns how the leaves of a checkpoint differ from the expected ones; "" if they do not."""
    for name in [*wanted, *(n for n in leaves if n not in wanted)]:
        found, expected = (x.get(name, ["absent"])[:2] for x in (leaves, wanted))
        if found != expected:
            why = f"{name} is {' '.join(map(str, found))} there, {' '.join(map(str, expected))} in this run"
            kind = "loss" if name == ".running" else "model or optimizer"
            return f"saved from another {kind} ({why})"
    return ""
