"""`data.columns`: which columns, or parts of them, are the usual ones.

A column is named as `question`, a part of one as `conversation.0.content`, a text made of several as
`{instruction}\n{input}`, and a number whose lower values are better as `-rank`.
"""

import re
from collections.abc import Mapping
from typing import Any

from dpo_jax.data.sources.base import TIE, Note, is_tie
from dpo_jax.data.sources.values import Example, as_list, number_column, parsed, shorten, type_name
from dpo_jax.errors import UserError

SIDES = ("first", "second", "winner", "score_first", "score_second")
PLACE = re.compile(r"\{([^{}]+)\}")
# Names that data sets give to the usual columns, for a hint.
ALSO = {
    "prompt": ("question", "instruction", "query", "input", "context", "problem", "user"),
    "chosen": ("chosen_response", "preferred", "preferred_response", "better", "accepted"),
    "rejected": ("rejected_response", "dispreferred", "dispreferred_response", "worse", "refused"),
    "completion": ("response", "output", "answer", "text"),
    "completions": ("answers", "outputs", "candidates"),
    "scores": ("ratings", "rewards", "-ranks", "-rank"),
}
RESPONSES = ("response", "output", "answer")
EITHER = tuple((f"{kind}_{a}", f"{kind}_{b}") for kind in RESPONSES for a, b in ("ab", "12", "01"))
WINNER = re.compile("winner|preference|choice|label|vote|better")
READ_AS_TURNS = ("messages", "conversations", "conversation", "tools", "history", "context", "input")


def map_columns(where: str, example: Example, columns: Mapping[str, str]) -> Example | Note:
    """Returns an example with the mapped columns under their usual names, or a note for a tie.

    Args:
      where: `file:line`, with which error messages begin.
      example: values by column name.
      columns: usual name -> column; also `first` and `second`, two responses of which either may be the better one:
        by `winner` = `column=value,value`, where the column has the first value if it is `first`, and
        a third one, if given, for ties; or by `score_first` and `score_second`.

    Raises:
      UserError: a column is missing or has an unknown value.
    """
    plain = {name: spec for name, spec in columns.items() if name not in SIDES}
    found = {name: _read(where, name, example, spec) for name, spec in plain.items()}
    if len(plain) < len(columns):
        if "token_weights" in example or "token_weights" in columns:
            raise UserError(f"{where}: 'token_weights' are of chosen and rejected; name those, not first and second")
        pair = _ordered(where, example, columns)
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


def fitting(example: Example, responses: int) -> str:
    """Returns the mapping that would fit an example's columns, as a hint in an error; "" if none is known."""
    sides = next((pair for pair in EITHER if set(pair) <= example.keys()), None)
    winner = next((name for name in example if WINNER.search(name)), None)
    found = {"prompt": _column_for("prompt", example)}
    if sides and winner and responses > 1:
        found |= {"first": sides[0], "second": sides[1], "winner": f"'{winner}=A,B'"}
    elif sides and responses > 1:
        found |= {"chosen": sides[0], "rejected": sides[1]}
    else:
        lists = any(isinstance(parsed(value), list) for name, value in example.items() if name not in READ_AS_TURNS)
        pair = ("chosen", "rejected") if not lists else ("completions", "scores")
        single = responses == 1 or "label" in example
        found |= {name: _column_for(name, example) for name in (("completion",) if single else pair)}
    named = ", ".join(f"{name}: {column}" for name, column in found.items() if column)
    means = ", where A and B are its values if the first and if the second is better" if "winner" in found else ""
    return f"; set data.columns: {{{named}}}{means}" if named else ""


def _column_for(name: str, example: Example) -> str:
    """Returns the column that probably is the usual one of a name; "" if that exists, or none is known."""
    if name in example:
        return ""
    return next((column for column in ALSO[name] if column.removeprefix("-") in example), "")


def _read(where: str, name: str, example: Example, spec: str) -> Any:
    if PLACE.search(spec):
        text = PLACE.sub(lambda match: _as_text(where, name, example, match[1]), spec.replace("\\n", "\n"))
        return text.strip("\n")
    if spec.startswith("-"):
        return _negated(where, name, _read(where, name, example, spec[1:]))
    if spec in example:
        return example[spec]
    value: Any = example
    for part in spec.split("."):
        value = parsed(value)
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            columns = as_list(example) or "none"
            raise UserError(f"{where}: data.columns.{name}: no {spec!r}; the columns are: {columns}") from None
    return value


def _negated(where: str, name: str, value: Any) -> Any:
    value = parsed(value)
    if isinstance(value, list):
        return [_negated(where, name, one) for one in value]
    return -number_column(where, f"data.columns.{name}", value)


def _as_text(where: str, name: str, example: Example, spec: str) -> str:
    """Returns a part of a text made of several columns; null is no text."""
    value = _read(where, name, example, spec)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: data.columns.{name}: a text is made of texts and numbers, not of {type_name(value)}")
    return "" if value is None else str(value)


def _ordered(where: str, example: Example, columns: Mapping[str, str]) -> Example | Note:
    """Returns chosen and rejected, with their scores if there are any; a note for a tie."""
    by_score = {"first", "second", "score_first", "score_second"}
    if columns.keys() & set(SIDES) not in (by_score, {"first", "second", "winner"}):
        raise UserError("data.columns: first and second need either winner, or score_first and score_second; set them")
    sides = [_read(where, side, example, columns[side]) for side in ("first", "second")]
    if "winner" in columns:
        won = _winner(where, example, columns["winner"])
        return TIE if won is None else {"chosen": sides[won], "rejected": sides[1 - won]}
    keys = ("score_first", "score_second")
    scores = [number_column(where, f"data.columns.{k}", _read(where, k, example, columns[k])) for k in keys]
    if scores[0] == scores[1]:
        return TIE
    best = int(scores[1] > scores[0])
    return {"chosen": sides[best], "rejected": sides[1 - best], "scores": [scores[best], scores[1 - best]]}


def _winner(where: str, example: Example, spec: str) -> int | None:
    """Returns 0 if the first value of `column=value,value` stands in the column, 1 for the second, None for a tie.

    A third value names ties; null and words such as `tie` do so anyway.
    """
    column, _, values = spec.partition("=")
    names = [_plain(name) for name in values.split(",")]
    if len(names) not in (2, 3) or len(set(names)) < len(names):
        raise UserError(
            "data.columns.winner: write column=value,value: that of the first response, then the second's, then that "
            "of ties if there is one"
        )
    found = _read(where, "winner", example, column)
    if _plain(found) in names:
        place = names.index(_plain(found))
        return place if place < 2 else None
    if is_tie(found):
        return None
    raise UserError(
        f"{where}: data.columns.winner: {column} is {shorten(found)}, neither {' nor '.join(names)} nor a tie; correct "
        "the values in data.columns.winner"
    )


def _plain(value: Any) -> str:
    """Returns a value as it is compared: in lower case, a number as 1 whether it is 1, 1.0 or a text of either."""
    text = str(parsed(value)).strip().lower()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else repr(number)
