"""The registry of losses, by name."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax

from dpo_jax.errors import UserError, closest
from dpo_jax.named import AXES, import_function
from dpo_jax.records import Array, Missing

# A missing field of Logps has no leaves, so that jit, grad and tree.map pass it through.
jax.tree_util.register_pytree_node(Missing, lambda m: ((), m.name), lambda name, _: Missing(name))

# Names of other systems whose most similar name here is another loss.
ALIASES = {
    "sigmoid": "dpo",
    "cdpo": "dpo",
    "dpo_norm": "sigmoid_norm",
    "sppo": "sppo_hard",
    "listwise": "lipo",
    "infonca": "lipo",
    "alphadpo": "alpha_dpo",
    "nll": "sft",
    "preferred_ft": "sft",
    "reward_model": "bradley_terry",
}
# Names elsewhere of what a config writes in other words: `loss` of the config, and what else to know.
WRITTEN = {
    "cal_dpo": ("[{name: dpo, beta: 1.0}, {name: sppo_hard, beta: 0.1, weight: 0.5}]", "with Cal-DPO's beta second"),
    "bdpo": ("{name: dpo, rejected_mixture: 0.5}", "where rejected_mixture is BDPO's lambda"),
    "dpo_shift": ("{name: dpo, rejected_weight: 0.75}", "where rejected_weight is DPO-Shift's f"),
    "rpo": ("[{name: dpo}, {name: sft, reduction: mean}]", "or rpo_sq, rpo_bwd or rpo_fwd, which read scores"),
    "gpo": ("{link: truncated}", "or another link"),
    "rebel": ("{name: rpo_sq, beta: 0.1, eta: 1.0}", "whose beta is 1 over REBEL's eta"),
    "list_nca": ("{name: nca}", "with data.responses and scores in the data"),
    "tis_dpo": ("{name: dpo}", "with weights in the data's column token_weights"),
    "mask_dpo": ("{name: dpo}", "with weights of 0 in the data's column token_weights"),
    "odds": ("{score: log_odds}", ""),
}


class Entry(NamedTuple):
    """A registered loss.

    Attributes:
      function: `(Logps, *, hyper-parameters) -> float32[B]`.
      responses: P, the responses per prompt; None for any P from 2 on.
      uses_reference: whether it reads `Logps.reference`.
      needs_reference: whether log pi_ref may not be set to 0 (`reference_free`).
      whole_batch: whether a comparison's value depends on the other comparisons of its step.
      statistic: `(Logps, *, the same hyper-parameters) -> float32[]` or float32[n], `Logps.running` after a step, for a
        loss that carries numbers from step to step; they start at 0.
      soft_labels: whether `Logps.preference` may be below 1.
      divergences: whether f-divergences other than the reverse KL are defined for it.
      unpaired: whether a response of a pair may be absent.
      mismatched: whether the last response must be one to another prompt.
      scores: whether it needs ratings of the responses, the first one's above the last one's.
      rewards: whether `Logps.policy` must hold the rewards of a reward model.
      implicit_reward: `(Logps, *, the same hyper-parameters) -> float32[B, P]`, for a loss without a reference: the
        rewards that it compares. Accuracy and margins are theirs; None: it has none.
      of_options: `(*, the same hyper-parameters) -> dict`, the fields above that depend on them.
    """

    function: Callable[..., Array]
    responses: int | None
    uses_reference: bool
    needs_reference: bool = False
    whole_batch: bool = False
    statistic: Callable[..., Array] | None = None
    soft_labels: bool = False
    divergences: bool = False
    unpaired: bool = False
    mismatched: bool = False
    scores: bool = False
    rewards: bool = False
    implicit_reward: Callable[..., Array] | None = None
    of_options: Callable[..., dict[str, Any]] | None = None


REGISTRY: dict[str, Entry] = {}


def register(
    bare: Callable | None = None, /, *, responses: int | None = 2, uses_reference: bool = True, **needs: Any
) -> Any:
    """Returns a decorator that registers a loss under its function's name; `@register` alone is one too.

    A name that is registered already is replaced with a warning, so that a notebook cell may run again. The arguments
    are the fields of `Entry`.

    Raises:
      UserError: another argument.
    """
    if unknown := [name for name in needs if name not in Entry._fields]:
        raise UserError(f"losses.register: unknown argument {unknown[0]!r}; {closest(unknown[0], Entry._fields)}")

    def file(function: Callable) -> Callable:
        if function.__name__ in REGISTRY:
            warnings.warn(f"loss {function.__name__!r} replaces the one registered before", stacklevel=2)
        REGISTRY[function.__name__] = checked_entry(Entry(function, responses, uses_reference, **needs))
        return function

    return file if bare is None else file(bare)


def label(function: Callable) -> str:
    """Returns the name of a function, or of the type of another callable, for messages."""
    return getattr(function, "__name__", type(function).__name__)


def checked_entry(entry: Entry) -> Entry:
    """Returns the entry of a function that takes one record and keyword-only hyper-parameters with defaults.

    Raises:
      UserError: another signature.
    """
    function, name = entry.function, label(entry.function)
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(positional) != 1 or len(positional) + len(keywords) < len(parameters):
        raise UserError(f"loss {name}: define it as {name}(lp, *, option=default, ...)")
    for p in keywords:
        if p.default is p.empty:
            raise UserError(f"loss {name}: give its option {p.name!r} a default")
    return entry


def entry_of(function: Callable[..., Array]) -> Entry:
    """Returns the entry under which a function is registered; else that of a loss of pairs and their reference."""
    known = [entry for entry in REGISTRY.values() if entry.function is function]
    return known[0] if known else checked_entry(Entry(function, 2, True))


def find_entry(name: str, key: str = "loss.name") -> Entry:
    """Returns the loss of a name, built-in or registered, or of `module:function`, which is imported.

    Raises:
      UserError: an unknown name (`key` says where it was given), or a module that cannot be imported.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if ":" in name:
        return entry_of(import_function(name, key))
    raise UserError(f"{key}: unknown loss {name!r}; {_name_hint(name)}")


def _name_hint(name: str) -> str:
    """Returns what to write instead of an unknown name."""
    same = name.lower().replace("-", "_")
    if same in WRITTEN:
        loss, note = WRITTEN[same]
        return f"write loss: {loss}{f', {note}' if note else ''}"
    known = f"here it is {ALIASES[same]!r}" if same in ALIASES else _axis_hint(name) or closest(name, REGISTRY)
    return f"{known}, or give module:function"


def _axis_hint(value: str) -> str:
    """Returns how to write a value of one of the axes, or "" for another text."""
    options = inspect.signature(REGISTRY["axes"].function).parameters
    axis = next((axis for axis in AXES if value in get_args(options[axis].annotation)), "")
    how = f"write {axis}={value}, in a config {axis}: {value} and no name"
    return f"it is a {axis} of the loss axes: {how}" if axis else ""
