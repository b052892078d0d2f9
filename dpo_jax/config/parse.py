"""One YAML is one experiment: frozen dataclasses, strict, with dotted overrides from the command line.

The YAML is flattened to arguments that stand before those of the command line, so that one parser reads both and both
get the same errors. Losses and optimizers are chosen by name; their options are the keyword-only parameters of the
function of that name, built-in or `module:function`. Such a section may be a list with elements counted from 0:
`loss: [{name: dpo}, {name: sft}]` is `--loss.0.name dpo --loss.1.name sft`.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro

from dpo_jax.config.elsewhere import key_hint
from dpo_jax.config.yaml import KeyTexts, arguments, flatten, read_yaml
from dpo_jax.errors import UserError, similar
from dpo_jax.named import AXES, Option, options_of

T = TypeVar("T")
LARGEST = 2**31  # of whole numbers
SECTIONS = {"loss": "the loss", "optim": "the optimizer"}  # whose options depend on a name


def _functions(section: str, name: str, key: str) -> Sequence[Callable]:
    """Returns the functions whose options a named loss or optimizer has; imports JAX, as they do."""
    from dpo_jax import losses, optim

    return losses.option_functions(name, key) if section == "loss" else optim.optimizer_options(name, key)


def named_options(section: str, name: str, key: str) -> tuple[str, list[Option]]:
    """Returns the first line about a loss or an optimizer, and its options; imports it, and JAX."""
    functions = _functions(section, name, key)
    title = (functions[0 if section == "loss" else -1].__doc__ or "").partition("\n")[0]
    return title, options_of(*functions)


def _options(section: str, name: str, key: str) -> type:
    """Returns a dataclass of `name` and its options."""
    fields: list[Any] = [("name", str, field(default=name))]
    for option in named_options(section, name, key)[1]:
        fields.append((option.name, option.kind, field(default=option.default)))
    return dataclasses.make_dataclass(section.capitalize(), fields, frozen=True)


def _chosen(pairs: KeyTexts, section: str, default: str) -> dict[str, str]:
    """Returns the name that is chosen in a section, as {"": name}, or in each element of a list, {"0": name, ...}."""
    inner = {key.split(".")[1] for key, _ in pairs if key.startswith(f"{section}.")}
    elements = sorted(element for element in inner if element.isdecimal())
    names = {key: texts[0] for key, texts in pairs if texts}
    if not elements:
        return {"": names.get(f"{section}.name", default)}
    for expected, element in enumerate(sorted(elements, key=int)):
        if int(element) != expected or f"{section}.{element}.name" not in names:
            raise UserError(f"{section}.{element}: give {section}.{expected}.name; elements of a list count from 0")
    return {element: names[f"{section}.{element}.name"] for element in sorted(elements, key=int)}


def _with_sections(base: type, pairs: KeyTexts) -> type:
    """Returns `base` with each section that is chosen by name replaced by the options of that choice."""
    fields: list[Any] = []
    for f in dataclasses.fields(base):
        if f.name not in SECTIONS:
            fields.append((f.name, f.type, f))
            continue
        assert callable(f.default_factory)
        kinds: dict[str, Any] = {}
        for element, name in _chosen(pairs, f.name, f.default_factory()["name"]).items():
            kinds[element] = _options(f.name, name, ".".join(filter(None, (f.name, element, "name"))))
        kind = kinds[""] if "" in kinds else _listing(f.name, kinds)
        fields.append((f.name, kind, field(default_factory=kind)))
    new = dataclasses.make_dataclass(base.__name__, fields, bases=(base,), frozen=True)
    new.__doc__ = base.__doc__
    return new


def _listing(section: str, kinds: Mapping[str, type]) -> type:
    """Returns a dataclass that stands for a list of dataclasses: its options are called 0, 1, ..."""
    fields: list[Any] = [
        (f"element_{i}", Annotated[kind, tyro.conf.arg(name=i)], field(default_factory=kind, metadata={"name": i}))
        for i, kind in kinds.items()
    ]
    return dataclasses.make_dataclass(section.capitalize(), fields, frozen=True)


def _plain(section: Any) -> Any:
    """Returns a section chosen by name as a dict, or a list of them as a tuple of dicts."""
    values = dataclasses.asdict(section)
    return tuple(values.values()) if "element_0" in values else values


def _keys(kind: type) -> list[str]:
    """Returns the dotted names of all options of a dataclass."""
    return list(option_kinds(kind))


def option_kinds(kind: type, prefix: str = "") -> dict[str, Any]:
    """Returns the type of each option of a dataclass, by dotted name."""
    kinds: dict[str, Any] = {}
    for f in dataclasses.fields(kind):
        name = prefix + f.metadata.get("name", f.name)
        inner = get_args(f.type)[0] if get_origin(f.type) is Annotated else f.type
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            kinds |= option_kinds(inner, f"{name}.")
        else:
            kinds[name] = inner
    return kinds


def _first_sentence(box: str) -> str:
    """Returns the message inside the parser's box as one line."""
    lines = [line.strip(" │") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if set(line) & set("-─") and not set(line) - set("-─╭╮╰╯├┤ ")]
    body = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    return " ".join(" ".join(body).split())


def _parse(kind: type[T], pairs: KeyTexts, where: str, prog: str) -> T:
    """Returns a dataclass from (key, texts) pairs, with every error one line that names its origin."""
    kinds = option_kinds(kind)
    for key, texts in pairs:
        if key not in kinds:
            raise UserError(f"{where}unknown key {key!r}; {key_hint(key, list(kinds), texts)}")
    args = []
    for key, texts in pairs:
        values = _flag(where + key, texts) if kinds[key] in (bool, bool | None) else texts
        single = len(values) == 1 and values[0].startswith("-")  # else taken for an option
        args += [f"--{key}={values[0]}"] if single else [f"--{key}", *values]
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return _cli(kind, args, prog)
    except SystemExit as e:
        raise UserError(f"{where}{_with_choice(_first_sentence(box.getvalue()))}") from e


def _with_choice(message: str) -> str:
    """Returns the parser's message; if it refuses a choice, with the most similar of the allowed ones."""
    found = re.fullmatch(r"invalid choice '(.*)' for argument .* Expected one of \((.*)\)\.", message)
    return message + (similar(found[1], re.findall(r"'([^']*)'", found[2])) if found else "")


def _flag(key: str, texts: Sequence[str]) -> list[str]:
    """Returns the value of a flag, which may stand alone."""
    values = [text.capitalize() for text in texts or ["True"]]
    if len(values) > 1 or values[0] not in ("True", "False", "None"):
        raise UserError(f"{key}: {' '.join(texts)!r} is not True or False; a flag may stand alone")
    return values


def _cli(kind: type[T], args: Sequence[str], prog: str) -> T:
    # To look for help texts in comments, tyro would parse the source at every call.
    config = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff)
    return tyro.cli(kind, args=args, prog=prog, config=config, use_underscores=True)


def parse_config(
    kind: type[T],
    source: str | Mapping[str, Any] | None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    prog: str = "dpo-jax",
) -> T:
    """Returns an instance of a dataclass from a YAML file or nested values, if any, and overrides.

    Args:
      kind: a dataclass, such as `Config`.
      source: a YAML file, nested values as in one, or None.
      overrides: `--key.path value` arguments, or nested values; they win over the source.
      prog: the command, for messages.

    Raises:
      UserError: an unknown key or name, a value of another type, a missing value.
    """
    written = flatten(read_yaml(source) if isinstance(source, str) else source or {})
    given = flatten(overrides) if isinstance(overrides, Mapping) else arguments(overrides)
    given = [(_long_name(kind, key, texts), texts) for key, texts in given]
    written = _named_axes(written, written)
    given = _named_axes(given, [*written, *given])
    where = f"{source}: " if isinstance(source, str) else ""
    if written or not given:
        parsed = _parse(_with_sections(kind, written), written, where, prog)
    if given:
        written = _as_lists(written, given)
        full = _with_sections(kind, [*written, *given])
        parsed = _parse(full, list(_applied(written, given, full).items()), "", prog)
    _check_values(dataclasses.asdict(parsed), "")  # type: ignore[call-overload]
    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: _plain(v) if k in SECTIONS else v for k, v in values.items()})


def _named_axes(pairs: KeyTexts, known: KeyTexts) -> KeyTexts:
    """Returns keys with the name `axes` of each loss of which an axis is given, and no name in `known`."""
    named = {key for key, _ in known}
    found = [re.fullmatch(rf"(loss\.(?:\d+\.)?)(?:{'|'.join(AXES)})", key) for key, _ in pairs]
    wanted = dict.fromkeys(f"{match[1]}name" for match in found if match)
    return [*((key, ["axes"]) for key in wanted if key not in named), *pairs]


def _long_name(kind: type, key: str, texts: Sequence[str]) -> str:
    """Returns the key that a short name stands for. That of a section is a flag, and takes no value."""
    sections = [f.name for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.type)]
    return key if texts and key in sections else getattr(kind, "SHORT", {}).get(key, key)


def _check_values(value: Any, key: str) -> None:
    """Refuses whole numbers that no array can count, and texts with a character that no file can be named by."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_values(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, tuple | list):
        for part in value:
            _check_values(part, key)
    elif isinstance(value, int) and not -LARGEST <= value < LARGEST:
        raise UserError(f"{key}: {value!r:.30} is beyond {LARGEST:,}; set a smaller number")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}: holds a null byte; remove it")


def _as_lists(written: KeyTexts, given: KeyTexts) -> KeyTexts:
    """Returns the file's keys, with `loss.KEY` as `loss.0.KEY` where the command line counts elements."""
    counted = [s for s in SECTIONS if any(re.match(rf"{s}\.\d", key) for key, _ in given)]
    single = re.compile(rf"({'|'.join(counted)})\.(?!\d)")
    return [(single.sub(r"\1.0.", key) if counted else key, texts) for key, texts in written]


def _applied(written: KeyTexts, given: KeyTexts, kind: type) -> dict[str, list[str]]:
    """Returns the file's keys with those of the command line over them. A key given again replaces the earlier one,
    lists included; where a name has changed, options of the file that the new choice does not have are dropped."""
    last, known = dict([*written, *given]), _keys(kind)
    named = {key for key, texts in written if key.endswith(".name") and last[key] != texts}
    sections = {key.removesuffix("name") for key in named if key.split(".")[0] in SECTIONS}
    stale = {k for k, _ in written if k not in dict(given) and k not in known and k.startswith(tuple(sections))}
    return {k: v for k, v in last.items() if k not in stale}
