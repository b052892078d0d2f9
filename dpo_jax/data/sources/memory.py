"""Data given in Python: a list of dicts, a `datasets.Dataset` or any iterable of dicts with the usual columns."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.data.sources.base import Item, RawExample
from dpo_jax.data.sources.files import example_items, has_turns
from dpo_jax.errors import UserError

COLUMNS = "those of files"
KEPT: dict[str, Sequence[Mapping[str, Any]]] = {}  # name -> examples, for the life of the process


def keep_examples(examples: Iterable[Mapping[str, Any]]) -> str:
    """Keeps examples for `read` and returns their name, a hash of their content.

    An iterable that can be read only once is copied to a list; a `datasets.Dataset` stays on disk.

    Raises:
      UserError: no element, or one that is not a dict.
    """
    kept: Any = examples if hasattr(examples, "__getitem__") and hasattr(examples, "__len__") else list(examples)
    if not len(kept):
        raise UserError("data: no example; give at least one dict of columns")
    digest = hashlib.blake2b(digest_size=8)
    for index, example in enumerate(kept):
        if not isinstance(example, Mapping):
            raise UserError(f"data: element {index} is a {type(example).__name__}; give dicts of columns")
        digest.update(json.dumps(_plain(example), sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
    name = f"examples-{digest.hexdigest()}"
    KEPT[name] = kept
    return name


def _plain(value: Any) -> Any:
    """Returns a value with the lists and numbers of Python in place of numpy's."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Returns the comparisons of examples kept by `keep_examples`.

    Args:
      path: their names.
      split: unused; training and held-out examples have names of their own.
      responses: responses per prompt.

    Raises:
      UserError: the examples were given to another process.
    """
    return example_items(rows(path, split), responses, chat=has_turns(rows(path, split)))


def rows(path: Sequence[str], split: str) -> Iterator[RawExample]:
    """Yields the examples kept under names."""
    del split
    for name in path:
        if name not in KEPT:
            raise UserError(f"data.path: {name} was given in Python; give data=... again, or set data.name")
        yield from ((f"data[{i}]", _plain(example)) for i, example in enumerate(KEPT[name]))
