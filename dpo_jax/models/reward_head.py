"""Reward models: decoders whose head gives one number, in the format of transformers' *ForSequenceClassification.

The reward of a text is the product of the head with the hidden state of its last token that is not padding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.hf_config import HfConfig

SUFFIX = "ForSequenceClassification"
# Transformers has no reward model of these.
WITHOUT = ("GraniteMoe", "Granite", "Cohere2", "Olmoe", "Qwen3_5Moe", "Glm4Moe", "Gemma4")
ENCODING = "dpo_jax_encoding"  # key of config.json: how training texts were tokenized


def is_reward_config(config: HfConfig) -> bool:
    """Returns whether a config.json describes a reward model.

    Raises:
      UserError: it describes a classifier with several labels.
    """
    found = any(str(name).endswith(SUFFIX) for name in config.get("architectures") or ())
    labels = len(config.get("id2label") or "01")  # transformers has two by default
    if found and labels != 1:
        raise UserError(f"config.json: a classifier of {labels} labels; a reward model has one (id2label)")
    return found


def reward_class(name: str) -> str:
    """Returns the name of transformers' reward model class, given that of the family's language model class.

    Raises:
      UserError: transformers has none.
    """
    plain = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    if plain in WITHOUT:
        raise UserError(f"{plain}{SUFFIX} is not in transformers; train a reward model of another family")
    return (f"{plain}Text" if plain in ("Gemma3", "Qwen3_5") else plain) + SUFFIX


def as_reward_architecture(architecture: Architecture) -> Architecture:
    """Returns the architecture with a reward head instead of a language model head."""
    return dataclasses.replace(architecture, score=True, tied=True, head_bias=False)


def as_reward_config(config: HfConfig, name: str, pad: int, encoding: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json of a reward model.

    Args:
      config: config.json of the model it starts from.
      name: name of transformers' language model class of the family.
      pad: id of the padding token.
      encoding: tokenization options, as `data.encode` takes them.
    """
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**config, **labels, "architectures": [reward_class(name)], "pad_token_id": pad, ENCODING: dict(encoding)}


def with_new_head(params: Mapping[str, Any], architecture: Architecture, seed: int) -> dict[str, Any]:
    """Returns a language model's parameters with its head replaced by a reward head, normal(0, 1 / sqrt(D + 1))."""
    score = np.random.default_rng(seed).normal(0.0, architecture.score_std, (1, architecture.width))
    rest = {name: value for name, value in params.items() if name not in ("head", "head_bias")}
    return {**rest, "score": score.astype(np.float32)}
