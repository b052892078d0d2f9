"""Phi-3 and Phi-4 of 4k to 16k tokens: Llama with fused projections, a rotated part of each head, maybe a window."""

from dpo_jax.models import architecture as arch
from dpo_jax.models import llama
from dpo_jax.models.architecture import Architecture, Config
from dpo_jax.models.layout import Part, Tensor

CLASS = "Phi3ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None}


def architecture(config: Config) -> Architecture:
    """Returns what a Phi-3 config.json describes. The models of 128k tokens, with "longrope", are not supported.

    Raises:
      UserError: a setting that is missing or not supported.
    """
    config = {**DEFAULTS, **config}
    for key in ("attention_bias", "mlp_bias"):
        arch.only(config, key, False)
    arch.only(config, "layer_types", None)
    layers = arch.need(config, "num_hidden_layers")
    kinds = None if config["sliding_window"] is None else ["sliding_attention"] * layers
    dim = arch.head_dim(config, arch.need(config, "hidden_size"), arch.need(config, "num_attention_heads"))
    rope = arch.rope(config, dim, part=("partial_rotary_factor", 1.0))
    return llama.like(config, "phi3", rope=rope, windows=arch.windows(config, layers, kinds))


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, `{i}` standing for the layer."""
    apart = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    table = {k: v for k, v in llama.tensors(a).items() if not any(name in k for name in apart)}
    ends = (0, a.heads, a.heads + a.kv_heads, a.heads + 2 * a.kv_heads)
    qkv = (Part(("layers", name, "kernel"), 1, (slice(*ends[i : i + 2]),)) for i, name in enumerate("qkv"))
    up = (Part(("layers", name, "kernel"), 1, (i,)) for i, name in enumerate(("gate", "up")))
    table["model.layers.{i}.self_attn.qkv_proj.weight"] = Tensor(((ends[-1], a.head_dim), (a.width,)), tuple(qkv))
    table["model.layers.{i}.mlp.gate_up_proj.weight"] = Tensor(((2, a.mlp), (a.width,)), tuple(up))
    return table
