"""Folders of caches and runs, and files that appear only when they are complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """Returns the folder of tokenized data and reference log-probs: $DPO_JAX_CACHE, or ~/.cache/dpo_jax."""
    return Path(os.environ.get("DPO_JAX_CACHE") or Path.home() / ".cache" / "dpo_jax")


def keep_compiled() -> None:
    """Keeps compiled programs beside the other caches, so that a second run starts at once.

    $JAX_COMPILATION_CACHE_DIR sets another folder.
    """
    import jax  # here, so that data can import this module without JAX

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def is_run(path: str | Path) -> bool:
    """Returns whether a folder is a run folder."""
    return (Path(path) / "config.yaml").is_file()


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[IO[str]]:
    """Opens a text file that appears under its name only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            yield f
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # exists only after an error
