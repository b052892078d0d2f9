"""Reward models: a decoder whose head gives one number, in the folders of transformers' *ForSequenceClassification.

The reward of a text is the head's product with the hidden state of its last token that is no padding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture, HfConfig

SUFFIX = "ForSequenceClassification"
ENCODING = "dpo_jax_encoding"  # in config.json: how the texts that it was trained on became tokens


def is_reward_config(config: HfConfig) -> bool:
    """Returns whether a config.json is that of a reward model.

    Raises:
      UserError: it is that of a classifier of several labels.
    """
    found = any(str(name).endswith(SUFFIX) for name in config.get("architectures") or ())
    labels = len(config.get("id2label") or "01")  # transformers has two by default
    if found and labels != 1:
        raise UserError(f"config.json: a classifier of {labels} labels; a reward model has one (id2label)")
    return found


def reward_class(name: str) -> str:
    """Returns transformers' class of reward models, given that of the family's language models."""
    plain = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    return (f"{plain}Text" if plain == "Gemma3" else plain) + SUFFIX


def as_reward_architecture(architecture: Architecture) -> Architecture:
    """Returns the architecture with the head of a reward model."""
    return dataclasses.replace(architecture, score=True, tied=True, head_bias=False)


def as_reward_config(config: HfConfig, name: str, pad: int, encoding: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json for a reward model.

    Args:
      config: that of the model it starts from.
      name: transformers' class of the family's language models.
      pad: the token that follows a text's last one.
      encoding: how texts become tokens, as `data.encode` takes it.
    """
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**config, **labels, "architectures": [reward_class(name)], "pad_token_id": pad, ENCODING: dict(encoding)}


def with_new_head(params: Mapping[str, Any], architecture: Architecture, seed: int) -> dict[str, Any]:
    """Returns a language model's parameters with a new reward model's head for theirs, normal(0, 1 / sqrt(D + 1))."""
    drawn = np.random.default_rng(seed).normal(0.0, architecture.score_std, (1, architecture.width))
    rest = {name: value for name, value in params.items() if name not in ("head", "head_bias")}
    return {**rest, "score": drawn.astype(np.float32)}
