"""Muon, and the optimizers of optax by their names."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

from dpo_jax.optim.optimizers import decayed, register_optimizer
from dpo_jax.optim.schedules import Schedule

# Optimizers of optax that need only gradients and parameters, and update the parameters that are evaluated.
OPTAX = (
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adan",
    "amsgrad",
    "fromage",
    "lamb",
)
OPTAX += ("lars", "lion", "novograd", "optimistic_adam_v2", "optimistic_gradient_descent", "radam", "sgd", "sign_sgd")
OPTAX += ("signum", "yogi", "acprop", "ademamix", "adopt", "cocob", "madgrad", "prodigy")
OPTAX += ("nadam", "nadamw", "dowg")


@register_optimizer
def muon(
    rate: Schedule,
    *,
    beta: float = 0.95,
    ns_steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) of a layer's matrices, AdamW of all else, updates as large as AdamW's (arXiv 2502.16982).

    Args:
      rate: learning rate by update.
      beta: Decay of the running mean of a matrix's gradients.
      ns_steps: Iterations that orthogonalize it.
      b1: Decay of the running mean of other gradients.
      b2: Decay of the running mean of their squares.
      weight_decay: Decay towards 0, times the learning rate, of all parameters but norms and biases.
    """
    options = {"beta": beta, "ns_steps": ns_steps, "adam_b1": b1, "adam_b2": b2, "consistent_rms": 0.2}
    return optax.chain(
        optax.contrib.muon(1.0, **options, muon_weight_dimension_numbers=_matrices),
        optax.add_decayed_weights(-weight_decay, mask=decayed),
        optax.scale_by_schedule(rate),
    )


def _matrices(params: Any) -> Any:
    """Returns input and output axes of the matrices of all layers, whose first axis is the layer; None of others."""

    def axes(path: Any, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [getattr(key, "key", "") for key in path]
        if names[-1] != "kernel" or x.ndim < 3:
            return None
        inputs = x.ndim - 2 if names[-2] == "o" else 1  # heads and their size are two axes: outputs of q, inputs of o
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, x.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def from_optax(name: str) -> Callable[..., Any]:
    """Returns an optimizer of optax as `(rate, *, options)`; its options are those that a config can express."""
    function = getattr(optax, name, None) or getattr(optax.contrib, name)
    every = list(inspect.signature(function).parameters.values())[1:]
    masks = {p.name: decayed for p in every if p.name in ("mask", "weight_decay_mask")}

    def made(rate: Schedule, **options: Any) -> Any:
        return function(rate, **masks, **options)

    options = [p for p in every if type(p.default) in (bool, int, float, str)]
    named = [p.replace(kind=p.KEYWORD_ONLY, annotation=type(p.default)) for p in options]
    made.__name__, made.__doc__ = name, function.__doc__
    made.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return made
