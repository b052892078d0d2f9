"""A chat template, the tokenizer's own or another one, and its arguments."""

import datetime
import json
from typing import Any, NamedTuple

import yaml

from dpo_jax.errors import UserError
from dpo_jax.records import Chat

PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError)  # of a template's expressions, and of PyYAML's


class Template(NamedTuple):
    """A chat template and its arguments.

    Attributes:
      source: the Jinja template; "" for the tokenizer's own.
      options: (name, value) of arguments for every conversation; those of a conversation itself override them.
    """

    source: str = ""
    options: tuple[tuple[str, Any], ...] = ()


def chat_template(source: str, options: tuple[str, ...]) -> Template:
    """Returns the template of a file's contents and of arguments written `name=value`, values in YAML.

    Raises:
      UserError: an argument is not `name=value`, or its value is not YAML.
    """
    pairs = [option.partition("=") for option in options]
    if bad := [option for option, pair in zip(options, pairs, strict=True) if not pair[1]]:
        raise UserError(f"data.chat_template_kwargs: {bad[0]!r} is not name=value")
    try:
        chosen = tuple((name.strip(), yaml.safe_load(value)) for name, _, value in pairs)
    except (yaml.YAMLError, *PYTHON_ERRORS) as error:
        raise UserError(f"data.chat_template_kwargs: not YAML: {' '.join(str(error).split())}") from error
    return Template(source, tuple((name, _as_json(name, value)) for name, value in chosen))


def _as_json(name: str, value: Any) -> Any:
    """Returns a value of YAML as one of JSON, which config.json of a reward model keeps; a date becomes its text."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.chat_template_kwargs: {name}: {error}; give text, numbers or lists of them") from error
    return value


def template_source(tokenizer: Any, template: Template, chat: Chat) -> str:
    """Returns the Jinja template of a conversation; "" if there is none.

    Of named templates it is "tool_use" for a conversation with tools, else "default".
    """
    source = template.source or tokenizer.chat_template or ""
    if isinstance(source, str):
        return source
    return source.get("tool_use" if chat.tools and "tool_use" in source else "default", "")
