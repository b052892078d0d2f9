"""Models of the Hugging Face hub: a name and maybe a revision become a folder of the hub's own cache on this disk."""

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# All that is ever fetched: weights as safetensors, settings and tokenizers, from the top of the repository.
WANTED = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "*.jinja")
UNWANTED = ("*/*", "consolidated*", "training_args*", "optimizer*")


def is_hub_name(path: str) -> bool:
    """Returns whether a path can only mean a model of the hub: `owner/name` or `owner/name@revision`."""
    return not Path(path).expanduser().exists() and NAME.fullmatch(path) is not None


@cache
def fetch_model(path: str) -> Path:
    """Returns the folder of a model of the hub, fetching what is not yet in the hub's cache.

    No code and no pickle is fetched. $HF_HUB_OFFLINE, $HF_HOME, $HF_ENDPOINT and $HF_TOKEN mean what they always do.

    Args:
      path: `owner/name`, or `owner/name@revision` with a branch, a tag or a commit.

    Raises:
      UserError: there is no such model or revision, no network, or no permission.
    """
    folder, (name, revision) = _copied(path, WANTED), _parts(path)
    if not any(folder.glob("*.safetensors")):
        how = "convert it with transformers: model.save_pretrained(folder, safe_serialization=True)"
        raise UserError(f"{path}: the hub has no safetensors of it, and a pickle is never read; {how}")
    if revision != folder.name:
        print(f"{path}: revision {folder.name}; {name}@{folder.name} is always this one")
    return folder


def hub_config_file(path: str) -> Path:
    """Returns the config.json of a model of the hub without fetching its weights; the rest is as in `fetched`."""
    return _copied(path, ("config.json",)) / "config.json"


def _parts(path: str) -> tuple[str, str | None]:
    match = NAME.fullmatch(path)
    assert match is not None
    return match[1], match[2]


def _copied(path: str, wanted: tuple[str, ...]) -> Path:
    """Returns the folder of the hub's cache with the files that are wanted."""
    from huggingface_hub import snapshot_download  # here, since it takes a while to import
    from huggingface_hub.errors import HfHubHTTPError

    name, revision = _parts(path)
    failures: Any = (OSError, ValueError, *HfHubHTTPError.__bases__)  # its bases: all errors of the HTTP client
    patterns = {"allow_patterns": list(wanted), "ignore_patterns": list(UNWANTED)}
    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"no such folder{_near(path)}, and the hub has given no such model"
        raise UserError(f"{path}: {what}: {reason}") from error


def _near(path: str) -> str:
    """Returns which folder may be meant by a path that is none."""
    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, names, 1)
    return f" (did you mean {folder / close[0]}?)" if close else ""
