"""Losses and optimisers as a config knows them: their names and options, read from their source.

A variant is a function under `@register`, and its keyword-only parameters are its options: annotations are types,
defaults defaults, and the docstring is the help. They are read without importing the function, which would import JAX
with it: neither a help text nor a mistyped key is worth a second of waiting.
"""

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import docstring_parser

from dpo_jax.errors import closest

PACKAGE = Path(__file__).parent.parent
OF_EVERY_TERM = ("transformed", "weighted")  # functions of losses/term_options.py, whose options every loss has
TYPES = {kind.__name__: kind for kind in (bool, int, float, str)}
# What others call some losses, where the closest name here is not what is meant.
ELSEWHERE = {
    "sigmoid": "dpo",
    "cdpo": "dpo",
    "dpo_norm": "sigmoid_norm",
    "sppo": "sppo_hard",
    "listwise": "lipo",
    "nll": "sft",
    "preferred_ft": "sft",
    "reward_model": "bradley_terry",
}
Variants = Mapping[str, Mapping[str, Sequence[ast.FunctionDef]]]


class Option(NamedTuple):
    """An option, as its parameter says it."""

    name: str
    kind: Any  # bool, int, float, str or a Literal of texts
    default: Any
    help: str


@functools.cache
def variants() -> Variants:
    """Returns section of a config -> name of a variant -> the functions whose keyword-only parameters it has."""
    terms = {function.name: function for function in _functions(PACKAGE / "losses" / "term_options.py")}
    every = tuple(terms[name] for name in OF_EVERY_TERM)
    losses = [f for file in sorted((PACKAGE / "losses").glob("*.py")) for f in _functions(file) if _registered(f)]
    optimisers = [f for f in _functions(PACKAGE / "optim.py") if _registered(f)]
    return {"loss": {f.name: (f, *every) for f in losses}, "optim": {f.name: (f,) for f in optimisers}}


def unknown_name(name: str, known: Sequence[str]) -> str:
    """Returns the end of an error message on an unknown name of a loss or an optimiser: what is probably meant."""
    return f"here it is {ELSEWHERE[name]!r}" if ELSEWHERE.get(name) in known else closest(name, known)


def _functions(file: Path) -> Iterator[ast.FunctionDef]:
    """Yields the functions of a module."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _registered(function: ast.FunctionDef) -> bool:
    """Returns whether a function is under `@register` or `@register(...)`."""
    marks = [mark.func if isinstance(mark, ast.Call) else mark for mark in function.decorator_list]
    return any(isinstance(mark, ast.Name) and mark.id in ("register", "register_optimizer") for mark in marks)


def options_of(function: ast.FunctionDef) -> list[Option]:
    """Returns the options of a function.

    Raises:
      ValueError: one without a default, or of a type that a config cannot read.
    """
    documented = docstring_parser.parse(ast.get_docstring(function) or "").params
    said = {p.arg_name: " ".join((p.description or "").split()) for p in documented}
    parameters = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return [_option(function.name, p, default, said.get(p.arg, "")) for p, default in parameters]


def _option(function: str, parameter: ast.arg, default: ast.expr | None, said: str) -> Option:
    kind = parameter.annotation
    if default is None:
        raise ValueError(f"{function}: {parameter.arg} has no default")
    if isinstance(kind, ast.Name) and kind.id in TYPES:
        return Option(parameter.arg, TYPES[kind.id], ast.literal_eval(default), said)
    if isinstance(kind, ast.Subscript) and isinstance(kind.value, ast.Name) and kind.value.id == "Literal":
        return Option(parameter.arg, Literal[ast.literal_eval(kind.slice)], ast.literal_eval(default), said)
    raise ValueError(f"{function}: {parameter.arg} is none of {', '.join(TYPES)} and Literal[...]")


def first_line(function: ast.FunctionDef) -> str:
    """Returns the first line of a function's docstring."""
    return (ast.get_docstring(function) or "").partition("\n")[0]
