"""Output of the pages: HTML from the templates, and records as JSON values."""

import functools
import math
from typing import Any

import jinja2


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("dpo_jax.pages", "templates")
    strict = jinja2.StrictUndefined
    return jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)


def render_page(template: str, **values: Any) -> str:
    """Returns a page as HTML: a single file without scripts or links, every value escaped but the SVG of figures.

    Args:
      template: name of a file in `templates/`.
      values: variables of the template; it is an error to leave one out.
    """
    return _environment().get_template(template).render(values)


def json_values(value: Any) -> Any:
    """Returns a value as JSON has it: records become dicts, NaN and infinities null, also within."""
    if hasattr(value, "_asdict"):
        return {key: json_values(field) for key, field in value._asdict().items()}
    if isinstance(value, tuple):
        return [json_values(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
