"""Objectives: one loss or a weighted sum of several, with their hyper-parameters bound."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dpo_jax.errors import UserError
from dpo_jax.losses import metrics as measures
from dpo_jax.losses import term_options
from dpo_jax.losses.registry import Entry, entry_of, find_entry, label
from dpo_jax.losses.term import OPTIONS, BoundTerm, bind_term
from dpo_jax.named import with_axes
from dpo_jax.records import Array, Logps

Term = Mapping[str, Any]  # the name of a loss and its options


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


def build(loss: str | Term | Sequence[str | Term]) -> Loss:
    """Returns the objective of a config: "dpo", `{"name": "dpo", "beta": 0.1}`, or a list of such terms, summed.

    A name is a registered loss or `module:function`; a term with an axis and no name is `axes`. Values may be traced.

    Raises:
      UserError: an unknown loss or option, a value without a meaning, or terms that cannot be combined.
    """
    terms = [loss] if isinstance(loss, Mapping | str) else loss
    if not isinstance(terms, list | tuple) or isinstance(terms, Loss):
        raise UserError(f"loss: {loss!r}: give a name, a dict with name and options, or a list of them")
    return _objective([bind_term(name, find_entry(name), options) for name, options in map(_split, terms)])


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
    return _objective([bind_term(label(function), entry_of(function)._replace(**needs), options)])


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


def _responses(bound: Sequence[BoundTerm]) -> int | None:
    """Returns the number of responses all terms accept; single-response terms read the first one."""
    names = [b.name for b in bound]
    if len({(b.name, *_texts(b.hyper)) for b in bound}) < len(names) or not names:
        raise UserError(f"loss: {', '.join(names) or 'no term'}: give each loss, or point of the axes, once")
    wanted = [b.entry.responses for b in bound if b.entry.responses != 1]
    if not wanted:
        return 1
    known = [p for p in wanted if p is not None]
    mismatched = any(b.entry.mismatched for b in bound)
    if len({b.entry.responses - b.entry.mismatched for b in bound if b.entry.responses not in (1, None)}) > 1:
        raise UserError(f"loss: {', '.join(names)}: they take different numbers of responses; train them apart")
    if len({b.entry.rewards for b in bound}) > 1:
        raise UserError(f"loss: {', '.join(names)}: one is of a reward model, another of a language model's log-probs")
    if mismatched and None in wanted:
        raise UserError(f"loss: {', '.join(names)}: one takes every response, another one that is not an answer")
    return max(known) if known else None


def _texts(hyper: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the coordinates of a point of the axes; few other losses have an option that is a text."""
    return tuple(value for value in hyper.values() if isinstance(value, str))


def _term_names(bound: Sequence[BoundTerm]) -> list[str]:
    """Returns the names of terms in metrics: a name that occurs again has the place of its term, from 0."""
    names = [b.name for b in bound]
    return [name if names.count(name) == 1 else f"{name}.{i}" for i, name in enumerate(names)]


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
        terms = zip(_term_names(bound), bound, values, strict=True)
        metrics |= {f"loss/{name}": value / b.weigh["weight"] for name, b, value in terms}
    with_reference = [b for b in bound if b.entry.uses_reference]
    if with_reference:
        return metrics | measures.reward_metrics(answers, with_reference[0].hyper.get("beta", 1.0))
    rewards = [partial(b.entry.implicit_reward, **b.hyper) for b in bound if b.entry.implicit_reward]
    return metrics | (measures.implicit_reward_metrics(answers, rewards[0]) if rewards else {})
