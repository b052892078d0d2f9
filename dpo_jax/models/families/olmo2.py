"""OLMo 2 (1B to 32B): Llama with norms after attention and MLP, not before, and over all heads of queries and keys."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor

CLASS = "Olmo2ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS
DEFAULTS = {"rms_norm_eps": 1e-5}
NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of an OLMo 2 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "mlp_bias", False)
    return llama.llama_like(config, "olmo2", qk_norm="all", pre_norm=False, post_norm=True)


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    return llama.llama_tensors(a, NORMS)
