"""Reads YAML files and command-line arguments as dotted keys with texts, and writes configs as YAML."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_jax.errors import UserError

# What PyYAML's constructors raise on a scalar with a tag that does not fit it.
_CONSTRUCTING = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
KeyTexts = Sequence[tuple[str, list[str]]]  # (dotted key, texts of its values)


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and without aliases.

    PyYAML would take the last of duplicate keys; nested aliases can expand to more text than fits in memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise UserError(f"{self.name}:{event.start_mark.line + 1}: alias *{event.anchor}: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep=deep)  # raises an error that names the node
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                line = node.value[i][0].start_mark.line + 1
                raise UserError(f"{self.name}:{line}: key {key!r} is given twice; remove one")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
      UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot be read ({why}); name a YAML file, as in configs/") from e
    try:
        loader = _Loader(text)
        loader.name = str(path)
        values = loader.get_single_data()
        str(values)  # fails for numbers of more digits than Python writes
    except (yaml.YAMLError, *_CONSTRUCTING) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a mapping; write `key: value` lines")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, list[str]]]:
    """Returns nested values as (dotted key, texts) pairs; elements of a list of mappings are counted from 0."""
    pairs = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value):
            pairs += flatten({str(i): v for i, v in enumerate(value)}, f"{name}.")
        else:
            pairs.append((name, [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]))
    return pairs


def arguments(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns `--key value ...` and `--key=value` arguments as (dotted key, texts) pairs."""
    pairs: list[tuple[str, list[str]]] = []
    for arg in argv:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            pairs.append((key.replace("-", "_"), [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(arg)
        else:
            raise UserError(f"argument {arg!r} belongs to no option; write options as --loss.beta 0.3")
    return pairs


def dump(config: Any) -> str:
    """Returns a config as YAML; `parse_config` of it returns an equal config."""
    return yaml.safe_dump(as_lists(dataclasses.asdict(config)), sort_keys=False)


def as_lists(value: Any) -> Any:
    """Returns nested values with tuples converted to lists, because YAML has no tuples."""
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, tuple | list) else value


def difference(old: Any, new: Any, ignore: Sequence[str]) -> list[str]:
    """Returns a line `key: old -> new` for each dotted key in which two configs differ, except those in `ignore`."""
    a, b = (dict(flatten(as_lists(dataclasses.asdict(c)))) for c in (old, new))
    keys = [k for k in [*a, *(k for k in b if k not in a)] if k not in ignore and a.get(k) != b.get(k)]
    return [f"{k}: {' '.join(a.get(k, ['-']))} -> {' '.join(b.get(k, ['-']))}" for k in keys]
