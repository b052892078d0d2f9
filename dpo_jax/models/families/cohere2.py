"""Command R7B and Command A: attention and MLP side by side after one norm; positions in windows only."""

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama
from dpo_jax.models.families.tensor_map import Tensor, with_neighbors_apart

CLASS = "Cohere2ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"logit_scale", "sliding_window", "sliding_window_pattern", "layer_types"}
READS |= {"rotary_pct", "use_qk_norm"}
DEFAULTS = {"max_position_embeddings": 8192, "sliding_window": 4096, "tie_word_embeddings": True}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Cohere 2 config.json.

    Raises:
      UserError: a setting is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    only = {"mlp_bias": False, "use_qk_norm": False, "use_parallel_block": True, "rotary_pct": 1.0}
    for key, value in only.items():
        hf.only_setting(config, key, value)
    layers, every = hf.need_setting(config, "num_hidden_layers"), hf.get_setting(config, "sliding_window_pattern", 4)
    if every < 1:
        raise UserError(f"config.json: sliding_window_pattern = {every}: it must be at least 1")
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    windows = hf.layer_windows(config, layers, kinds)
    nope = tuple(not window for window in windows or (0,) * layers)
    return llama.llama_like(
        config,
        "cohere2",
        head_dim=hf.head_dim({}, *(hf.need_setting(config, key) for key in ("hidden_size", "num_attention_heads"))),
        norm="layer",
        norm_bias=False,
        eps=hf.get_setting(config, "layer_norm_eps", 1e-5),
        parallel=True,
        shared_norm=True,
        windows=windows,
        nope=nope if any(nope) else (),
        logit_scale=float(hf.get_setting(config, "logit_scale", 0.0625)),
    )


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    return with_neighbors_apart(llama.llama_tensors(a, {"attention_norm": "input_layernorm"}), a)
