"""The contract of a data source, and the functions that all sources share.

A source is a module of this package with one function,

    read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]

and a text `COLUMNS` that names the columns it reads, for `dpo-jax data --list`.

- `path` names files, folders or hub ids; () is the source's own data set, if it has one.
- `responses` is the number of responses of every comparison: 2 or more for preferences, best first; 1 for supervised
  fine-tuning; 0 for prompts alone.
- The same arguments always yield the same items in the same order.
- A response starts where the prompt ends: `prompt + response` is the text that a model sees, and no character belongs
  to both. A conversation (`Chat`) is followed by one assistant message instead.
- Every comparison has a `where` (`file:line` or the like), with which error messages begin.
- A bad example is yielded as the `UserError` that names it, so that the caller decides whether to skip it.
- Examples that the source merges or leaves out are yielded as a `Note`, which the report counts.
- `UserError` is raised only if the source cannot go on: a missing file, an unsupported number of responses.
- Heavy libraries are imported inside of functions.
"""

import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from dpo_jax.data import sources
from dpo_jax.errors import UserError, closest
from dpo_jax.records import Chat, Comparison

T = TypeVar("T")


class Note(NamedTuple):
    """A count for the report: the text that follows the number, and the number."""

    text: str
    number: int = 1


TIE = Note("pairs of equal scores left out")
TIES = ("", "tie", "ties", "tied", "both", "neither", "none", "draw", "equal", "same", "null")  # in columns of winners
Item = Comparison | UserError | Note
RawExample = tuple[str, dict[str, Any]]
"""(`file:line` for error messages, values by column name)."""


def is_tie(winner: object) -> bool:
    """Returns whether a value in a column of winners names none: null, or a word such as `tie (bothbad)`."""
    return winner is None or (isinstance(winner, str) and re.split(r"[\s_(]+", winner.strip().lower())[0] in TIES)


class Stream:
    """A re-iterable stream of items: every iteration reads them again, so they are never in memory together.

    Args:
      start: returns a new iterator over the items.
    """

    def __init__(self, start: Callable[[], Iterator[Item]]):
        self._start = start

    def __iter__(self) -> Iterator[Item]:
        return self._start()


def unknown_choice(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for an unknown name: the most similar known name, and all of them."""
    names = sorted(known)
    everything = f"known: {', '.join(names)}"
    hint = closest(name, names)
    return UserError(f"unknown {kind} {name!r}; {hint if hint == everything else f'{hint} {everything}'}")


def or_error(function: Callable[..., T], *args: Any) -> T | UserError:
    """Returns the function's result, or the `UserError` that it raises."""
    try:
        return function(*args)
    except UserError as error:
        return error


def convert_examples(
    examples: Iterable[RawExample | UserError], convert: Callable[[str, dict[str, Any]], T]
) -> Iterator[T | UserError]:
    """Yields `convert(where, columns)` for each example; for a bad example, its error."""
    return (example if isinstance(example, UserError) else or_error(convert, *example) for example in examples)


def expand_examples(
    examples: Iterable[RawExample | UserError], convert: Callable[[str, dict[str, Any]], Iterable[Item]]
) -> Iterator[Item]:
    """Yields the items of each `convert(where, columns)`, any number per example; for a bad example, its error."""
    for items in convert_examples(examples, convert):
        yield from (items,) if isinstance(items, UserError) else items


def source_names() -> list[str]:
    """Returns the names of all sources, sorted: the modules of this package with a function `read`."""
    names = (info.name for info in pkgutil.iter_modules(sources.__path__))
    return sorted(name for name in names if hasattr(importlib.import_module(f"{sources.__name__}.{name}"), "read"))


def open_stream(name: str, path: tuple[str, ...], split: str, responses: int) -> Stream:
    """Returns the items of one split of a source.

    Args:
      name: a name in `source_names()`.
      path: files, folders or hub ids, as the source's `read` takes them.
      split: `train`, `test` or another split that the source has.
      responses: responses per prompt: 2 for preference pairs, 1 for supervised fine-tuning, 0 for prompts alone.

    Raises:
      UserError: the source is unknown; when it is read, that it cannot read its data, or yields only notes.
    """
    known = {info.name for info in pkgutil.iter_modules(sources.__path__)}
    module = importlib.import_module(f"{sources.__name__}.{name}") if name in known else None
    if module is None or not hasattr(module, "read"):
        raise unknown_choice("data source (data.name)", name, source_names())
    return checked_stream(lambda: module.read(tuple(path), split, responses), name, path, split)


def checked_stream(start: Callable[[], Iterator[Item]], name: str, path: Sequence[str], split: str) -> Stream:
    """Returns a stream that raises a UserError after its last item if it has notes only."""
    empty = f"data source {name!r} has no comparisons in split {split!r} of {list(path)}; check data.path"
    return Stream(lambda: _some(start(), empty))


def _some(items: Iterator[Item], empty: str) -> Iterator[Item]:
    """Yields items, and raises `empty` in the end if they were notes only: sources that group read all of it first."""
    only_notes = True
    for item in items:
        only_notes = only_notes and isinstance(item, Note)
        yield item
    if only_notes:
        raise UserError(empty)


def only_comparisons(items: Iterable[Item]) -> Iterator[Comparison]:
    """Yields the comparisons among items; raises the first error, skips notes."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        if isinstance(item, Comparison):
            yield item


def load_comparisons(name: str, path: tuple[str, ...], split: str, responses: int) -> list[Comparison]:
    """Returns the comparisons of a split in memory. Arguments and errors as `open_stream`; a bad example is raised."""
    return list(only_comparisons(open_stream(name, path, split, responses)))


def prompt_key(prompt: str | Chat) -> int:
    """Returns a 64-bit blake2b hash of the prompt alone, as an integer."""
    return int.from_bytes(hashlib.blake2b(as_bytes(prompt), digest_size=8).digest(), "big")


def as_bytes(part: Any) -> bytes:
    """Returns a prompt or response as bytes that differ for different ones: UTF-8, or a zero byte and JSON."""
    if isinstance(part, str):
        return part.encode("utf-8", "surrogatepass")
    if isinstance(part, Chat):
        part = [*part[:2], dict(part.options)]
    return b"\0" + json.dumps(part, sort_keys=True).encode()


def prompt_hash(prompt: str | Chat) -> float:
    """Returns the prompt's key scaled to [0, 1)."""
    return prompt_key(prompt) / 2**64


def holdout(items: Iterable[Item], fraction: float) -> tuple[Stream, Stream]:
    """Splits items into (train, eval) by prompt, so that equal prompts are always on the same side.

    Args:
      items: re-iterable. Both sides keep their order. Errors and notes go to train.
      fraction: the expected share of prompts in eval, in [0, 1). The side of a prompt depends on its hash alone, so
        adding data moves none.

    Raises:
      UserError: the fraction is out of range; while iterating, if a side is empty or all examples are bad.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.eval_fraction must be at least 0 and below 1, not {fraction}")

    def side(wanted: bool) -> Iterator[Item]:
        counts, bad = [0, 0], None
        for item in items:
            bad = item if bad is None and isinstance(item, UserError) else bad
            in_eval = isinstance(item, Comparison) and prompt_hash(item.prompt) < fraction
            counts[in_eval] += isinstance(item, Comparison)
            if in_eval == wanted:
                yield item
        if bad and not any(counts):
            raise UserError(f"all examples are bad; the first: {bad}")
        if fraction and not all(counts):
            raise UserError(
                f"data.eval_fraction {fraction} leaves {counts[0]} of {sum(counts)} comparisons to train on and "
                f"{counts[1]} to evaluate; add data, change the fraction, or set data.eval_split or data.eval_path"
            )

    return Stream(lambda: side(False)), Stream(lambda: side(True))
