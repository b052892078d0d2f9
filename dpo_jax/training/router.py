"""The weight of a mixture's router loss: of the run's config, else of the model's config.json."""

import math

from dpo_jax.errors import UserError
from dpo_jax.models.families.hf_config import HfConfig
from dpo_jax.models.interface import Model

DEFAULT = 0.001  # router_aux_loss_coef of a config.json that has none, as in transformers


def with_router_loss(model: Model, weight: float | None, hf_config: HfConfig) -> Model:
    """Returns the model with the weight of its router loss.

    Args:
      model: the policy.
      weight: `model.router_loss`; None for `router_aux_loss_coef` of config.json if its `output_router_logits` is true,
        else 0.
      hf_config: contents of config.json.

    Raises:
      UserError: the weight is negative or no number; the model has no router, one whose experts are balanced by its
        correction, or is a reward model.
    """
    found, asked = model.architecture.mixture, weight is not None
    mixture = found is not None and not found.sigmoid  # transformers has no loss of sigmoids
    if weight is None:
        own = hf_config.get("router_aux_loss_coef")
        weight = (DEFAULT if own is None else own) if mixture and hf_config.get("output_router_logits") else 0.0
    key = "model.router_loss" if asked else "config.json: router_aux_loss_coef"
    if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
        raise UserError(f"{key}: {weight!r}: it must be a number, at least 0")
    if weight and found is not None and not mixture:
        why = "balances its experts by the correction of its router, which stays as it is"
        raise UserError(f"{key}: {weight}, but a {model.architecture.family} {why}; remove it")
    if weight and not mixture:
        raise UserError(f"{key}: {weight}, but a {model.architecture.family} has no router; remove it")
    if weight and model.architecture.score:
        raise UserError(f"{key}: {weight}, but a reward model is trained without it; set model.router_loss to 0")
    return model._replace(router_loss=float(weight))
