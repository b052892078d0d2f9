"""Tokens that were added to a tokenizer: embedding and head grow, and new rows begin as the mean of the others."""

import dataclasses
from typing import Any

import numpy as np

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.layer_embedding import TABLES

MULTIPLE = 64  # a grown vocabulary is a multiple of it, so that it can be sharded
# Special tokens of texts; a tokenizer names others too, of images for example, that a model of texts may lack.
OF_TEXTS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def ids_to_embed(tokenizer: Any) -> set[int]:
    """Returns the ids that need an embedding: all but special tokens with a name of their own, as for images."""
    named = {
        str(token)
        for key, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and key not in {f"{name}_token" for name in OF_TEXTS}
    }
    texts = {str(getattr(tokenizer, f"{name}_token", None)) for name in OF_TEXTS}
    return {i for token, i in tokenizer.get_vocab().items() if token not in named - texts}


def grow_vocabulary(architecture: Architecture, params: Any, size: int) -> tuple[Architecture, Any]:
    """Returns a model with at least `size` rows in its embedding and its head.

    Args:
      architecture: of the model.
      params: its parameters, host or lazy arrays; None for those of a model that is not there yet.
      size: the rows that are needed; V becomes the next multiple of `MULTIPLE`.
    """
    vocab = -(-size // MULTIPLE) * MULTIPLE
    grown = dataclasses.replace(architecture, vocab=vocab)
    if params is None:
        return grown, None
    keys = [key for key in (*TABLES, "head", "head_bias") if key in params]
    return grown, {**params, **{key: _with_mean_rows(np.asarray(params[key]), vocab) for key in keys}}


def size_settings(architecture: Architecture) -> dict[str, int]:
    """Returns the keys of config.json that say how many tokens a model has."""
    keys = ("vocab_size", *(("vocab_size_per_layer_input",) if architecture.layer_embedding is not None else ()))
    return dict.fromkeys(keys, architecture.vocab)


def _with_mean_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns rows [V, ...] with their mean appended up to `count` of them."""
    mean = rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    return np.concatenate([rows, np.broadcast_to(mean, (count - len(rows), *rows.shape[1:]))])
