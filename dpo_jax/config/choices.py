"""Losses and optimizers by name, and their options, read from the source: importing them would import JAX.

A name and its options are what `losses` and `optim` register: the functions under `@register` and
`@register_optimizer`, their keyword-only parameters and docstrings. A test compares both ways of reading.
"""

import ast
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import docstring_parser

from dpo_jax.errors import UserError, closest
from dpo_jax.named import Option

PACKAGE = Path(__file__).parent.parent
DECORATORS = {"loss": "register", "optim": "register_optimizer"}
FOLDERS = {"loss": "losses", "optim": "optim"}
# Functions whose options every loss and every optimizer has, before and after its own.
COMMON_BEFORE = {"loss": (), "optim": ("learning_rates", "clipped")}
COMMON_AFTER = {"loss": ("transformed", "rejected_part", "weighted"), "optim": ()}
TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str}


def choice_names(section: str) -> list[str]:
    """Returns the names of all losses ("loss") or optimizers ("optim"), those of optax last."""
    own = sorted(name for name, (node, _) in _functions(section).items() if _is_registered(node, DECORATORS[section]))
    return own if section == "loss" else own + _optax_names()


def choice_options(section: str, name: str) -> tuple[str, list[Option]] | None:
    """Returns the first line about a loss or an optimizer, and its options; None if only importing it tells them.

    Raises:
      UserError: no such name.
    """
    if ":" in name:
        return None
    if name not in (known := choice_names(section)):
        raise UserError(f"{section}.name: unknown name {name!r}; {closest(name, known)}, or give module:function")
    functions = _functions(section)
    if name not in functions:
        return None
    order = (*COMMON_BEFORE[section], name, *COMMON_AFTER[section])
    title = (ast.get_docstring(functions[name][0]) or "").partition("\n")[0]
    return title, [option for one in order for option in _options_of(*functions[one])]


@functools.cache
def _functions(section: str) -> dict[str, tuple[ast.FunctionDef, ast.Module]]:
    """Returns the functions in the files of a section, with their modules."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((PACKAGE / FOLDERS[section]).glob("*.py"))]
    return {node.name: (node, tree) for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def _is_registered(node: ast.FunctionDef, decorator: str) -> bool:
    used = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(isinstance(d, ast.Name) and d.id == decorator for d in used)


def _optax_names() -> list[str]:
    """Returns the names in `optim.more.OPTAX`."""
    tree = ast.parse((PACKAGE / "optim" / "more.py").read_text(encoding="utf-8"))
    parts: Sequence[Any] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AugAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == "OPTAX"
    ]
    return [name for part in parts for name in ast.literal_eval(part)]


def _options_of(node: ast.FunctionDef, tree: ast.Module) -> list[Option]:
    """Returns the keyword-only parameters of a function, as `named.options_of` does."""
    documented = docstring_parser.parse(ast.get_docstring(node) or "").params
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in documented}
    aliases = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    return [
        Option(arg.arg, _kind(arg.annotation, aliases), ast.literal_eval(default), texts.get(arg.arg, ""))
        for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if default is not None
    ]


def _kind(annotation: ast.expr | None, aliases: dict[str, ast.expr]) -> Any:
    """Returns the type of an annotation: bool, int, float, str, or a Literal of texts, which may have a name."""
    text = ast.unparse(annotation) if annotation else "str"
    if text in TYPES:
        return TYPES[text]
    written = annotation if isinstance(annotation, ast.Subscript) else aliases[text]
    assert isinstance(written, ast.Subscript)
    return Literal[ast.literal_eval(written.slice)]
