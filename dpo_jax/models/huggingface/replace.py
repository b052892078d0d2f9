"""Replaces a folder of an earlier export by a new one, and nothing that an export did not write."""

import fnmatch
import json
import os
import shutil
from pathlib import Path

from dpo_jax import __version__
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.safetensors import INDEX
from dpo_jax.paths import is_run, load_json

LISTING = "dpo_jax.json"  # in an export: the version that wrote it, and its files
# Files of the folder model/ of a run by version 0.1, which wrote no list.
UNLISTED = ("config.json", "generation_config.json", "model*.safetensors", INDEX, "*token*.json", "chat_template.*")
UNLISTED += ("vocab.json", "merges.txt", "additional_chat_templates/*", "*.model")


def write_listing(folder: Path) -> None:
    """Writes the list of the files in an export, so that a later export may replace them."""
    content = {"written_by": f"dpo_jax {__version__}", "files": _files_in(folder)}
    (folder / LISTING).write_text(json.dumps(content, indent=1), encoding="utf-8")


def check_replaceable(folder: Path) -> None:
    """Refuses a file, and a folder that holds anything but an earlier export as it was written.

    Raises:
      UserError: the message names the first other file.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name a folder to write the model to")
    if not folder.exists():
        return
    listed: list[str] = []
    if (folder / LISTING).is_file():
        listed = load_json(folder / LISTING, dict).get("files", [])
    patterns = UNLISTED if not listed and folder.name == "model" and is_run(folder.parent) else ()
    for name in _files_in(folder):
        if name not in (LISTING, *listed) and not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            raise UserError(f"{folder}: holds {name}, which no export wrote; choose another folder")


def replace_folder(new: Path, folder: Path) -> None:
    """Renames a new folder to its name and removes the old export there, which `check_replaceable` has allowed."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)


def _files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
