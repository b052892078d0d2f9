"""Functions chosen by name: their options, and the user's own by `module:function`."""

import dataclasses
import functools
import importlib
import inspect
import linecache
import sys
from pathlib import Path
from typing import Literal

import docstring_parser
import jax
import numpy as np
import optax
import pytest

from dpo_jax import losses, optim
from dpo_jax.errors import UserError
from dpo_jax.losses import objective
from dpo_jax.named import (
    Option,
    _is_installed,
    fingerprint,
    import_function,
    name_of,
    options_of,
    own_name,
    with_defaults,
)

FUNCTIONS = {name: (entry.function, *objective.OPTIONS) for name, entry in losses.REGISTRY.items()}
FUNCTIONS |= {name: (function,) for name, function in optim.OPTIMIZERS.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_the_keyword_only_parameters_and_each_is_documented(name):
    parameters, documented = [], {}
    for function in FUNCTIONS[name]:
        parameters += [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        documented |= {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__).params}
    found = options_of(*FUNCTIONS[name])
    assert [(o.name, o.kind, o.default) for o in found] == [(p.name, p.annotation, p.default) for p in parameters]
    assert [o.help for o in found] == [" ".join(documented[p.name].split()) for p in parameters]
    assert all(option.help for option in found)


def no_default(x, *, a: float): ...
def a_list(x, *, a: list[int] = []): ...  # noqa: B006
def optional(x, *, a: float | None = None): ...
def unknown_type(x, *, a: "nothing" = None): ...  # noqa: F821  # pyright: ignore


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (no_default, "no_default: give its option 'a' a default"),
        (a_list, r"a_list: option 'a' must be a bool, int, float, str or Literal\[...\]"),
        (optional, r"optional: option 'a' must be a bool, int, float, str or Literal\[...\]"),
        (unknown_type, r"unknown_type: an annotation names no type \(name 'nothing' is not defined\)"),
    ],
)
def test_options_that_a_config_cannot_express_are_refused(function, why):
    with pytest.raises(UserError, match=why):
        options_of(function)


def test_annotations_may_be_texts():
    """As under `from __future__ import annotations`."""

    def later(x, *, a: "float" = 0.5, how: "Literal['x', 'y']" = "x"): ...

    assert [o.kind for o in options_of(later)] == [float, Literal["x", "y"]]


def own(x, *, a: float = 0.5, n=2, on: bool = False, how: Literal["mean", "sum"] = "sum"):
    """Own.

    Args:
      x: input.
      a: How much.
    """


def test_options_without_annotations_have_the_type_of_their_default():
    assert options_of(own)[:2] == [Option("a", float, 0.5, "How much."), Option("n", int, 2, "")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"a": 0.5, "n": 2, "on": False, "how": "sum"}),
        ({"a": "5e-7", "n": "3", "on": "True"}, {"a": 5e-7, "n": 3, "on": True, "how": "sum"}),
        ({"a": 1, "how": "mean"}, {"a": 1.0, "n": 2, "on": False, "how": "mean"}),
    ],
)
def test_values_and_texts_are_converted_to_the_type_of_their_option(given, expected):
    found = with_defaults("data.options.", options_of(own), given)
    assert found == expected
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"b": 1}, r"unknown key 'o.b'"),
        ({"hoow": "sum"}, r"unknown key 'o.hoow'; did you mean 'o.how'\?"),
        ({"a": "x"}, r"o.a: 'x' is not of type float"),
        ({"n": "1.5"}, r"o.n: '1.5' is not of type int"),
        ({"on": "yes"}, r"o.on: 'yes' is not True or False"),
        ({"how": "max"}, r"o.how: 'max' is not one of mean, sum"),
        ({"a": [1]}, r"o.a: \[1\] is not of type float"),
    ],
)
def test_wrong_values_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        with_defaults("o.", options_of(own), given)


@pytest.mark.parametrize("value", [3, 0.5, True])
def test_a_number_is_no_text(value):
    with pytest.raises(UserError, match=f"o.s: {value} is not of type str"):
        with_defaults("o.", [Option("s", str, "", "")], {"s": value})


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory, which is on no path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_functions.py").write_text("def double(x): return 2 * x\nDOUBLED = 4\n")
    (tmp_path / "own_imports.py").write_text("import a_package_that_is_absent\n")
    (tmp_path / "own_fails.py").write_text("half = 1 / 0\n")
    yield tmp_path
    sys.modules.pop("own_functions", None)


def test_a_function_is_imported_from_the_working_directory(module):
    path = list(sys.path)
    assert import_function("own_functions:double", "loss.name")(2) == 4
    assert sys.path == path
    assert name_of(import_function("own_functions:double", "loss.name")) == "own_functions:double"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:f", r"loss.name: cannot import 'absent_module' of 'absent_module:f'"),
        ("own_functions:doubel", r"loss.name: own_functions has no 'doubel'; did you mean 'double'\?"),
        ("own_functions:DOUBLED", r"loss.name: 'own_functions:DOUBLED' is a int; name a function"),
        (":f", r"loss.name: cannot import ''"),
        ("__main__:f", r"loss.name: '__main__:f' was defined in a script or notebook"),
        ("own_imports:f", r"own_imports imports 'a_package_that_is_absent', which is not installed; install it"),
        ("own_fails:f", r"own_fails fails when imported \(ZeroDivisionError: division by zero\); correct it"),
    ],
)
def test_names_that_lead_to_no_function_are_one_line(module, name, message):
    with pytest.raises(UserError, match=message):
        import_function(name, "loss.name")


def made(factor, values=()):
    def inner(x):
        return factor * x + np.sum(values)

    return inner


def test_a_fingerprint_tells_functions_apart_by_what_they_compute(module):
    """By source, defaults, closure, arrays in it, and other functions of the module that they call."""
    twice, thrice, other = made(2.0), made(3.0), made(2.0, np.ones(3))
    assert len({fingerprint(f) for f in (twice, thrice, other, made, own)}) == 5
    assert fingerprint(made(2.0)) == fingerprint(twice)
    assert fingerprint(made(2.0, np.ones(3))) == fingerprint(other) != fingerprint(made(2.0, np.zeros(3)))
    found = []
    for body in ("2 * x", "3 * x", "2 * x"):
        (module / "own_functions.py").write_text(f"def part(x): return {body}\ndef double(x): return part(x)\n")
        sys.modules.pop("own_functions", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        found.append(fingerprint(import_function("own_functions:double", "loss.name")))
    assert found[0] == found[2] != found[1]


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


class Parts:
    """Behind a property, in slots, of the class, static, in a set, and in a list that holds itself."""

    __slots__ = ("factor", "names", "nested")

    def __init__(self, factor):
        self.factor, self.names, self.nested = factor, {"b", "a"}, [factor]
        self.nested.append(self.nested)

    def __call__(self, x):
        return self.factor * x


@pytest.mark.parametrize("kind", ["property", "staticmethod", "classmethod"])
def test_a_fingerprint_covers_every_kind_of_method(kind):
    def made_by(factor):
        scope = {}
        own = "self, " if kind == "property" else "cls, " if kind == "classmethod" else ""
        given = own.removesuffix(", ") if kind == "property" else f"{own}x"
        body = f"class Own:\n  @{kind}\n  def part({given}): return {factor}\n  def __call__(self, x): return self.part"
        exec(body, {"__name__": "__main__"}, scope)
        return fingerprint(scope["Own"]())

    assert made_by(1.0) == made_by(1.0) != made_by(2.0)


def test_a_fingerprint_covers_slots_sets_and_lists_that_hold_themselves():
    found = [fingerprint(Parts(factor)) for factor in (1.0, 9.0, 1.0)]
    assert found[0] == found[2] != found[1]
    assert fingerprint(frozenset("ab")) == fingerprint(frozenset("ba")) != fingerprint(frozenset("ac"))


def test_a_name_of_an_attribute_is_no_global(monkeypatch):
    scopes = [{"mean": value, "__name__": "__main__"} for value in (1, 2)]
    for scope in scopes:
        exec("def f(x): return x.mean()\ndef g(x): return mean", scope)
    assert len({fingerprint(scope["f"]) for scope in scopes}) == 1
    assert len({fingerprint(scope["g"]) for scope in scopes}) == 2


def test_a_folder_beside_the_package_is_the_users():
    import dpo_jax

    package = Path(dpo_jax.__file__).parent
    assert [_is_installed(f"{folder}/own.py") for folder in (package, f"{package}_mine")] == [True, False]


def test_callables_without_a_name_have_that_of_their_function_or_type():
    assert name_of(functools.partial(own, a=1.0)) == name_of(own)
    assert name_of(Scaled(1.0)) == name_of(Scaled)
    assert own_name(own, "loss") == name_of(own)
    with pytest.raises(UserError, match="loss: a Scaled has no name for the config; give a function that calls it"):
        own_name(Scaled(1.0), "loss")


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float


def of_options(options):
    return lambda x: jax.tree.map(lambda y: options.factor * y, x)


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.custom_jvp, lambda f: Scaled(f(1.0)), lambda f: Scaled(f(1.0)).__call__,
     lambda f: of_options(Options(f(1.0))), lambda f: functools.wraps(f)(lambda x: f(x))],
    ids=["jit", "custom_jvp", "object", "method", "dataclass", "wraps"],
)  # fmt: skip
def test_a_fingerprint_sees_through_wrappers_and_into_objects(wrap):
    found = [fingerprint(wrap(made(factor))) for factor in (1.0, 9.0, 1.0)]
    assert found[0] == found[2] != found[1]


def test_a_fingerprint_covers_constants_of_a_console_and_functions_of_a_module(module, monkeypatch):
    monkeypatch.syspath_prepend(str(module))
    scopes = [{} for _ in range(3)]
    for scope, factor in zip(scopes, (1, 9, 1), strict=True):
        (module / "own_helper.py").write_text(f"def scaled(x): return x * {factor}\n")
        sys.modules.pop("own_helper", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        exec("import own_helper\ndef f(x): return (lambda y: own_helper.scaled(y))(x)\ndef g(x): return x * 7", scope)
    found = [fingerprint(scope["f"]) for scope in scopes]
    assert found[0] == found[2] != found[1]
    exec("def g(x): return x * 8", scopes[0])
    assert fingerprint(scopes[0]["g"]) != fingerprint(scopes[1]["g"]) == fingerprint(scopes[2]["g"])


def test_a_fingerprint_is_of_the_function_that_runs_not_of_its_file(module):
    (module / "own_functions.py").write_text("def double(x): return 2 * x\n")
    sys.modules.pop("own_functions", None)
    importlib.invalidate_caches()
    function = import_function("own_functions:double", "loss.name")
    before = fingerprint(function)
    (module / "own_functions.py").write_text("def double(x): return 3 * x\n")
    linecache.clearcache()
    assert fingerprint(function) == before


def test_a_function_of_a_notebook_is_found_once_it_is_defined_again(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "squared", own, raising=False)
    assert import_function("__main__:squared", "loss.name") is own


def test_a_fingerprint_of_an_optax_object_covers_its_hyper_parameters():
    found = [fingerprint(optax.chain(optax.clip(1.0), optax.adamw(rate))) for rate in (1e-3, 1e-3, 2e-3)]
    assert found[0] == found[1] != found[2]
    schedules = [fingerprint(optax.adamw(optax.linear_schedule(0.0, 1.0, steps))) for steps in (10, 10, 11)]
    assert schedules[0] == schedules[1] != schedules[2]
