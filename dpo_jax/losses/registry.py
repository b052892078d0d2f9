"""Where losses are filed under their own names, with what they need."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_jax.records import Array


class Entry(NamedTuple):
    """A registered loss.

    Attributes:
      function: `(Logps, *, hyper-parameters) -> float32[B]`.
      responses: the P that it needs; None for any P from 2 on.
      uses_reference: whether it reads `Logps.reference`.
      whole_batch: whether a comparison's value depends on others, so that it must see a step's comparisons at once.
      statistic: `(Logps, *, the same hyper-parameters) -> float32[]`, what `Logps.running` becomes after a step, for a
        loss that carries a number from step to step; it starts at 0.
      soft_labels: whether a pair may be mostly, not surely, won by its first response.
      divergences: whether other f-divergences than the reverse KL make sense in it.
      unpaired: whether a response of a pair may be absent.
      mismatched: whether it needs a last response that was written for another prompt.
      scores: whether it needs ratings of the responses, the first's above the last's.
      rewards: whether `Logps.policy` must be the rewards of a reward model.
    """

    function: Callable[..., Array]
    responses: int | None
    uses_reference: bool
    whole_batch: bool = False
    statistic: Callable[..., Array] | None = None
    soft_labels: bool = False
    divergences: bool = False
    unpaired: bool = False
    mismatched: bool = False
    scores: bool = False
    rewards: bool = False


REGISTRY: dict[str, Entry] = {}


def register(*, responses: int | None, uses_reference: bool, **needs: Any) -> Callable[[Callable], Callable]:
    """Returns a decorator that files a loss under its function's name, with the other fields of its `Entry`; a name
    given twice is an error."""

    def file(function: Callable) -> Callable:
        name = function.__name__
        if name in REGISTRY:
            raise ValueError(f"loss {name!r} is registered twice")
        REGISTRY[name] = Entry(function, responses, uses_reference, **needs)
        return function

    return file
