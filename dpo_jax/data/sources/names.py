"""What the data of a config are called: the hub's ids, or names of local files."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.data.sources.files import is_hub_id
from dpo_jax.data.sources.mixture import parse_part
from dpo_jax.data.sources.schemas import hub_of


def data_names(name: str, path: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the hub ids (owner/name) of a config's data, and the names of all its data, for a reader.

    A local file or folder is named without the folders that it is in.

    Args:
      name: `data.name`.
      path: `data.path`.
    """
    if name == "mixture":
        parts = [data_names(part.source, part.path) for part in map(parse_part, path)]
        hubs, shown = ([item for part in parts for item in part[i]] for i in (0, 1))
        return list(dict.fromkeys(hubs)), list(dict.fromkeys(shown))
    if name == "memory":
        return [], ["examples given in Python"]
    entries = list(path) or list(filter(None, [_own_set(name)]))
    hubs = [entry.partition("@")[0].partition(":")[0] for entry in entries if is_hub_id(entry)]
    names = [entry if is_hub_id(entry) else Path(entry).name or entry for entry in entries]
    shown = names if name == "files" else [f"{name}: {', '.join(names)}" if names else name]
    return list(dict.fromkeys(hubs)), shown


def _own_set(name: str) -> str:
    """Returns the hub id that a source reads without a path; "" if it has none."""
    known = hub_of(name)
    if known is not None or ":" in name:
        return known or ""
    return getattr(importlib.import_module(f"dpo_jax.data.sources.{name}"), "HUB_ID", "")
