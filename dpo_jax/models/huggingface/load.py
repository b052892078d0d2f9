"""A model with its weights and tokenizer, from and to a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dpo_jax.errors import UserError
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.huggingface.card import CARD, card_source, model_card
from dpo_jax.models.huggingface.folder import (
    end_ids,
    load_tokenizer,
    model_folder,
    open_folder,
    read_config,
    read_generation,
    save_folder,
)
from dpo_jax.models.huggingface.hub import is_hub_name
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.models.init import init_params
from dpo_jax.models.interface import Model
from dpo_jax.models.model import build_model


def load_model(
    path: str | Path, *, compute: str = "float32", remat: str = "none", family: str = ""
) -> tuple[Model, Any, Any]:
    """Returns (model, params, tokenizer) of a Hugging Face folder.

    Args:
      path: a folder, a run folder (its exported model), or owner/name of the hub, maybe with @revision.
      compute: dtype of activations and matmuls, "float32" or "bfloat16"; parameters are float32.
      remat: what the backward pass recomputes: "none", "dots" (all but projections and attention) or "full".
      family: `module:function` of a family of your own; "" for that of config.json.

    Returns:
      Pure functions of the parameters; the parameters, float32 arrays on the default device; a transformers tokenizer.

    Raises:
      UserError: no such model, a family or setting that is not supported, or damaged weights.
    """
    folder = model_folder(str(path))
    architecture, hf_config, params = open_folder(folder, family)
    tokenizer = load_tokenizer(folder)
    ends = end_ids(tokenizer, read_generation(folder), hf_config)
    name = str(path) if is_hub_name(str(path)) else str(Path(path).resolve())
    hf_config["_name_or_path"] = name  # for the card of a model trained from it
    model = build_model(architecture, compute=compute, remat=remat)._replace(hf_config=hf_config, end_ids=ends)
    return model, jax.device_put(load_into_memory(params)), tokenizer


def init_model(
    config: str | Path | Mapping[str, Any], seed: int = 0, *, compute: str = "float32", remat: str = "none"
) -> tuple[Model, Any]:
    """Returns (model, params) of a Hugging Face config, with random weights as transformers initializes them.

    Args:
      config: the values of a config.json, such as {"model_type": "llama", "hidden_size": 64, ...}, or its path.
      seed: of the weights.
      compute: dtype of activations and matmuls, "float32" or "bfloat16"; parameters are float32.
      remat: what the backward pass recomputes: "none", "dots" (all but projections and attention) or "full".

    Raises:
      UserError: no such file, or a family or setting that is not supported.
    """
    hf_config = dict(config) if isinstance(config, Mapping) else read_config(config)
    if "model_type" not in hf_config:
        raise UserError("init_model: model_type is missing; give the family, as in {'model_type': 'llama', ...}")
    hf_config.pop("_name_or_path", None)  # random weights are made from no model
    model = build_model(architecture_of(hf_config), compute=compute, remat=remat)
    params = jax.device_put(init_params(model, seed))
    return model._replace(hf_config=hf_config, end_ids=end_ids(None, {}, hf_config)), params


def save_model(
    folder: str | Path, model: Model, params: Any, tokenizer: Any = None, *, dtype: str | None = None
) -> Path:
    """Writes a Hugging Face folder that transformers and vLLM load, with a model card; returns it.

    The card names the model that was loaded and its license. What it was trained on is yours to add.

    Args:
      folder: the folder; an earlier export there is replaced.
      model: from `load_model` or `init_model`.
      params: the parameters, on devices or on the host.
      tokenizer: a transformers tokenizer to write beside them.
      dtype: of the tensors: "float32", "bfloat16" or "float16"; by default that of the loaded model.

    Raises:
      UserError: a model that was not loaded from a folder, an unknown dtype, or a folder that holds other files.
    """
    if model.hf_config is None:
        raise UserError("save_model: the model has no config.json; load it with load_model or init_model")
    source = card_source(model.hf_config.get("_name_or_path", ""))
    card = model_card(Path(folder).resolve().name, source, model.hf_config)
    save_folder(folder, params, model.hf_config, tokenizer, dtype, files={**source.files, CARD: card})
    return Path(folder)
