"""Seed-OSS (36B): Llama with biases of queries, keys and values."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "SeedOssForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS
DEFAULTS = {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "max_position_embeddings": 524288}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Seed-OSS config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    return llama.llama_like(config, "seed_oss", out_bias=hf.get_setting(config, "attention_out_bias", False))


tensors = llama.tensors
