"""The model families: each `model_type` of config.json is the module of that name in this folder."""

import dataclasses
import importlib
import math
import pkgutil
import re
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models import families as folder
from dpo_jax.models import reward_head
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import foreign
from dpo_jax.models.families.hf_config import HfConfig
from dpo_jax.named import import_function

OWN = "_family"  # key of our copy of config.json: `model.family`, a family of the user
PARTS = ("CLASS", "PREFIX", "HEAD", "BUFFERS", "READS", "tensors")  # of a family, beside `architecture`


def describe_families() -> list[tuple[str, str, str]]:
    """Returns for each family its `model_type`, its class in transformers, and a one-line description."""
    modules = [(name, family(name)) for name in families()]
    return [(name, module.CLASS, (module.__doc__ or "").splitlines()[0]) for name, module in modules]


def architecture_of(config: HfConfig) -> Architecture:
    """Returns the architecture of a config.json: a language model or, if its `architectures` say so, a reward model.

    Raises:
      UserError: the family or a setting is missing or not supported.
    """
    module = family_of(config)
    try:
        foreign.refuse_foreign(config, module.READS)
        found = dataclasses.replace(module.architecture(config), family=config.get(OWN) or config["model_type"])
        found = reward_head.as_reward_architecture(found) if reward_head.is_reward_config(config) else found
        check_sizes(found)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        raise UserError(f"config.json: a setting has a value that cannot be read ({e}); correct it") from e
    return found


def check_sizes(architecture: Architecture) -> None:
    """Refuses sizes that no model has.

    Raises:
      UserError: the message names the field of the architecture.
    """
    a = architecture
    for part in filter(None, (a, a.mixture, a.delta, a.latent, a.global_heads)):
        for field in dataclasses.fields(part):
            value, kind = getattr(part, field.name), field.type
            what = f"config.json: {field.name} of the model is {value!r}, which is no"
            sized = kind in (int, "int") or (kind == int | None and value is not None)
            if sized and field.name != "position_offset":
                if type(value) is not int or not 1 <= value < 2**31:
                    raise UserError(f"{what} size; correct it")
            elif kind in (float, "float") and (value is None or isinstance(value, bool) or not math.isfinite(value)):
                raise UserError(f"{what} number; correct it")


@cache
def families() -> tuple[str, ...]:
    """Returns the known values of `model_type`: the modules in this folder that define `tensors`."""
    names = (module.name for module in pkgutil.iter_modules(folder.__path__))
    return tuple(sorted(n for n in names if hasattr(importlib.import_module(f"{folder.__name__}.{n}"), "tensors")))


def family_of(config: HfConfig) -> Any:
    """Returns the family of a config.json: the user's that `model.family` names, or that of its `model_type`."""
    return family(config.get(OWN) or config["model_type"])


def family(model_type: str) -> Any:
    """Returns a family's module, with its `architecture(config)` and `tensors(architecture)`.

    Args:
      model_type: of config.json, or `module:function` of a user's family.

    Raises:
      UserError: there is no such family.
    """
    model_type = str(model_type)
    if ":" in model_type:
        return _own_family(model_type)
    if model_type not in families():
        known = f"known: {', '.join(families())}"
        how = "for one of your own set model.family, see dpo-jax models"
        if _exists_elsewhere(model_type):  # a family of a similar name would be another model
            raise UserError(f"config.json: model_type {model_type!r} is a family that is not supported; {known}; {how}")
        # A family of a similar name is another model; the same name in other letters is a slip.
        same = [name for name in families() if _letters(name) == _letters(model_type)]
        hint = f"did you mean {same[0]!r}? " if same else ""
        raise UserError(f"config.json: model_type {model_type!r} is not known; {hint}{known}; {how}")
    return importlib.import_module(f"{folder.__name__}.{model_type}")


def _own_family(name: str) -> Any:
    """Returns a family of the user: the function reads config.json, and its module has what families/__init__.py lists.

    Raises:
      UserError: there is no such function, or the module lacks something.
    """
    function = import_function(name, "model.family")
    module = vars(sys.modules[name.partition(":")[0]])
    if missing := [part for part in PARTS if part not in module]:
        raise UserError(f"model.family: the module of {name!r} defines no {missing[0]}; add it, see dpo-jax models")
    return SimpleNamespace(architecture=function, **{part: module[part] for part in PARTS})


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _exists_elsewhere(model_type: str) -> bool:
    """Returns whether transformers has a family of that name."""
    from transformers import CONFIG_MAPPING  # imported late: it is slow to import

    return model_type in CONFIG_MAPPING
