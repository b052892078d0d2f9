"""`data.columns`: which columns, or parts of them, are the usual ones.

A column is named as `question`, a part of one as `conversation.0.content`, a text made of several as
`{instruction}\n{input}`, and a number whose lower values are better as `-rank`.
"""

import re
from collections.abc import Mapping
from typing import Any

from dpo_jax.data.sources.base import TIE, Note
from dpo_jax.data.sources.values import Example, as_list, number_column
from dpo_jax.errors import UserError

PLACE = re.compile(r"\{([^{}]+)\}")
# Names that data sets give to the usual columns, for a hint.
ALSO = {
    "prompt": ("question", "instruction", "query", "input", "context", "problem", "user"),
    "chosen": ("chosen_response", "preferred", "better", "output_1", "response_a", "response_1"),
    "rejected": ("rejected_response", "dispreferred", "worse", "output_2", "response_b", "response_2"),
    "completion": ("response", "output", "answer", "text"),
}


def map_columns(where: str, example: Example, columns: Mapping[str, str]) -> Example | Note:
    """Returns an example with the mapped columns under their usual names, or a note for a tie.

    Args:
      where: `file:line`, with which error messages begin.
      example: values by column name.
      columns: usual name -> column; also `first`, `second` and `winner` = `column=value,value`: the response in
        `first` is the better one if the column has the first value, that in `second` if it has the second value.

    Raises:
      UserError: a column is missing.
    """
    plain = {name: spec for name, spec in columns.items() if name not in ("first", "second", "winner")}
    found = {name: _read(where, name, example, spec) for name, spec in plain.items()}
    if "winner" in columns:
        pair = _by_winner(where, example, columns)
        if isinstance(pair, Note):
            return pair
        found |= pair
    sources = {part for spec in columns.values() for part in names_in(spec)}
    return {name: value for name, value in example.items() if name not in sources} | found


def names_in(spec: str) -> list[str]:
    """Returns the names of the columns that a mapping reads."""
    if PLACE.search(spec):
        return [name for part in PLACE.findall(spec) for name in names_in(part)]
    bare = spec.removeprefix("-").partition("=")[0]
    return [bare, bare.partition(".")[0]]


def fitting(example: Example, wanted: tuple[str, ...] = ("prompt", "chosen", "rejected")) -> str:
    """Returns the mapping that would fit an example's columns, as a hint in an error; "" if none is known."""
    found = {}
    for name in wanted:
        other = next((column for column in ALSO.get(name, ()) if column in example), None)
        if name not in example and other:
            found[name] = other
    return f"; set data.columns: {{{', '.join(f'{k}: {v}' for k, v in found.items())}}}" if found else ""


def _read(where: str, name: str, example: Example, spec: str) -> Any:
    if PLACE.search(spec):
        template = spec.replace("\\n", "\n")
        return PLACE.sub(lambda match: str(_read(where, name, example, match[1])), template).strip("\n")
    if spec.startswith("-"):
        return _negated(where, name, _read(where, name, example, spec[1:]))
    if spec in example:
        return example[spec]
    value: Any = example
    for part in spec.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            columns = as_list(example) or "none"
            raise UserError(f"{where}: data.columns.{name}: no {spec!r}; the columns are: {columns}") from None
    return value


def _negated(where: str, name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_negated(where, name, one) for one in value]
    return -number_column(where, f"data.columns.{name}", value)


def _by_winner(where: str, example: Example, columns: Mapping[str, str]) -> Example | Note:
    column, _, values = columns["winner"].partition("=")
    names = values.split(",")
    if len(names) != 2 or not {"first", "second"} <= columns.keys():
        raise UserError("data.columns.winner: give column=value,value, and the responses in first and second")
    sides = [_read(where, side, example, columns[side]) for side in ("first", "second")]
    won = str(_read(where, "winner", example, column))
    if won not in names:
        return TIE
    return dict(zip(("chosen", "rejected"), sides if won == names[0] else sides[::-1], strict=True))
