"""Qwen3, dense (0.6B to 32B): Llama with queries and keys normalized head by head."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, qwen2

CLASS = "Qwen3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = qwen2.READS
DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Qwen3 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "mlp_bias", False)
    return llama.llama_like(config, "qwen3", qk_norm="head", windows=qwen2.qwen_windows(config))


tensors = llama.tensors
