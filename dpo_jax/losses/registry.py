"""Where losses are filed under their own names."""

from collections.abc import Callable
from typing import NamedTuple


class Entry(NamedTuple):
    """A registered loss.

    Attributes:
      function: Logps, *, hyper-parameters -> float32[B].
      responses: the P it needs; None takes any P >= 2.
      uses_reference: whether it reads `Logps.reference`.
      whole_batch: whether a comparison's loss depends on the others of the step (a mean over the batch, a sort), so
        that it must see all of them at once and not a microbatch.
      statistic: for a loss that reads `Logps.running`: Logps, running, step, *, hyper-parameters -> its new value.
    """

    function: Callable
    responses: int | None
    uses_reference: bool
    whole_batch: bool = False
    statistic: Callable | None = None


REGISTRY: dict[str, Entry] = {}


def register(
    *, responses: int | None, uses_reference: bool, whole_batch: bool = False, statistic: Callable | None = None
) -> Callable[[Callable], Callable]:
    """Returns a decorator that files a loss under its function's name; a name given twice is an error."""

    def file(function: Callable) -> Callable:
        name = function.__name__
        if name in REGISTRY:
            raise ValueError(f"loss {name!r} is registered twice")
        REGISTRY[name] = Entry(function, responses, uses_reference, whole_batch, statistic)
        return function

    return file
