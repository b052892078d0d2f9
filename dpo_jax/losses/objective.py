"""Objectives: one loss or a weighted sum of several, with their hyper-parameters bound."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.errors import UserError
from dpo_jax.losses import metrics as measures
from dpo_jax.losses import term_options
from dpo_jax.losses.registry import Entry, entry_of, find_entry, label
from dpo_jax.named import with_axes
from dpo_jax.records import Array, Logps

Term = Mapping[str, Any]  # the name of a loss and its options
EXAMPLES = 3  # comparisons with which a loss is checked
# Their keyword-only parameters are options of every term.
OPTIONS = (term_options.transformed, term_options.rejected_part, term_options.weighted)


class Loss(NamedTuple):
    """An objective: one loss or a weighted sum of several, with hyper-parameters bound.

    Attributes:
      values: Logps -> float32[B], unreduced.
      metrics: Logps -> name -> float32[B], TRL's names where it has them; NaN for comparisons without a value.
      statistics: Logps -> float32[K], `Logps.running` after a step: the numbers that its terms carry, in their order.
      carried: K; a term without a statistic has one number.
      confidence: whether `Logps.confidence` must be filled in.
      responses and the rest: what the terms need together, as in `registry.Entry`.
    """

    values: Callable[[Logps], Array]
    metrics: Callable[[Logps], dict[str, Array]]
    statistics: Callable[[Logps], Array]
    carried: int
    responses: int | None
    uses_reference: bool
    whole_batch: bool
    confidence: bool
    mismatched: bool
    soft_labels: bool
    unpaired: bool
    scores: bool
    rewards: bool


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
        return math.prod(_abstract(self, self.statistic).shape) if self.entry.statistic else 1


def build(loss: str | Term | Sequence[str | Term]) -> Loss:
    """Returns the objective of a config: "dpo", `{"name": "dpo", "beta": 0.1}`, or a list of such terms, summed.

    A name is a registered loss or `module:function`; a term with an axis and no name is `axes`. Values may be traced.

    Raises:
      UserError: an unknown loss or option, a value without a meaning, or terms that cannot be combined.
    """
    terms = [loss] if isinstance(loss, Mapping | str) else loss
    if not isinstance(terms, list | tuple) or isinstance(terms, Loss):
        raise UserError(f"loss: {loss!r}: give a name, a dict with name and options, or a list of them")
    return _objective([_bind(name, find_entry(name), options) for name, options in map(_split, terms)])


def of(function: Callable[..., Array], **options: Any) -> Loss:
    """Returns the objective of one's own loss, `(Logps, *, option=default, ...) -> float32[B]`.

    Args:
      function: the loss, or a `functools.partial` of it; it must work on traced arrays (jax.numpy, no `if` on values).
        A batch is padded with absent comparisons, whose `weights` are 0; a loss that looks across comparisons needs
        `whole_batch=True` and must leave them out.
      **options: values of its keyword-only parameters, of the options of every term (`weight`, `ld_alpha`, ...), and
        of the fields of `registry.Entry`: `responses=2`, `uses_reference=True`, `whole_batch=False`, ... The defaults
        are those under which the function is registered, if it is.

    Raises:
      UserError: another signature, an unknown option, or a result of another shape than [B].
    """
    if isinstance(function, partial):
        function, options = function.func, {**function.keywords, **options}
    if not callable(function):
        raise UserError(f"losses.of: {function!r} is no function; losses.build takes names")
    needs = {name: options.pop(name) for name in Entry._fields if name in options}
    return _objective([_bind(label(function), entry_of(function)._replace(**needs), options)])


def checked_objective(loss: Any) -> Loss:
    """Returns an objective.

    Raises:
      UserError: a function or a name, which is no objective yet.
    """
    if not isinstance(loss, Loss):
        raise UserError(f"loss: {loss!r} is no objective; give losses.build({{'name': 'dpo'}}) or losses.of(function)")
    return loss


def option_functions(name: str, key: str = "loss.name") -> list[Callable]:
    """Returns the functions whose keyword-only parameters are the options of a named loss."""
    return [find_entry(name, key).function, *OPTIONS]


def _split(term: str | Term) -> tuple[str, dict[str, Any]]:
    if not isinstance(term, str | Mapping):
        raise UserError(f"loss: {term!r}: give a name, or a dict with name and options; losses.of takes a function")
    options = {"name": term} if isinstance(term, str) else with_axes(term)
    if "name" not in options:
        raise UserError(f"loss: {term!r} has no name; give one, as in {{'name': 'dpo'}}")
    return options.pop("name"), options


def _objective(bound: Sequence[BoundTerm]) -> Loss:
    responses = _responses(bound)
    _check_shared_parts(bound)
    entries = [b.entry for b in bound]
    return Loss(
        values=lambda lp: jnp.sum(jnp.stack(_each(bound, lp, BoundTerm.value)), axis=0),
        metrics=partial(_metrics, bound),
        statistics=lambda lp: jax.lax.stop_gradient(
            jnp.concatenate([jnp.ravel(x) for x in _each(bound, lp, BoundTerm.statistic)])
        ),
        carried=sum(b.carried() for b in bound),
        responses=responses,
        uses_reference=any(e.uses_reference for e in entries),
        whole_batch=any(e.whole_batch for e in entries),
        confidence=any(b.weigh["wpo"] for b in bound),
        mismatched=any(e.mismatched for e in entries),
        soft_labels=all(e.soft_labels for e in entries),
        unpaired=all(e.unpaired for e in entries),
        scores=any(e.scores for e in entries),
        rewards=any(e.rewards for e in entries),
    )


def _options(function: Callable) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _bind(name: str, entry: Entry, given: Mapping[str, Any]) -> BoundTerm:
    """Returns a loss with its hyper-parameters, and the options of every term."""
    groups = [_options(function) for function in (entry.function, *OPTIONS)]
    known = {key: option for group in groups for key, option in group.items()}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"loss {name}: unknown parameter {key!r}; its parameters: {', '.join(known)}")
        texts = get_args(known[key].annotation)
        if texts and value not in texts:
            raise UserError(f"loss {name}: {key} {value!r} is none of {', '.join(texts)}")
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
    value = _abstract(bound, lambda lp: own(bound.shown(lp)))
    found = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
    if found != f"float32[{EXAMPLES}]":
        given = f"returns {found} for {EXAMPLES} comparisons"
        raise UserError(f"loss {bound.name}: {given}; return float32[B], one value for each")
    _abstract(bound, bound.value)
    if not bound.entry.whole_batch and not str(bound.entry.function.__module__).startswith("dpo_jax."):
        _check_separate(bound, own)


def _abstract(bound: BoundTerm, function: Callable[[Logps], Array]) -> Any:
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


def _responses(bound: Sequence[BoundTerm]) -> int | None:
    """Returns the number of responses all terms accept; single-response terms read the first one."""
    names = [b.name for b in bound]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"loss: {', '.join(names) or 'no term'}: give each loss once")
    wanted = {b.name: b.entry.responses for b in bound if b.entry.responses != 1}
    if not wanted:
        return 1
    known = [p for p in wanted.values() if p is not None]
    mismatched = any(b.entry.mismatched for b in bound)
    if len({b.entry.responses - b.entry.mismatched for b in bound if b.entry.responses not in (1, None)}) > 1:
        raise UserError(f"loss: {', '.join(names)}: they take different numbers of responses; train them apart")
    if len({b.entry.rewards for b in bound}) > 1:
        raise UserError(f"loss: {', '.join(names)}: one is of a reward model, another of a language model's log-probs")
    if mismatched and None in wanted.values():
        raise UserError(f"loss: {', '.join(names)}: one takes every response, another one that is not an answer")
    return max(known) if known else None


def _check_shared_parts(bound: Sequence[BoundTerm]) -> None:
    """Rejects ld_alpha beside a loss of mismatched responses, which would change the shared part of the others."""
    strange = [b.name for b in bound if b.entry.mismatched]
    for b in bound:
        alpha = b.transform["ld_alpha"]
        if strange and not isinstance(alpha, Tracer) and alpha != 1:
            raise UserError(
                f"loss {b.name}: ld_alpha {alpha} cannot be used beside {strange[0]}: its responses to other prompts "
                "would shorten what the others share"
            )


def _each(bound: Sequence[BoundTerm], lp: Logps, function: Callable[[BoundTerm, Logps], Array]) -> list[Array]:
    """Returns a function of each term and its log-probs, with its own numbers of `running`."""
    needed, given = _responses(bound), lp.policy.shape[1]
    if given != needed and (needed or given < 2):
        raise ValueError(f"log-probs of {given} responses, where {', '.join(b.name for b in bound)} takes {needed}")
    sizes = [b.carried() for b in bound]
    running = jnp.split(jnp.broadcast_to(lp.running, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return [function(b, lp._replace(running=r if r.size > 1 else r[0])) for b, r in zip(bound, running, strict=True)]


def _metrics(bound: Sequence[BoundTerm], lp: Logps) -> dict[str, Array]:
    """Returns every metric, float32[B]: the loss, the losses of its terms, and the rewards of the first that has some.

    Rewards from a reference come first.
    """
    values = jnp.stack(_each(bound, lp, BoundTerm.value))
    answers = term_options.first_responses(lp, lp.policy.shape[1] - any(b.entry.mismatched for b in bound))
    values = jnp.where(jnp.any(lp.present, axis=1), values, jnp.nan)  # none for absent comparisons
    metrics = {"loss": jnp.sum(values, axis=0)}
    if any(b.entry.rewards for b in bound):
        return (
            metrics
            | measures.length_metrics(answers)
            | measures.margin_metrics(answers.policy, answers.rounding, answers)
        )
    metrics |= measures.likelihood_metrics(answers)
    if len(bound) > 1:
        metrics |= {f"loss/{b.name}": value / b.weigh["weight"] for b, value in zip(bound, values, strict=True)}
    with_reference = [b for b in bound if b.entry.uses_reference]
    if with_reference:
        return metrics | measures.reward_metrics(answers, with_reference[0].hyper.get("beta", 1.0))
    rewards = [partial(b.entry.implicit_reward, **b.hyper) for b in bound if b.entry.implicit_reward]
    return metrics | (measures.implicit_reward_metrics(answers, rewards[0]) if rewards else {})
