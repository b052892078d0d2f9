"""The model families: `model_type` of a config.json -> the module of that name in this folder."""

import difflib
import importlib
import pkgutil
from functools import cache
from types import ModuleType

from dpo_jax.errors import UserError
from dpo_jax.models import families as folder
from dpo_jax.models import reward_head
from dpo_jax.models.architecture import Architecture, HfConfig

ABSENT = {"mixtral": "a mixture of experts", "moe": "a mixture of experts"}  # nobody means a family of a similar name


def describe_families() -> list[tuple[str, str, str]]:
    """Returns of each family its `model_type`, its class in transformers, and a line that says what it is."""
    modules = [(name, family(name)) for name in families()]
    return [(name, module.CLASS, (module.__doc__ or "").splitlines()[0]) for name, module in modules]


def architecture_of(config: HfConfig) -> Architecture:
    """Returns what a config.json describes: a language model or, if its `architectures` says so, a reward model.

    Raises:
      UserError: a family or a setting that is missing or not supported.
    """
    found = family(config["model_type"]).architecture(config)
    return reward_head.as_reward_architecture(found) if reward_head.is_reward_config(config) else found


@cache
def families() -> tuple[str, ...]:
    """Returns the known values of `model_type`: the files of this folder that have a table of tensors."""
    names = (module.name for module in pkgutil.iter_modules(folder.__path__))
    return tuple(sorted(n for n in names if hasattr(importlib.import_module(f"{folder.__name__}.{n}"), "tensors")))


def family(model_type: str) -> ModuleType:
    """Returns a family's module, with its `architecture(config)` and `tensors(architecture)`.

    Raises:
      UserError: there is none of this name.
    """
    for absent, why in ABSENT.items():
        if absent in str(model_type):
            raise UserError(f"config.json: model_type {model_type!r} is {why}, which is not supported")
    if model_type not in families():
        longer = [name for name in families() if name.startswith(f"{model_type}_")]
        close = longer or difflib.get_close_matches(str(model_type), families(), 1)
        hint = f"did you mean {close[0]}? " if close else ""
        how = "a new one is a file in dpo_jax/models/families/, see dpo-jax models"
        known = f"known are {', '.join(families())}; {how}"
        raise UserError(f"config.json: model_type {model_type!r} is not known; {hint}{known}")
    return importlib.import_module(f"{folder.__name__}.{model_type}")
