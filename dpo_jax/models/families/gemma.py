"""Gemma (2B, 7B): Llama with scaled embeddings, norms that store their scale minus 1, and a tied head."""

from typing import Any

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "GemmaForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"use_bidirectional_attention"}
DEFAULTS = {
    "max_position_embeddings": 8192,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "tie_word_embeddings": True,
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Gemma config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    # The first releases say "gelu" and mean its tanh approximation; transformers reads them so too.
    act = "gelu_tanh" if config.get("hidden_act") == "gelu" else hf.activation(config, "hidden_act", "gelu_new")
    return gemma_like(config, "gemma", activation=act)


def gemma_like(config: hf.HfConfig, family: str, **fields: Any) -> Architecture:
    """Returns the architecture of any Gemma config.json; `fields` replace what the config says.

    Raises:
      UserError: a setting is missing or not supported.
    """
    hf.only_setting(config, "mlp_bias", False)
    hf.only_setting(config, "use_bidirectional_attention", False)
    scale = hf.need_setting(config, "hidden_size") ** 0.5
    fields = {"embedding_scale": scale, "scale_rounded": True, **fields}
    return llama.llama_like(config, family, norm_offset=1.0, **fields)


tensors = llama.tensors
