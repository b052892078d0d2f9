"""Values of columns, checked: texts, numbers and labels."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from dpo_jax.errors import UserError

FLOAT32_MAX = 3.4028234e38
SHOWN = 20  # column names in a message
Example = dict[str, Any]
JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair


class Cell(str):
    """Text of a CSV cell, which stands for a number, a truth value or a list where one is needed."""


def parsed(value: Any) -> Any:
    """Returns what a `Cell` stands for in JSON, with True and FALSE in any case; other texts and values as they are."""
    if not isinstance(value, Cell):
        return value
    for text in (value, value.lower()):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return str(value)


class MissingColumnError(UserError):
    """An example lacks a column."""


def type_name(value: object) -> str:
    """Returns the name of a value's type in JSON."""
    return "text" if isinstance(value, str) else JSON_TYPES.get(type(value), type(value).__name__)


def shorten(value: object, most: int = 60) -> str:
    """Returns a value as a message shows it: on one line, a long one cut short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def text_column(where: str, example: Example, key: str) -> str:
    """Returns the text in a column.

    Raises:
      UserError: the column is missing, or is not text.
    """
    value = value_of(where, example, key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, not {type_name(value)}")
    if not value.isascii() and SURROGATE.search(value):
        raise UserError(
            f"{where}: {key!r} holds half of a surrogate pair, which is not text; fix or remove the example"
        )
    return str(value)


def number_column(where: str, key: str, value: Any, least: float = -FLOAT32_MAX, most: float = FLOAT32_MAX) -> float:
    """Returns a finite number between `least` and `most`.

    Raises:
      UserError: the value is something else.
    """
    value = parsed(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {key!r} must be a number, not {type_name(value)}")
    if not least <= value <= most or math.isnan(value):
        bounds = "finite" if least == -FLOAT32_MAX else f"from {least:g} to {most:g}"
        bounds = "finite and not negative" if (least, most) == (0, FLOAT32_MAX) else bounds
        raise UserError(f"{where}: {key!r} must be {bounds}, not {shorten(value)}")
    return float(value)


def binary_label(where: str, key: str, value: Any) -> bool:
    """Returns a label: true or false, 1 or 0; also 1.0 or 0.0, which pandas writes if other labels are absent.

    Raises:
      UserError: the value is something else.
    """
    value = parsed(value)
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(f"{where}: {key!r} must be true or false, not {shorten(value)}")
    return bool(value)


def as_list(names: Iterable[str]) -> str:
    """Returns column names as a message shows them: sorted, shortened, at most 20."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(" ".join(name[:60].split()) for name in ordered[:SHOWN]) + more


def value_of(where: str, example: Example, key: str) -> Any:
    """Returns a column.

    Raises:
      UserError: it is missing; the message lists those that exist.
    """
    if key not in example:
        raise MissingColumnError(f"{where}: no column {key!r}; the columns are: {as_list(example) or 'none'}")
    return example[key]
