"""Qwen3, mixtures of experts (30B-A3B, 235B-A22B): Qwen3 with eight of 128 experts for each token."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, qwen2

CLASS = "Qwen3MoeForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = qwen2.READS | {"num_experts", "num_local_experts"}
DEFAULTS = {**qwen2.DEFAULTS, "num_key_value_heads": 4, "num_experts_per_tok": 8}
DEFAULTS |= {"intermediate_size": 6144, "moe_intermediate_size": 768}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Qwen3-MoE config.json. `intermediate_size` is that of dense layers: there are none.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "mlp_bias", False)
    hf.only_setting(config, "decoder_sparse_step", 1)
    hf.only_setting(config, "mlp_only_layers", [])
    mixture = experts.mixture_settings(config, 128, hf.get_setting(config, "norm_topk_prob", False))
    fields = {"mlp": hf.need_setting(config, "moe_intermediate_size"), "windows": qwen2.qwen_windows(config)}
    return llama.llama_like(config, "qwen3_moe", qk_norm="head", mixture=mixture, **fields)


tensors, fused_tensors = experts.per_expert_tensors, experts.fused_expert_tensors
