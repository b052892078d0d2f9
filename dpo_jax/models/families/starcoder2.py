"""StarCoder2 (3B to 15B): Llama with layer norms, biases, an MLP without gate, and a window in every layer."""

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor, renamed

CLASS = "Starcoder2ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"sliding_window"}
DEFAULTS = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "sliding_window": None, "use_bias": True}
DEFAULTS |= {"tie_word_embeddings": True, "initializer_range": 0.018042}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a StarCoder2 config.json. Dropout is always off.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    bias = hf.get_setting(config, "use_bias", True)
    for key in ("attention_bias", "mlp_bias"):
        hf.only_setting(config, key, bias)
    layers, windowed = hf.need_setting(config, "num_hidden_layers"), config["sliding_window"] is not None
    return llama.llama_like(
        config,
        "starcoder2",
        norm="layer",
        eps=hf.get_setting(config, "norm_epsilon", 1e-5),
        activation=hf.activation(config, "hidden_act", "gelu_pytorch_tanh"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=hf.layer_windows(config, layers, ["sliding_attention"] * layers if windowed else None),
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    return renamed(llama.tensors(a), {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})
