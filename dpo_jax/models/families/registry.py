"""The model families: each `model_type` of config.json is the module of that name in this folder."""

import dataclasses
import importlib
import math
import pkgutil
import re
from collections.abc import Mapping
from functools import cache
from types import ModuleType

from dpo_jax.errors import UserError
from dpo_jax.models import families as folder
from dpo_jax.models import reward_head
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import foreign
from dpo_jax.models.families.hf_config import HfConfig

# Models that read images too: `model_type` -> the family of their language model, which is a part of them.
WRAPPERS = {"gemma3": "gemma3_text"}
# Keys of the whole model that its language model needs, too.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config", "auto_map")


def describe_families() -> list[tuple[str, str, str]]:
    """Returns for each family its `model_type`, its class in transformers, and a one-line description."""
    modules = [(name, family(name)) for name in families()]
    return [(name, module.CLASS, (module.__doc__ or "").splitlines()[0]) for name, module in modules]


def architecture_of(config: HfConfig) -> Architecture:
    """Returns the architecture of a config.json: a language model or, if its `architectures` say so, a reward model.

    Raises:
      UserError: the family or a setting is missing or not supported.
    """
    module = family(config["model_type"])
    try:
        foreign.refuse_foreign(config, module.READS)
        found = module.architecture(config)
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
    for part in filter(None, (architecture, architecture.mixture)):
        for field in dataclasses.fields(part):
            value, kind = getattr(part, field.name), field.type
            what = f"config.json: {field.name} of the model is {value!r}, which is no"
            if kind in (int, "int") and field.name != "position_offset":
                if type(value) is not int or not 1 <= value < 2**31:
                    raise UserError(f"{what} size; correct it")
            elif kind in (float, "float") and (isinstance(value, bool) or not math.isfinite(value)):
                raise UserError(f"{what} number; correct it")


def language_model_config(config: HfConfig) -> HfConfig:
    """Returns the config.json of the language model in a model that reads images too; other configs as they are.

    Raises:
      UserError: it describes no language model.
    """
    kind = WRAPPERS.get(str(config.get("model_type")))
    if kind is None:
        return config
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"config.json: text_config is missing; a {config['model_type']} has its language model there")
    module = family(kind)
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    shared = {key: config[key] for key in SHARED if key in config}
    plain = {key: value for key, value in inner.items() if value is not None}
    return {**module.WRAPPED_DEFAULTS, **plain, **shared, **tied, "model_type": kind, "architectures": [module.CLASS]}


@cache
def families() -> tuple[str, ...]:
    """Returns the known values of `model_type`: the modules in this folder that define `tensors`."""
    names = (module.name for module in pkgutil.iter_modules(folder.__path__))
    return tuple(sorted(n for n in names if hasattr(importlib.import_module(f"{folder.__name__}.{n}"), "tensors")))


def family(model_type: str) -> ModuleType:
    """Returns a family's module, with its `architecture(config)` and `tensors(architecture)`.

    Raises:
      UserError: there is no such family.
    """
    model_type = str(model_type)
    if model_type not in families():
        known = f"known: {', '.join(families())}"
        how = "a new one is a file in dpo_jax/models/families/, see dpo-jax models"
        if _exists_elsewhere(model_type):  # a family of a similar name would be another model
            raise UserError(f"config.json: model_type {model_type!r} is a family that is not supported; {known}; {how}")
        # A family of a similar name is another model; the same name in other letters is a slip.
        same = [name for name in families() if _letters(name) == _letters(model_type)]
        hint = f"did you mean {same[0]!r}? " if same else ""
        raise UserError(f"config.json: model_type {model_type!r} is not known; {hint}{known}; {how}")
    return importlib.import_module(f"{folder.__name__}.{model_type}")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _exists_elsewhere(model_type: str) -> bool:
    """Returns whether transformers has a family of that name."""
    from transformers import CONFIG_MAPPING  # imported late: it is slow to import

    return model_type in CONFIG_MAPPING
