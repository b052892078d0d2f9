"""YAML files and arguments as dotted keys with their texts, the one form in which both are read."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_jax.errors import UserError

KeyTexts = Sequence[tuple[str, list[str]]]  # dotted keys and the texts given for them


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of taking the last, and aliases, whose few lines can stand for
    more text than there is memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise UserError(f"{self.name}:{event.start_mark.line + 1}: alias *{event.anchor}: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep=deep)  # which says what it is instead
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                line = node.value[i][0].start_mark.line + 1
                raise UserError(f"{self.name}:{line}: key {key!r} is given twice")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the mapping in a YAML file; a file that is absent, or no mapping, is a UserError."""
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or "it is no text"
        raise UserError(f"{path}: cannot be read ({why}); give the YAML of an experiment, as in configs/") from e
    try:
        loader = _Loader(text)
        loader.name = str(path)
        values = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no mapping of keys to values")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, list[str]]]:
    """Returns nested values as (dotted key, texts) pairs."""
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
            raise UserError(f"argument {arg!r} belongs to no option; options look like --loss.beta 0.3")
    return pairs


def dump(config: Any) -> str:
    """Returns a config as YAML that `parse` reads back to the same."""
    return yaml.safe_dump(as_lists(dataclasses.asdict(config)), sort_keys=False)


def as_lists(value: Any) -> Any:
    """Returns nested values with tuples as lists, the form that YAML knows."""
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, tuple | list) else value


def difference(old: Any, new: Any, ignore: Sequence[str]) -> list[str]:
    """Returns `key: old -> new` lines for each dotted key in which two configs differ."""
    a, b = (dict(flatten(as_lists(dataclasses.asdict(c)))) for c in (old, new))
    keys = [k for k in [*a, *(k for k in b if k not in a)] if k not in ignore and a.get(k) != b.get(k)]
    return [f"{k}: {' '.join(a.get(k, ['-']))} -> {' '.join(b.get(k, ['-']))}" for k in keys]
