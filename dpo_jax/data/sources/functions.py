"""Data sources by name: the modules of this folder, or the user's own `module:function`."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from dpo_jax.data.sources.base import Item, RawExample, Stream, open_stream, source_names, unknown_choice
from dpo_jax.data.sources.files import example_items
from dpo_jax.data.sources.schemas import hub_of, listed
from dpo_jax.errors import UserError
from dpo_jax.named import Option, import_function, options_of, with_defaults
from dpo_jax.records import Comparison

MAPPED = ("files", "memory")  # whose examples may have any columns
NONE: Mapping[str, str] = MappingProxyType({})


def open_source(
    name: str,
    path: tuple[str, ...],
    split: str,
    responses: int,
    options: Sequence[str] = (),
    columns: Mapping[str, str] = NONE,
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

    Raises:
      UserError: an unknown source or option; data that cannot be read; no comparison.
    """
    if ":" not in name:
        if options:
            raise UserError(f"data.options: the source {name!r} has none; remove it")
        return _built_in(name, path, split, responses, columns)
    function = import_function(name, "data.name")
    chosen = with_defaults("data.options.", source_options(function), _pairs(options))
    stream = Stream(lambda: _items(name, partial(function, path, split, **chosen), responses, columns))
    if not any(isinstance(item, Comparison | UserError) for item in stream):
        raise UserError(f"data.name: {name} yields no comparison of split {split!r} of {list(path)}")
    return stream


def _built_in(name: str, path: tuple[str, ...], split: str, responses: int, columns: Mapping[str, str]) -> Stream:
    """Returns a source of this package, or a known data set by its name (`schemas`)."""
    hub = hub_of(name)
    if hub is None and name not in source_names():
        raise unknown_choice("data source (data.name)", name, [*source_names(), *(known for known, *_ in listed())])
    if hub == "" and not path:
        raise UserError(f"data.path is empty; {name} is a format of files: name some")
    if hub is not None:
        name, path = "files", path or (hub,)
    if not columns:
        return open_stream(name, path, split, responses)
    if name not in MAPPED:
        raise UserError(f"data.columns: the source {name!r} knows its own columns; remove it, or set data.name: files")
    rows = importlib.import_module(f"dpo_jax.data.sources.{name}").rows
    return Stream(lambda: example_items(rows(path, split), responses, columns))


def source_options(function: Callable) -> list[Option]:
    """Returns the options of one's own source."""
    return options_of(function)


def _pairs(options: Sequence[str]) -> Mapping[str, str]:
    pairs = [text.partition("=") for text in options]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise UserError(f"data.options: {bad[0]!r}: write name=value")
    return {name: value for name, _, value in pairs}


def _items(name: str, read: Callable[[], Any], responses: int, columns: Mapping[str, str]) -> Iterator[Item]:
    """Yields the items of one's own source; dicts are converted, comparisons passed on."""

    def examples() -> Iterator[RawExample | UserError]:
        for index, row in enumerate(read()):
            if not isinstance(row, Mapping):
                yield UserError(f"{name}[{index}]: a {type(row).__name__}; yield dicts of columns, or Comparisons only")
            else:
                yield f"{name}[{index}]", dict(row)

    first = next(iter(read()), None)
    if not isinstance(first, Comparison):
        yield from example_items(examples(), responses, columns)
        return
    for index, item in enumerate(read()):
        if not isinstance(item, Comparison) or len(item.responses) != responses:
            yield UserError(f"{name}[{index}]: yield Comparisons of {responses} responses, as the first one is one")
        else:
            yield item if item.where else item._replace(where=f"{name}[{index}]")
