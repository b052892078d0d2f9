"""Models that read images too: a language model of one of our families, and parts for images that are left as they are.

Their config.json has the language model's in `text_config`, and their tensors have its names after a prefix.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.models.families.hf_config import HfConfig
from dpo_jax.models.families.registry import family


class Wrapper(NamedTuple):
    """A model around a language model.

    Attributes:
      class_name: in transformers.
      families: of its language model; the first is that of a `text_config` without `model_type`.
      defaults: what `text_config` may leave out.
    """

    class_name: str
    families: tuple[str, ...]
    defaults: Mapping[str, Any]


_GEMMA3 = {"vocab_size": 262208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8}
_GEMMA3 |= {"intermediate_size": 9216, "tie_word_embeddings": True}
# Mistral Small 3.1 and 3.2, Ministral 3.
_MISTRAL3 = {"vocab_size": 131072, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32}
_MISTRAL3 |= {"intermediate_size": 32768, "sliding_window": None}
_QWEN3_5 = {"vocab_size": 248320, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 16}
_QWEN3_5 |= {"intermediate_size": 12288}
_QWEN3_5_MOE = {"vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16}
_GEMMA4 = {"vocab_size": 262144, "hidden_size": 2304, "num_hidden_layers": 30, "num_attention_heads": 8}
_GEMMA4 |= {"intermediate_size": 9216, "tie_word_embeddings": True}
WRAPPERS = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", ("gemma3_text",), _GEMMA3),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", ("gemma4_text",), _GEMMA4),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", ("mistral", "ministral3"), _MISTRAL3),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", ("qwen3_5_text",), _QWEN3_5),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", ("qwen3_5_moe_text",), _QWEN3_5_MOE),
}

# Prefixes of the language model's tensors: transformers 5's, those of released files, those of some conversions.
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")
FURTHER = ("mtp.",)  # heads that predict further tokens, which transformers does not read
ELSEWHERE = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
ELSEWHERE += ("model.visual.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.", *FURTHER)
# Keys of the whole model that its language model needs, too.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config", "auto_map")


def language_model_config(config: HfConfig) -> HfConfig:
    """Returns the config.json of the language model in a model that reads images too; other configs as they are.

    Raises:
      UserError: it describes no language model, or one of a family that the model is not known to have.
    """
    found = WRAPPERS.get(str(config.get("model_type")))
    if found is None:
        return config
    kind, inner = config["model_type"], config.get("text_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"config.json: text_config is missing; a {kind} has its language model there")
    name = inner.get("model_type") or found.families[0]
    if name not in found.families:
        known = ", ".join(found.families)
        raise UserError(f"config.json: text_config of a {kind} has model_type {name!r}, not supported; known: {known}")
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    shared = {key: config[key] for key in SHARED if key in config}
    plain = {key: value for key, value in inner.items() if value is not None}
    return {**found.defaults, **plain, **shared, **tied, "model_type": name, "architectures": [family(name).CLASS]}


def language_model_name(key: str, prefix: str) -> str:
    """Returns the name in the family's own files, without `prefix`, of a tensor of a model around it."""
    outer = next((outer for outer in PREFIXES if key.startswith(outer)), prefix)
    return key.removeprefix(outer)
