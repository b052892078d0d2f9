"""The help of a command: its own options first, then the keys of a run's config by section. Imports no JAX."""

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from dpo_jax.config.choices import choice_names, choice_options
from dpo_jax.config.parse import SECTIONS, named_options
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import arguments, flatten, read_yaml
from dpo_jax.errors import printable
from dpo_jax.named import Option, import_function, options_of

NARROWEST, WIDEST = 40, 100  # columns of a text
ORDER = ("model", "data", "loss", "optim", "reference", "lora", "samples", "mesh")  # of sections; others stand before
KINDS: dict[Any, str] = {bool: "True|False", int: "INT", float: "FLOAT", str: "TEXT"}


class OptionLine(NamedTuple):
    """An option in the help: its syntax and its meaning."""

    usage: str
    text: str


class OptionGroup(NamedTuple):
    """Options below a title."""

    title: str
    lines: list[OptionLine]


def own_options(kind: type) -> list[OptionGroup]:
    """Returns a command's options beside the keys of a run's config, and the short names of such keys."""
    of_run = {f.name for f in dataclasses.fields(Config)}
    short: Mapping[str, str] = getattr(kind, "SHORT", {})
    renamed = {key: name for name, key in short.items() if "." not in key}
    fields = [f for f in dataclasses.fields(kind) if f.name not in of_run or not issubclass(kind, Config)]
    plain = [f.name for f in fields if not (_is_section(f) or f.name in SECTIONS)]
    named = {renamed.get(name, name): name for name in plain}
    groups = [OptionGroup("", [_short_line(kind, *pair) for pair in {**named, **short}.items()])]
    for f in fields:
        if _is_section(f) and f.name not in of_run:
            groups += _section_groups(f.name, f.type)
    return groups


def config_options(kind: type, file: str | None, argv: Sequence[str]) -> list[OptionGroup]:
    """Returns the options of a command that are keys of a run's config, by section.

    The options of a loss and an optimizer are those of the ones that a YAML or the arguments name.

    Raises:
      UserError: no loss or optimizer of that name.
    """
    given = [(key, texts[0].split(",")[:1] if texts else texts) for key, texts in arguments(argv)]
    chosen = dict([*(flatten(read_yaml(file)) if file else []), *given])  # of several names, as a sweep has, the first
    of_run = {f.name: f for f in dataclasses.fields(Config)}
    fields = {f.name: f for f in dataclasses.fields(kind)}
    groups = []
    for name in (n for n in ORDER if n in fields):
        if name in SECTIONS:
            groups += _choice_groups(name, fields[name], chosen)
        else:
            groups += _section_groups(name, fields[name].type)
        if name == "data":
            groups += _source_options(chosen)
    run = [f for f in fields.values() if f.name in of_run and not (_is_section(f) or f.name in SECTIONS)]
    if issubclass(kind, Config):
        groups.append(OptionGroup("Of the run:", [_field_line(kind, f) for f in run]))
    return groups


def rendered(groups: Sequence[OptionGroup]) -> str:
    """Returns options as lines that fit the terminal; no value of an option is broken."""
    lines = []
    for title, options in groups:
        if title:
            lines += ["", *wrapped(title)]
        for option in options:
            lines += wrapped(option.usage, "  ", "      ") + wrapped(option.text, "      ", "      ")
    return "\n".join(lines)


def wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    """Returns a text as lines of at most the terminal's width, broken at spaces only."""
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns))
    return textwrap.wrap(
        printable(text), width, initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _is_section(f: dataclasses.Field) -> bool:
    return isinstance(f.type, type) and dataclasses.is_dataclass(f.type)


def _section_groups(key: str, kind: Any) -> list[OptionGroup]:
    """Returns the options of a section, and those of the sections within it."""
    fields = dataclasses.fields(kind)
    lines = [_field_line(kind, f, f"{key}.") for f in fields if not _is_section(f)]
    inner = [group for f in fields if _is_section(f) for group in _section_groups(f"{key}.{f.name}", f.type)]
    return [OptionGroup(f"{key}: {' '.join((kind.__doc__ or '').split())}", lines), *inner]


def _choice_groups(section: str, f: dataclasses.Field, chosen: Mapping[str, list[str]]) -> Iterator[OptionGroup]:
    """Yields the options of the loss or the optimizer, or of each loss of a list, that is chosen."""
    default = f.default_factory()["name"]  # type: ignore[misc]
    keys = [key for key in chosen if key.startswith(f"{section}.") and key.endswith("name")] or [f"{section}.name"]
    for key in keys:
        name, prefix = chosen.get(key, [default])[0], key.removesuffix("name")
        names = f"One of {', '.join(choice_names(section))}; or module:function."
        lines = [OptionLine(f"--{key} NAME (default {default})", names)] if key == keys[0] else []
        title, options = choice_options(section, name) or named_options(section, name, key)
        lines += [_option_line(prefix, option) for option in options]
        yield OptionGroup(f"{section}: options of {name}: {title}", lines)


def _source_options(chosen: Mapping[str, list[str]]) -> list[OptionGroup]:
    """Returns the options of a data source of the user, if one is named."""
    name = chosen.get("data.name", [""])[0]
    if ":" not in name:
        return []
    options = options_of(import_function(name, "data.name"))
    lines = [OptionLine(f"--data.options {o.name}={o.default}", o.help) for o in options]
    return [OptionGroup(f"data.options: options of {name}.", lines)]


def _option_line(prefix: str, option: Option) -> OptionLine:
    return _line(prefix + option.name, option.kind, option.default, option.help)


def _short_line(kind: type, name: str, key: str) -> OptionLine:
    """Returns the line of a key, under the name that is short for it."""
    for part in key.split(".")[:-1]:
        kind = next(f.type for f in dataclasses.fields(kind) if f.name == part)  # type: ignore[assignment]
    f = next(f for f in dataclasses.fields(kind) if f.name == key.rpartition(".")[2])
    line = _field_line(kind, f)
    same = f" Short for --{key}." if "." in key else ""
    return OptionLine(line.usage.replace(f"--{f.name}", f"--{name}", 1), line.text + same)


def _field_line(kind: type, f: dataclasses.Field, prefix: str = "") -> OptionLine:
    return _line(prefix + f.name, f.type, f.default, _field_texts(kind)[f.name])


def _line(key: str, kind: Any, default: Any, text: str) -> OptionLine:
    """Returns an option with its type, its default, and its values if they are a fixed set."""
    values = [value for part in (kind, *get_args(kind)) for value in get_args(part) if get_origin(part) is Literal]
    if values:
        named = ", ".join(value for value in values if value)
        text = f"{text} One of {named}{', or empty' if '' in values else ''}."
    if default is dataclasses.MISSING:
        shown = " (required)"
    else:
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if default == "" else f" (default {default})"
    flag = kind in (bool, bool | None)
    return OptionLine(f"--{key} {'[True|False]' if flag else _kind_name(kind)}{shown}", text)


def _kind_name(kind: Any) -> str:
    """Returns how the values of a type are written: INT, TEXT ..., NAME."""
    if get_origin(kind) is Literal:
        return "NAME"
    if get_origin(kind) is tuple:
        return f"{_kind_name(get_args(kind)[0])} ..."
    if get_origin(kind) is UnionType or isinstance(kind, UnionType):
        return "|".join(_kind_name(part) for part in get_args(kind) if part is not NoneType)
    return KINDS[kind]


@functools.cache
def _field_texts(kind: type) -> dict[str, str]:
    """Returns the docstring below each field of a dataclass, and of those that it extends."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        tree = _module_tree(inspect.getfile(base))
        (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == base.__name__)
        for before, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                texts[ast.unparse(before.target)] = " ".join(ast.literal_eval(after.value).split())
    return texts


@functools.cache
def _module_tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))
