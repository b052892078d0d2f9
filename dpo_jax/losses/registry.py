"""Where losses are filed under their own names."""

from collections.abc import Callable
from typing import NamedTuple


class Entry(NamedTuple):
    """A registered loss: the function, the P it needs, and whether it reads `Logps.reference`."""

    function: Callable
    responses: int
    uses_reference: bool


REGISTRY: dict[str, Entry] = {}


def register(*, responses: int, uses_reference: bool) -> Callable[[Callable], Callable]:
    """Returns a decorator that files a loss under its function's name; a name given twice is an error."""

    def file(function: Callable) -> Callable:
        name = function.__name__
        if name in REGISTRY:
            raise ValueError(f"loss {name!r} is registered twice")
        REGISTRY[name] = Entry(function, responses, uses_reference)
        return function

    return file
