"""Preference data: a module for each source, then encode (text to ids), order (step to rows), pack (rows to batches).

A source is a module of this package with one function,

    read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]

which yields comparisons in a fixed order, each with exactly `responses` responses (2: a preference pair, best first;
1: a supervised fine-tuning example; 0: a prompt alone, to sample from) and a `where` for error messages. A response
starts where the prompt ends: the two share no character, and `prompt + response` is the text that a model sees. A row
that cannot be used is yielded as the `UserError` that says why, and what the source merges or leaves out as a `Note`;
a source raises `UserError` where it cannot go on. Heavy libraries are imported inside it.
"""

import difflib
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from dpo_jax.data import sources
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

T = TypeVar("T")


class Note(NamedTuple):
    """Something for the report to count: what it is, which is said after the number, and how many there are."""

    text: str
    number: int = 1


Item = Comparison | UserError | Note
Row = tuple[str, dict[str, Any]]
"""`file:line`, for error messages, and an object with named columns."""


class Stream:
    """Items that are read anew each time they are gone through, and never held in memory together."""

    def __init__(self, start: Callable[[], Iterator[Item]]):
        self._start = start

    def __iter__(self) -> Iterator[Item]:
        return self._start()


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the closest one that is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"unknown {kind} {name!r}; {hint}known: {', '.join(names)}")


def or_error(function: Callable[..., T], *args: Any) -> T | UserError:
    """What a function returns, or the UserError that it raises."""
    try:
        return function(*args)
    except UserError as error:
        return error


def convert_rows(
    rows: Iterable[Row | UserError], convert: Callable[[str, dict[str, Any]], T]
) -> Iterator[T | UserError]:
    """Yields what each row is converted to; a bad row is the error that it raises, or is already."""
    return (row if isinstance(row, UserError) else or_error(convert, *row) for row in rows)


def convert_each(
    rows: Iterable[Row | UserError], convert: Callable[[str, dict[str, Any]], Iterable[Item]]
) -> Iterator[Item]:
    """`converted`, where a row makes any number of items."""
    for items in convert_rows(rows, convert):
        yield from (items,) if isinstance(items, UserError) else items


def source_names() -> list[str]:
    """Names of the modules that fulfil the contract of a source, sorted."""
    names = (info.name for info in pkgutil.iter_modules(sources.__path__))
    return sorted(name for name in names if hasattr(importlib.import_module(f"{sources.__name__}.{name}"), "read"))


def open_stream(name: str, path: tuple[str, ...], split: str, responses: int) -> Stream:
    """The items of a split from the source `name`.

    Args:
      name: a module of this package.
      path: files, folders or hub ids, as the source understands them.
      split: `train`, `test` and so on.
      responses: for each prompt; 2 for preference pairs, 1 for supervised fine-tuning, 0 for prompts alone.

    Raises:
      UserError: the source is unknown, cannot read its data, or has none.
    """
    known = {info.name for info in pkgutil.iter_modules(sources.__path__)}
    module = importlib.import_module(f"{sources.__name__}.{name}") if name in known else None
    if module is None or not hasattr(module, "read"):
        raise unknown_name("data source (data.name)", name, source_names())
    found = Stream(lambda: module.read(tuple(path), split, responses))
    if all(isinstance(item, Note) for item in found):
        raise UserError(f"data source {name!r} has no comparisons in split {split!r} of {list(path)}; check data.path")
    return found


def only_comparisons(items: Iterable[Item]) -> Iterator[Comparison]:
    """The comparisons among items; an error among them is raised, notes are passed over."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        if isinstance(item, Comparison):
            yield item


def load_comparisons(name: str, path: tuple[str, ...], split: str, responses: int) -> list[Comparison]:
    """The comparisons of a split in memory; arguments and errors as for `stream`, and the first bad row is an error."""
    return list(only_comparisons(open_stream(name, path, split, responses)))


def prompt_key(prompt: str | Chat) -> int:
    """A number below 2**64 that depends on the prompt alone, equal for equal prompts: blake2b to 64 bits."""
    return int.from_bytes(hashlib.blake2b(as_bytes(prompt), digest_size=8).digest(), "big")


def as_bytes(part: Any) -> bytes:
    """A prompt or response as bytes, different for different ones."""
    if isinstance(part, str):
        return part.encode("utf-8", "surrogatepass")
    if isinstance(part, Chat):
        part = [*part[:2], dict(part.options)]
    return b"\0" + json.dumps(part, sort_keys=True).encode()


def prompt_hash(prompt: str | Chat) -> float:
    """The prompt's key as a fraction, in [0, 1)."""
    return prompt_key(prompt) / 2**64


def holdout(items: Iterable[Item], fraction: float) -> tuple[Stream, Stream]:
    """Splits into (train, eval) by prompt, so that equal prompts are always on one side.

    Args:
      items: can be gone through again and again; their order is kept on both sides. Errors and notes go to train.
      fraction: the expected share of prompts held out, in [0, 1). The side of a prompt does not depend on the rest.

    Raises:
      UserError: the fraction is out of range; while it is gone through, if a side is empty or no row can be used.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.eval_fraction must be at least 0 and below 1, not {fraction}")

    def side(held: bool) -> Iterator[Item]:
        counts, bad = [0, 0], None
        for item in items:
            bad = item if bad is None and isinstance(item, UserError) else bad
            its = isinstance(item, Comparison) and prompt_hash(item.prompt) < fraction
            counts[its] += isinstance(item, Comparison)
            if its == held:
                yield item
        if bad and not any(counts):
            raise UserError(f"no row can be used; the first: {bad}")
        if fraction and not all(counts):
            raise UserError(
                f"data.eval_fraction {fraction} leaves {counts[0]} of {sum(counts)} comparisons to train on and "
                f"{counts[1]} to evaluate; give more data, another fraction, or data.eval_split or data.eval_path"
            )

    return Stream(lambda: side(False)), Stream(lambda: side(True))
