"""Folders of caches and runs, and files: written as a whole, inside their run folder; read or refused in one line."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from dpo_jax.errors import UserError

T = TypeVar("T")
DRAFT = ".draft-"  # how the name of a file starts until it is complete
ABANDONED = 24 * 3600  # seconds after which the draft of a killed process is removed
LOCK_FILE = ".lock"  # in a run folder; the operating system releases it however its process ends
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Returns the folder of tokenized data and reference log-probs: $DPO_JAX_CACHE, or ~/.cache/dpo_jax.

    Raises:
      UserError: this user has no home folder.
    """
    if named := os.environ.get("DPO_JAX_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "dpo_jax"
    except RuntimeError as e:
        raise UserError("this user has no home folder for the caches; set DPO_JAX_CACHE to a folder") from e


def expand_home(path: str) -> Path:
    """Returns a path with ~ and ~name replaced by the home folder of this user or of another one.

    Raises:
      UserError: there is no such user, or the path has a character that no path has.
    """
    if "\0" in path:
        raise UserError(f"{path!r}: no path holds a null byte; correct it")
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UserError(f"{path}: {path.partition('/')[0]} has no home folder here; write the whole path") from e


def keep_compiled() -> None:
    """Keeps compiled programs beside the other caches, so that a second run starts at once.

    $JAX_COMPILATION_CACHE_DIR sets another folder. JAX by itself keeps only those that take a second to compile; a
    start spends as long on shorter ones.
    """
    import jax  # here, so that data can import this module without JAX

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def is_run(path: str | Path) -> bool:
    """Returns whether a folder is a run folder."""
    return (Path(path) / "config.yaml").is_file()


def refuse_links(folder: str | Path) -> None:
    """Refuses links in a run folder that lead out of it, through which a run would write or delete elsewhere."""
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(where, name)
            if os.path.islink(path):
                _check_inside(path, folder)


def _refuse_link_out(path: Path) -> None:
    """Refuses a path inside a run folder that a link leads out of it."""
    for folder in Path(os.path.abspath(path)).parents:
        if is_run(folder) and any((folder / mark).exists() for mark in (LOCK_FILE, "metrics.jsonl")):
            _check_inside(path, folder)


def _check_inside(path: str | Path, folder: str | Path) -> None:
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path}: a link that leads out of the run folder, to {real}; remove it")


@contextlib.contextmanager
def written(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that appears under its name only when it is complete and on disk.

    It is written to a draft beside it. The draft's name is used by nobody else, so that of two writers of one file the
    later one wins and the file is whole.

    Args:
      path: the file; missing folders are created.
      mode: "w" for text in UTF-8, where half a surrogate pair is written as its escape, or "wb" for bytes.

    Raises:
      UserError: a link leads out of the run folder that the file is in.
    """
    path = Path(path)
    _refuse_link_out(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{secrets.token_hex(4)}")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with draft.open(mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)  # exists only after an error


def remove_drafts(folder: Path, age: float = ABANDONED) -> None:
    """Removes the drafts of killed processes, those that are `age` seconds old."""
    for draft in folder.glob(f"{DRAFT}*"):
        with contextlib.suppress(OSError):  # another process has removed it, or it is not ours
            if time.time() - draft.lstat().st_mtime >= age:
                draft.unlink()


def load_json(path: str | Path, kind: type[T]) -> T:
    """Returns the value in a JSON file.

    Args:
      path: the file.
      kind: dict or list.

    Raises:
      UserError: the file cannot be read, is not JSON, or holds another kind of value.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        why = f"cannot be read ({e.strerror})" if isinstance(e, OSError) else f"not JSON ({' '.join(str(e).split())})"
        raise UserError(f"{path}: {why}; remove the file or write it again") from e
    if not isinstance(value, kind):
        name = {dict: "an object", list: "a list"}[kind]
        raise UserError(f"{path}: must hold {name}; remove the file or write it again")
    return value


def write_checked(path: Path, content: bytes) -> None:
    """Writes a file of a cache, with a last line that holds the digest of its content."""
    with written(path, "wb") as file:
        file.write(content + _digest_line(content))
    remove_drafts(path.parent)


def read_checked(path: Path) -> bytes | None:
    """Returns what `write_checked` wrote; None if there is no file, or, with a warning, if a byte of it changed."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content = stored[: -len(_digest_line(b""))]
    if stored == content + _digest_line(content):
        return content
    log.warning("%s: damaged; computing it again", path)
    return None


def _digest_line(content: bytes) -> bytes:
    return f"\n#blake2b {hashlib.blake2b(content, digest_size=16).hexdigest()}\n".encode()
