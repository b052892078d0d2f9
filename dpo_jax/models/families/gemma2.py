"""Gemma 2 (2B to 27B): Gemma with caps on scores and logits, norms on both sides, a window in every other layer."""

from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import gemma, llama
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families.tensor_map import Tensor

CLASS = "Gemma2ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = gemma.READS | {"query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping"}
READS |= {"attn_logit_softcapping"}
DEFAULTS = {
    **gemma.DEFAULTS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Gemma 2 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    return gemma2_like(config, "gemma2", every=2, score_cap=config["attn_logit_softcapping"])


def gemma2_like(config: hf.HfConfig, family: str, every: int, **fields: Any) -> Architecture:
    """Returns the architecture of a Gemma 2 or 3 config.json; `fields` replace what the config says.

    By default every `every`-th layer has full attention, and the others a window.

    Raises:
      UserError: a setting is missing or not supported.
    """
    layers = hf.need_setting(config, "num_hidden_layers")
    if every < 1:
        raise UserError(f"config.json: sliding_window_pattern = {every}: it must be at least 1")
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    windows = hf.layer_windows(config, layers, kinds)
    if not windows:  # all layers have full attention, and its angles
        fields.pop("window_rope", None)
    return gemma.gemma_like(
        config,
        family,
        activation=hf.activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        post_norm=True,
        windows=windows,
        score_scale=hf.need_setting(config, "query_pre_attn_scalar") ** -0.5,
        logit_cap=config["final_logit_softcapping"],
        **fields,
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    return llama.llama_tensors(a, NORMS)
