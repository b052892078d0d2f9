"""StableLM (3B, 1.6B, Zephyr): Llama with layer norms, a quarter of a head rotated."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor

CLASS = "StableLmForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"use_qkv_bias", "qk_layernorm", "use_parallel_residual"}
DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 4096}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a StableLM config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    hf.only_setting(config, "qk_layernorm", False)
    for key in ("attention_bias", "mlp_bias"):
        hf.only_setting(config, key, False)
    width, heads = hf.need_setting(config, "hidden_size"), hf.need_setting(config, "num_attention_heads")
    parallel = hf.get_setting(config, "use_parallel_residual", False)
    return llama.llama_like(
        config,
        "stablelm",
        norm="layer",
        eps=hf.get_setting(config, "layer_norm_eps", 1e-5),
        rope=hf.rope_from_config(config, hf.head_dim({}, width, heads), part=("partial_rotary_factor", 0.25)),
        head_dim=hf.head_dim({}, width, heads),
        qkv_bias=hf.get_setting(config, "use_qkv_bias", False),
        parallel=parallel,
        shared_norm=parallel,
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    norms = {"attention_norm": "input_layernorm"} if a.shared_norm else llama.NORMS
    return llama.llama_tensors(a, norms)
