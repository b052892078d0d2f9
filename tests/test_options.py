"""Options read from the source are those of the functions themselves."""

import ast
import inspect

import docstring_parser
import pytest

from dpo_jax import losses, optim
from dpo_jax.config.variants import first_line, options_of, variants
from dpo_jax.losses import objective

FUNCTIONS = {("loss", name): (entry.function, *objective.OPTIONS) for name, entry in losses.REGISTRY.items()}
FUNCTIONS |= {("optim", name): (function,) for name, function in optim.OPTIMIZERS.items()}


def test_every_variant_is_found_and_nothing_else():
    assert {(section, name) for section, found in variants().items() for name in found} == set(FUNCTIONS)


@pytest.mark.parametrize(("section", "name"), FUNCTIONS)
def test_options_are_the_keyword_only_parameters(section, name):
    read = variants()[section][name]
    for source, function in zip(read, FUNCTIONS[section, name], strict=True):
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        found = options_of(source)
        assert [(o.name, o.kind, o.default) for o in found] == [(p.name, p.annotation, p.default) for p in parameters]
        documented = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__).params}
        assert [o.help for o in found] == [" ".join(documented[p.name].split()) for p in parameters]
        assert first_line(source) == function.__doc__.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def f(x, *, a: float): ...", "f: a has no default"),
        ("def f(x, *, a=1.0): ...", "f: a is none of bool, int, float, str"),
        ("def f(x, *, a: list[int] = []): ...", "f: a is none of bool, int, float, str"),
        ("def f(x, *, a: float | None = None): ...", "f: a is none of bool, int, float, str"),
    ],
)
def test_what_a_config_cannot_read_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        options_of(ast.parse(text).body[0])
