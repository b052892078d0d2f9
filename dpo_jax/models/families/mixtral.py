"""Mixtral (8x7B, 8x22B): Mistral with two of eight experts for each token."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, mistral
from dpo_jax.models.families.tensor_map import Tensor

CLASS = "MixtralForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = mistral.READS | {"num_experts", "num_local_experts"}
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": None}
DEFAULTS |= {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
NAMES = {"expert_gate": "w1", "expert_up": "w3", "expert_down": "w2"}  # ours -> name in the file


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Mixtral config.json; `sliding_window: null` means none.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "attention_bias", False)
    hf.only_setting(config, "mlp_bias", False)
    hf.only_setting(config, "layer_types", None)
    hf.only_setting(config, "router_jitter_noise", 0.0)
    layers = hf.need_setting(config, "num_hidden_layers")
    kinds = None if config["sliding_window"] is None else ["sliding_attention"] * layers
    mixture = experts.mixture_settings(config, 8, True)
    windows = hf.layer_windows(config, layers, kinds)
    return llama.llama_like(config, "mixtral", windows=windows, mixture=mixture)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer and `{e}` for the expert."""
    return experts.per_expert_tensors(a, "block_sparse_moe", NAMES)


fused_tensors = experts.fused_expert_tensors
