"""Models of the Hugging Face hub: `owner/name`, perhaps with a revision -> a folder in the hub's local cache."""

import logging
import re
from functools import cache
from pathlib import Path

from dpo_jax import __version__
from dpo_jax.errors import UserError, closest, hub_errors
from dpo_jax.paths import expand_home

log = logging.getLogger(__name__)

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# The only files that are fetched: weights as safetensors, settings, tokenizers, card and license, from the repository's
# top.
WANTED = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "*.jinja")
WANTED += ("README.md", "LICENSE*", "NOTICE*")  # for the card of a model trained from it
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]  # those of an earlier upload would be loaded too
UNWANTED = ("*/*", "consolidated*", "training_args*", "optimizer*")


def is_hub_name(path: str) -> bool:
    """Returns whether a path can only mean a model of the hub: `owner/name` or `owner/name@revision`."""
    return not expand_home(path).exists() and NAME.fullmatch(path) is not None


@cache
def fetch_model(path: str) -> Path:
    """Returns the local folder of a model of the hub, and fetches files that are not yet in the hub's cache.

    No code and no pickle is fetched. $HF_HUB_OFFLINE, $HF_HOME, $HF_ENDPOINT and $HF_TOKEN have their usual meaning.

    Args:
      path: `owner/name`, or `owner/name@revision` with a branch, a tag or a commit.

    Raises:
      UserError: there is no such model or revision, no network, or no permission.
    """
    folder, (name, revision) = _snapshot(path, WANTED), _name_and_revision(path)
    if not any(folder.glob("*.safetensors")):
        how = "convert it with transformers: model.save_pretrained(folder, safe_serialization=True)"
        raise UserError(f"{path}: the hub has no safetensors of it, and a pickle is never read; {how}")
    if revision != folder.name:
        log.info(f"{path}: revision {folder.name}; {name}@{folder.name} is always this one")
    return folder


def hub_config_file(path: str) -> Path:
    """Returns config.json of a model of the hub, without its weights; arguments and errors as for `fetch_model`."""
    return _snapshot(path, ("config.json",)) / "config.json"


def hub_repository(path: str) -> str:
    """Returns `owner/name` of a model of the hub, without its revision."""
    return _name_and_revision(path)[0]


def check_push(repository: str) -> None:
    """Refuses what cannot be uploaded to: a name without owner, or the hub without a token or a network.

    Raises:
      UserError: the message says what to set.
    """
    from huggingface_hub import constants, get_token

    if NAME.fullmatch(repository) is None or "@" in repository:
        raise UserError(f"--push {repository}: no repository of the hub; write owner/name")
    if constants.is_offline_mode():
        raise UserError("--push: HF_HUB_OFFLINE is set, which forbids the network; unset it")
    if get_token() is None:
        raise UserError("--push: no token of the hub; log in with hf auth login, or set HF_TOKEN to one that may write")


def push_folder(folder: Path, repository: str, *, public: bool = False) -> str:
    """Uploads an exported folder to a model repository of the hub, which is created if need be; returns its address.

    Args:
      folder: the folder; all of its files are uploaded in one commit.
      repository: `owner/name`.
      public: whether a new repository is public. One that exists keeps its visibility.

    Raises:
      UserError: no network, no permission, or the hub refuses the files; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dpo_jax", library_version=__version__)
    again = f"; {folder} is complete, upload it with hf upload {repository} {folder}"
    with hub_errors(f"--push {repository}", again):
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        message = "Upload a model of dpo_jax"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=WEIGHTS)
    return address


def _name_and_revision(path: str) -> tuple[str, str | None]:
    match = NAME.fullmatch(path)
    assert match is not None
    return match[1], match[2]


def _snapshot(path: str, wanted: tuple[str, ...]) -> Path:
    """Returns the folder in the hub's cache, with the files that match `wanted`."""
    from huggingface_hub import snapshot_download  # imported late: it is slow to import

    name, revision = _name_and_revision(path)
    patterns = {"allow_patterns": list(wanted), "ignore_patterns": list(UNWANTED)}
    what = f"{path}: no such folder{_folder_hint(path)}, and the hub has given no such model"
    with hub_errors(what, "; name a folder, a hub id, or the config (.yaml) of the run that trains it"):
        return Path(snapshot_download(name, revision=revision, **patterns))


def _folder_hint(path: str) -> str:
    """Returns which local folder a missing one may be a misspelling of, or ""."""
    folder = Path(path).parent
    hint = closest(Path(path).name, [entry.name for entry in folder.iterdir()] if folder.is_dir() else [])
    return f" ({hint}, in {folder})" if hint.startswith("did you mean") else ""
