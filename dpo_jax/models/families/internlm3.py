"""InternLM3 (8B): Llama whose angles, beyond the context of pretraining, would change with the length of the text."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama

CLASS = "LlamaForCausalLM"  # transformers has no other for it
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"qkv_bias"}
DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of an InternLM3 config.json, which names biases `qkv_bias` and `bias`.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    names = {"attention_bias": "qkv_bias", "mlp_bias": "bias"}
    biases = {new: config.get(old, config.get(new)) for new, old in names.items()}
    if bool(biases["attention_bias"]) != bool(biases["mlp_bias"]):
        raise UserError("config.json: qkv_bias and bias differ, which is not supported; make them equal")
    return llama.llama_like({**config, **biases}, "internlm3")


tensors = llama.tensors
