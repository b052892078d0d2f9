"""A term of an objective: a loss with its hyper-parameters and options, which are checked when they are bound."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.errors import UserError, similar
from dpo_jax.losses import term_options
from dpo_jax.losses.registry import Entry
from dpo_jax.named import AXES
from dpo_jax.records import Array, Logps

EXAMPLES = 3  # comparisons with which a loss is checked
# Their keyword-only parameters are options of every term.
OPTIONS = (term_options.transformed, term_options.rejected_part, term_options.weighted)


class BoundTerm(NamedTuple):
    """One term of an objective: its loss, its hyper-parameters, and its options of the three functions of `OPTIONS`."""

    name: str
    entry: Entry
    hyper: dict[str, Any]
    transform: dict[str, Any]
    reject: dict[str, Any]
    weigh: dict[str, Any]

    def shown(self, lp: Logps) -> Logps:
        """Returns the log-probs that the loss reads."""
        return term_options.transformed(
            term_options.first_responses(lp, self.entry.responses or lp.policy.shape[1]), **self.transform
        )

    def value(self, lp: Logps) -> Array:
        """Returns the contribution to the objective, float32[B]."""

        def values(lp: Logps) -> Array:
            return self.entry.function(term_options.rejected_part(lp, **self.reject), **self.hyper)

        shown = self.shown(lp)
        value = term_options.soft_label(shown, values) if self.entry.soft_labels else values(shown)
        return term_options.weighted(value, shown, **self.weigh)

    def statistic(self, lp: Logps) -> Array:
        """Returns `Logps.running` for the next step, float32[] or float32[n]."""
        return self.entry.statistic(self.shown(lp), **self.hyper) if self.entry.statistic else lp.running

    def carried(self) -> int:
        """Returns how many numbers its statistic has."""
        return math.prod(abstract_value(self, self.statistic).shape) if self.entry.statistic else 1


def _options(function: Callable) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def bind_term(name: str, entry: Entry, given: Mapping[str, Any]) -> BoundTerm:
    """Returns a loss with its hyper-parameters, and the options of every term."""
    groups = [_options(function) for function in (entry.function, *OPTIONS)]
    known = {key: option for group in groups for key, option in group.items()}
    for key, value in given.items():
        if key not in known:
            hint = f"it is one of the loss axes; {name} has" if key in AXES else "its parameters:"
            raise UserError(f"loss {name}: unknown parameter {key!r}; {hint} {', '.join(known)}")
        texts = get_args(known[key].annotation)
        if texts and value not in texts:
            raise UserError(f"loss {name}: {key} {value!r} is none of {', '.join(texts)}{similar(value, texts)}")
        if isinstance(known[key].default, bool) and not isinstance(value, bool | np.bool_):
            raise UserError(f"loss {name}: {key} {value!r} is neither True nor False")
    hyper, *options = [{key: given.get(key, group[key].default) for key in group} for group in groups]
    entry = entry._replace(**entry.of_options(**hyper)) if entry.of_options else entry
    bound = BoundTerm(name, entry, hyper, *options)
    term_options.check_term(name, entry, bound.transform | bound.reject | bound.weigh)
    if not any(isinstance(value, Tracer) for value in given.values()):  # which were checked before tracing
        _check(bound, [key for key, p in known.items() if p.annotation in (int, float) or type(p.default) is float])
    return bound


def _check(bound: BoundTerm, numbers: Sequence[str]) -> None:
    """Refuses numbers that no loss can use, values that this loss rejects, and results other than float32[B]."""
    given = bound.hyper | bound.transform | bound.reject | bound.weigh
    for key, value in ((key, given[key]) for key in numbers):
        low = 0.0 if key == "beta" else -math.inf
        if not ((isinstance(value, int | float) or hasattr(value, "shape")) and low < value < math.inf):
            raise UserError(f"loss {bound.name}: {key} {value!r} is not a finite number{' above 0' * (key == 'beta')}")
    own = partial(bound.entry.function, **bound.hyper)
    value = abstract_value(bound, lambda lp: own(bound.shown(lp)))
    found = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
    if found != f"float32[{EXAMPLES}]":
        given = f"returns {found} for {EXAMPLES} comparisons"
        raise UserError(f"loss {bound.name}: {given}; return float32[B], one value for each")
    abstract_value(bound, bound.value)
    if not bound.entry.whole_batch and not str(bound.entry.function.__module__).startswith("dpo_jax."):
        _check_separate(bound, own)


def abstract_value(bound: BoundTerm, function: Callable[[Logps], Array]) -> Any:
    """Returns shape and dtype of a function of the log-probs of some comparisons."""
    try:
        return jax.eval_shape(function, term_options.example_logps(EXAMPLES, bound.entry.responses or 2))
    except UserError as e:
        raise UserError(f"loss {bound.name}: {e}") from e


def _check_separate(bound: BoundTerm, own: Callable[[Logps], Array]) -> None:
    """Refuses a user's loss in which one comparison changes the value of another, unless it says so."""
    shapes = term_options.example_logps(EXAMPLES, bound.entry.responses or 2)
    lp = jax.tree.map(lambda x: np.linspace(-9.0, -1.0, math.prod(x.shape)).reshape(x.shape).astype(x.dtype), shapes)
    one = np.ones(EXAMPLES, np.float32)
    lp = lp._replace(lengths=-lp.lengths, rounding=0 * lp.rounding, weights=one, preference=0.3 * one)
    factors = np.arange(1, EXAMPLES + 1, dtype=np.float32)  # 1 for the first comparison, whose value is compared
    other = jax.tree.map(lambda x: (x.T * factors).T.astype(x.dtype) if x.ndim else x, lp)
    other = other._replace(present=lp.present & (factors < EXAMPLES)[:, None])
    with jax.ensure_compile_time_eval():
        values = [np.asarray(own(bound.shown(jax.tree.map(jnp.asarray, one))))[0] for one in (lp, other)]
    if not np.array_equal(*values, equal_nan=True):
        raise UserError(
            f"loss {bound.name}: the value of a comparison depends on the others of its batch; set whole_batch=True "
            "where it is registered, and leave out those whose lp.weights are 0"
        )
