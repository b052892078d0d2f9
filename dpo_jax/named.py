"""Functions chosen by name: `module:function` of the user, and the options of losses, optimizers and data sources.

Options are a function's keyword-only parameters: annotations are their types, defaults their defaults, and the
docstring is their help text.
"""

import contextlib
import dis
import functools
import hashlib
import importlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import docstring_parser

from dpo_jax.errors import UserError, closest, similar

TYPES = (bool, int, float, str)
AXES = ("score", "ranking", "link", "target")  # keys of the loss `axes`, which needs no name
INSTALLED = (*(sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib")), str(Path(__file__).parent))


class Option(NamedTuple):
    """One option, as its parameter declares it."""

    name: str
    kind: Any  # bool, int, float, str or a Literal of texts
    default: Any
    help: str


def with_axes(term: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a term of a loss; one with an axis and no name is the loss `axes`."""
    return {"name": "axes", **term} if "name" not in term and any(key in term for key in AXES) else dict(term)


def options_of(*functions: Callable) -> list[Option]:
    """Returns the options of functions, in order.

    Raises:
      UserError: an option without a default, or of a type that a config cannot express.
    """
    found = []
    for function in functions:
        documented = docstring_parser.parse(function.__doc__ or "").params
        texts = {p.arg_name: " ".join((p.description or "").split()) for p in documented}
        for p in _signature(function).parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                found.append(_option(function.__name__, p, texts.get(p.name, "")))
    return found


def _signature(function: Callable) -> inspect.Signature:
    """Returns a signature whose annotations are types, also under `from __future__ import annotations`."""
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, SyntaxError) as e:
        raise UserError(f"{function.__name__}: an annotation names no type ({e}); correct it") from e


def _option(function: str, parameter: inspect.Parameter, text: str) -> Option:
    name, kind, default = parameter.name, parameter.annotation, parameter.default
    if default is parameter.empty:
        raise UserError(f"{function}: give its option {name!r} a default")
    if kind is parameter.empty and type(default) in TYPES:
        kind = type(default)
    if kind not in TYPES and get_origin(kind) is not Literal:
        raise UserError(f"{function}: option {name!r} must be a bool, int, float, str or Literal[...]; annotate it so")
    return Option(name, kind, default, text)


def with_defaults(where: str, known: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a value for every option: the given one, converted to its type, or the default.

    Args:
      where: prefix of the keys in error messages, such as `loss.`.
      known: the options.
      given: values, or their texts as a command line has them.

    Raises:
      UserError: an unknown option, or a value of another type.
    """
    names = [option.name for option in known]
    for key in given:
        if key not in names:
            raise UserError(f"unknown key {where + key!r}; {closest(where + key, [where + n for n in names])}")
    return {o.name: _converted(where, o, given[o.name]) if o.name in given else o.default for o in known}


def _converted(where: str, option: Option, value: Any) -> Any:
    if get_origin(option.kind) is Literal:
        texts = get_args(option.kind)
        if value not in texts:
            raise UserError(f"{where}{option.name}: {value!r} is not one of {', '.join(texts)}{similar(value, texts)}")
        return value
    if option.kind is bool:
        if str(value) not in ("True", "False", "true", "false"):
            raise UserError(f"{where}{option.name}: {value!r} is not True or False")
        return str(value) in ("True", "true")
    if isinstance(value, str if option.kind is str else bool | str | int | float):
        try:
            return option.kind(str(value) if not isinstance(value, option.kind) else value)
        except ValueError:
            pass
    elif option.kind is not str and not isinstance(value, list | dict | tuple):
        return value  # a traced number
    raise UserError(f"{where}{option.name}: {value!r} is not of type {option.kind.__name__}")


def import_function(name: str, where: str) -> Callable[..., Any]:
    """Imports (and so runs) the module of `module:function`, and returns the function.

    The working directory is searched first, as `python -m` does.

    Args:
      name: the function, such as `my_losses:scaled_dpo`.
      where: the key that names it, for error messages.

    Raises:
      UserError: the module cannot be imported or fails while it is, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    main = sys.modules["__main__"]
    if module_name == "__main__" and callable(getattr(main, attribute, None)):
        return getattr(main, attribute)
    if module_name == "__main__":
        raise UserError(
            f"{where}: {name!r} was defined in a script or notebook; define it again, or move it to a module and name "
            "module:function"
        )
    try:
        with _working_directory_first():
            module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError) as e:  # ValueError: an empty module name
        absent = getattr(e, "name", None) or module_name
        if not f"{module_name}.".startswith(f"{absent}."):
            raise UserError(f"{where}: {module_name} imports {absent!r}, which is not installed; install it") from e
        raise UserError(
            f"{where}: cannot import {module_name!r} of {name!r} ({e}); run in the folder of {module_name}.py or set "
            "PYTHONPATH"
        ) from e
    except Exception as e:  # whatever the user's module raises
        raise UserError(f"{where}: {module_name} fails when imported ({type(e).__name__}: {e}); correct it") from e
    function = getattr(module, attribute, None)
    if function is None:
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"{where}: {module_name} has no {attribute!r}; {closest(attribute, known)}")
    if not callable(function):
        raise UserError(f"{where}: {name!r} is a {type(function).__name__}; name a function")
    return function


def name_of(function: Callable[..., Any]) -> str:
    """Returns `module:function` for a function; for a `functools.partial` that of its function, else of the type."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def own_name(function: Callable[..., Any], key: str) -> str:
    """Returns `module:function`, by which a config names a function so that another process finds it.

    Raises:
      UserError: a callable without a name of its own.
    """
    if not hasattr(function, "__qualname__"):
        raise UserError(f"{key}: a {type(function).__name__} has no name for the config; give a function that calls it")
    return name_of(function)


def fingerprint(value: Any) -> str:
    """Returns a hash of what a function computes, so that a resumed run notices another one of the same name.

    It covers the function's bytecode, defaults and closure, and the functions of the user's modules that it calls. Of a
    function in an installed package it covers the name and closure. A wrapper such as `jax.jit` has the hash of the
    wrapped function, an object that of its type and fields. An optax transformation is a tuple of such functions.
    """
    seen: list[Any] = []
    return hashlib.blake2b("\n".join(_parts(value, seen)).encode(), digest_size=8).hexdigest()


def _parts(value: Any, seen: list[Any], within: tuple[Any, ...] = ()) -> Iterator[str]:
    """Yields what `fingerprint` covers; `seen` holds objects before this one, `within` the containers around it."""
    if isinstance(value, str | int | float | bool | type(None)):
        yield repr(value)
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen, within)
    elif isinstance(value, Mapping | tuple | list | set | frozenset):
        parts = tuple(value.items()) if isinstance(value, Mapping) else value
        parts = sorted(parts, key=repr) if isinstance(parts, set | frozenset) else parts
        for part in parts if not any(value is one for one in within) else ():
            yield from _parts(part, seen, (*within, value))
    elif hasattr(value, "tobytes"):  # an array
        yield value.tobytes().hex()
    elif not any(value is one for one in seen):
        seen.append(value)
        yield from _object_parts(value, seen)


def _object_parts(value: Any, seen: list[Any]) -> Iterator[str]:
    """Yields what `fingerprint` covers of a function or another object."""
    if inspect.isfunction(value):
        yield name_of(value)
        yield from _parts((value.__defaults__, value.__kwdefaults__), seen)
        yield from _parts(tuple(inspect.getclosurevars(value).nonlocals.values()), seen)
        if not _is_installed(value.__code__.co_filename):
            yield from _code(value.__code__)
            yield from _parts(tuple(_globals(value)), seen)
    elif inspect.ismethod(value):
        yield from _parts((value.__func__, value.__self__), seen)
    elif hasattr(value, "__wrapped__"):  # of jax.jit or jax.custom_jvp
        yield from _parts(value.__wrapped__, seen)
    else:
        kind = value if inspect.isclass(value) else type(value)
        yield f"{kind.__module__}.{kind.__qualname__}"
        own = [base for base in kind.__mro__ if _is_users(base)]
        yield from _parts([part for base in own for part in _methods(base)], seen)
        yield from _parts(_fields(value, own) if kind is not value else {}, seen)


def _methods(kind: type) -> Iterator[Callable[..., Any]]:
    """Yields the functions of a class: methods, those of the class or static, and those behind properties."""
    for part in vars(kind).values():
        found = (part.fget, part.fset) if isinstance(part, property) else (getattr(part, "__func__", part),)
        yield from filter(inspect.isfunction, found)


def _fields(value: Any, own: Sequence[type]) -> dict[str, Any]:
    """Returns the fields of an object of a user's class, with those in `__slots__`."""
    slots = [name for base in own for name in vars(base).get("__slots__", ()) if hasattr(value, name)]
    return (getattr(value, "__dict__", {}) if own else {}) | {name: getattr(value, name) for name in slots}


def _code(code: types.CodeType) -> Iterator[str]:
    """Yields the instructions and constants of compiled code: the file may have changed since it was imported."""
    yield code.co_code.hex()
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields the code of a function and of those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _globals(function: Callable[..., Any]) -> Iterator[Any]:
    """Yields the globals that a function reads, and the attributes that it reads of the user's modules."""
    codes = list(_codes(function.__code__))
    read = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = sorted({name for code in codes for name in code.co_names})
    for value in (function.__globals__[name] for name in sorted(read) if name in function.__globals__):
        if not inspect.ismodule(value):
            yield value
        elif not _is_installed(getattr(value, "__file__", None) or ""):
            yield from (vars(value)[name] for name in names if name in vars(value))


def _is_users(kind: type) -> bool:
    """Returns whether a class is defined in a notebook, a script or a module of the user."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return kind.__module__ == "__main__" or not _is_installed(file)


def _is_installed(file: str) -> bool:
    """Returns whether a file belongs to an installed package or to Python; "" does."""
    return not file or any(Path(file).is_relative_to(folder) for folder in INSTALLED)


@contextlib.contextmanager
def _working_directory_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
