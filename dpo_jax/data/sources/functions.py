"""Data sources by name: the modules of this folder, or the user's own `module:function`."""

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dpo_jax.data.sources.base import (
    Item,
    RawExample,
    Stream,
    checked_stream,
    open_stream,
    source_names,
    unknown_choice,
)
from dpo_jax.data.sources.files import NONE, example_items, has_turns
from dpo_jax.data.sources.schemas import hub_of, listed
from dpo_jax.errors import UserError
from dpo_jax.named import Option, import_function, options_of, with_defaults
from dpo_jax.records import Comparison

MAPPED = ("files", "memory")  # whose examples may have any columns
Part = tuple[tuple[str, ...], str]  # (path, split)


def open_source(
    name: str,
    path: tuple[str, ...],
    split: str,
    responses: int,
    options: Sequence[str] = (),
    columns: Mapping[str, str] = NONE,
    text_prompts: str = "auto",
    beside: Sequence[Part] = (),
) -> Stream:
    """Returns the items of one split of a source, built-in or `module:function`.

    One's own function is `(path, split, *, option=default, ...) -> iterable`, of dicts with the usual columns (see
    `columns`) or of `Comparison`s; it is called again whenever the data is read again.

    Args:
      name: `data.name`.
      path: `data.path`.
      split: the split to read.
      responses: responses per prompt.
      options: `data.options`, texts name=value for the keyword-only parameters of one's own function.
      columns: `data.columns`, see `mapping`; for files, examples in memory and one's own function.
      text_prompts: `data.text_prompts`; likewise.
      beside: (path, split) of the config's other data, whose text prompts are read alike; unreadable data are ignored.

    Raises:
      UserError: an unknown source or option; data that cannot be read; no comparison.
    """
    if ":" in name:
        read = partial(import_function(name, "data.name"), **_chosen(name, options))
        if isinstance(next(iter(read(path, split)), None), Comparison):
            return checked_stream(lambda: _own_comparisons(name, read(path, split), responses), name, path, split)
        return _of_rows(partial(_own_rows, name, read), name, path, split, responses, columns, text_prompts, beside)
    if options:
        raise UserError(f"data.options: the source {name!r} has none; remove it")
    module, path = _built_in(name, path)
    if module in MAPPED:
        rows = importlib.import_module(f"dpo_jax.data.sources.{module}").rows
        return _of_rows(rows, name, path, split, responses, columns, text_prompts, beside)
    if module == "mixture" and not columns:
        read = importlib.import_module("dpo_jax.data.sources.mixture").read
        return checked_stream(lambda: read(path, split, responses, text_prompts, beside), name, path, split)
    if columns or text_prompts != "auto":
        key = "columns" if columns else "text_prompts"
        raise UserError(f"data.{key}: the source {name!r} knows its own columns; remove it, or set data.name: files")
    return open_stream(module, path, split, responses)


def takes_columns(name: str) -> bool:
    """Returns whether the examples of a source may have any columns: files, a known data set, or one's own."""
    return ":" in name or name in MAPPED or hub_of(name) is not None


def _chosen(name: str, options: Sequence[str]) -> dict[str, Any]:
    return with_defaults("data.options.", source_options(import_function(name, "data.name")), _pairs(options))


def _built_in(name: str, path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Returns the module and the path of a source of this package, or of a known data set (`schemas`)."""
    hub = hub_of(name)
    if hub is None and name not in source_names():
        raise unknown_choice("data source (data.name)", name, [*source_names(), *(known for known, *_ in listed())])
    if hub == "" and not path:
        raise UserError(f"data.path is empty; {name} is a format of files: name some")
    return (name, path) if hub is None else ("files", path or (hub,))


def _of_rows(
    rows: Callable[..., Iterable[RawExample | UserError]],
    name: str,
    path: tuple[str, ...],
    split: str,
    responses: int,
    columns: Mapping[str, str],
    text_prompts: str,
    beside: Sequence[Part],
) -> Stream:
    """Returns the comparisons of examples whose columns are converted. `rows` is (path, split) -> examples."""

    @functools.cache
    def chat() -> bool | None:
        if text_prompts != "auto":
            return text_prompts == "turns"
        return turns_of(path, split) or any(_readable(turns_of, *one) for one in beside) or None

    def turns_of(path: tuple[str, ...], split: str) -> bool | None:
        return has_turns(rows(path, split), columns)

    return checked_stream(lambda: example_items(rows(path, split), responses, columns, chat()), name, path, split)


def _readable(turns_of: Callable[..., bool | None], path: tuple[str, ...], split: str) -> bool:
    """Returns whether text prompts of data are turns; False for unreadable data. A user's source may raise anything."""
    try:
        return bool(turns_of(path, split))
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def source_options(function: Callable) -> list[Option]:
    """Returns the options of one's own source."""
    return options_of(function)


def _pairs(options: Sequence[str]) -> Mapping[str, str]:
    pairs = [text.partition("=") for text in options]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise UserError(f"data.options: {bad[0]!r}: write name=value")
    return {name: value for name, _, value in pairs}


def _own_rows(name: str, read: Callable[..., Any], path: Sequence[str], split: str) -> Iterator[RawExample | UserError]:
    """Yields the dicts of one's own source; a bad row may be a UserError."""
    for index, row in enumerate(read(path, split)):
        if isinstance(row, UserError):
            yield row
        elif not isinstance(row, Mapping):
            yield UserError(f"{name}[{index}]: a {type(row).__name__}; yield dicts of columns, or Comparisons only")
        else:
            yield f"{name}[{index}]", dict(row)


def _own_comparisons(name: str, items: Iterable[Any], responses: int) -> Iterator[Item]:
    """Yields the comparisons of one's own source."""
    for index, item in enumerate(items):
        if not isinstance(item, Comparison) or len(item.responses) != responses:
            yield UserError(f"{name}[{index}]: yield Comparisons of {responses} responses, as the first one is one")
        else:
            yield item if item.where else item._replace(where=f"{name}[{index}]")
