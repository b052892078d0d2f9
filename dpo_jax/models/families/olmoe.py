"""OLMoE (1B-7B): Llama with normalized queries and keys, and eight of 64 experts for each token."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "OlmoeForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"num_experts", "num_local_experts", "clip_qkv"}
DEFAULTS = {"max_position_embeddings": 4096, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5}
DEFAULTS |= {"intermediate_size": 2048}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of an OLMoE config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "mlp_bias", False)
    hf.only_setting(config, "clip_qkv", None)
    mixture = experts.mixture_settings(config, 64, hf.get_setting(config, "norm_topk_prob", False))
    return llama.llama_like(config, "olmoe", qk_norm="all", mixture=mixture)


tensors, fused_tensors = experts.per_expert_tensors, experts.fused_expert_tensors
