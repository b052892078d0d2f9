"""Rewards by a transformers classifier of any family. The paper's true reward of film reviews is one."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.errors import UserError, closest
from dpo_jax.models.huggingface.folder import model_folder, read_config
from dpo_jax.records import Array

log = logging.getLogger(__name__)
BATCH = 32  # texts


def classifier(name: str) -> Callable[..., Array]:
    """Returns the reward (prompts, completions) -> float64[n] of a transformers *ForSequenceClassification.

    A text is a prompt followed by its completion. Its reward is the log-odds of the label, log p / (1 - p); a model
    with one label gives its output. Only the start of a text longer than the model's positions is scored; a message
    reports how many texts that concerns.

    Args:
      name: a folder or `owner/name` of the hub, then `#LABEL`, a label of its config.json, if it has several.

    Raises:
      UserError: torch is not installed; the folder is absent or holds no classifier; unknown label.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("reward 'classifier' needs torch, which is not installed; install dpo_jax[classifier]")
    path, _, label = name.partition("#")
    folder = model_folder(path)
    place = _place(folder, label, f"reward 'classifier:{name}'")
    model, tokenizer = _loaded(folder)
    longest = min(tokenizer.model_max_length, _positions(model.config))

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> Array:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        cut = sum(len(ids) > longest for ids in tokenizer(texts, verbose=False)["input_ids"]) if texts else 0
        if cut:
            shown = f"{cut} of {len(texts)} texts have more than {longest} tokens"
            log.warning(f"classifier:{name}: {shown}; their starts count")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths need little padding
        scores = np.zeros(len(texts))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            scores[rows] = _log_odds(_logits(model, tokenizer, [texts[i] for i in rows], longest), place)
        return scores

    return reward


def _place(folder: Path, label: str, who: str) -> int:
    """Returns the index of a label in a model's config.json; checks that the model is a classifier."""
    config = read_config(folder)
    named = config.get("architectures") or ["a model"]
    if not named[0].endswith("ForSequenceClassification"):
        raise UserError(f"{who}: {folder} holds {named[0]}; give a *ForSequenceClassification")
    labels = {text: int(i) for i, text in config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).items()}
    if len(labels) == 1 and not label:
        return 0
    if label not in labels:
        raise UserError(f"{who}: name a label as FOLDER#LABEL; {closest(label, list(labels))}")
    return labels[label]


def _loaded(folder: Path) -> tuple[Any, Any]:
    """Returns the model and its tokenizer; refuses a folder that lacks a weight, which would be random."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, how = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder}: cannot read a classifier: {' '.join(str(e).split())[:300]}") from e
    if how["missing_keys"]:
        raise UserError(f"{folder}: classifier lacks {', '.join(sorted(how['missing_keys'])[:3])}; give a trained one")
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: its tokenizer has no pad_token; set it in tokenizer_config.json")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _positions(config: Any) -> int:
    """Returns the longest text, in tokens. RoBERTa's positions start after the padding index."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def _logits(model: Any, tokenizer: Any, texts: list[str], longest: int) -> Array:
    import torch

    batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        return model(**batch).logits.double().cpu().numpy()


def _log_odds(logits: Array, place: int) -> Array:
    """Returns log p / (1 - p) of a label, float64[n], from logits [n, labels]; the logit if there is one label."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[:, place] - np.logaddexp.reduce(np.delete(logits, place, axis=1), axis=1)
