"""Granite (3.0 to 4.0, dense): Llama with multipliers of embeddings, scores, residuals and logits."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "GraniteForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Granite config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    return llama.llama_like(
        config,
        "granite",
        embedding_scale=float(hf.get_setting(config, "embedding_multiplier", 1.0)),
        score_scale=float(hf.get_setting(config, "attention_multiplier", 1.0)),
        residual_multiplier=float(hf.get_setting(config, "residual_multiplier", 1.0)),
        logit_scale=1 / float(hf.get_setting(config, "logits_scaling", 1.0)),
    )


tensors = llama.tensors
