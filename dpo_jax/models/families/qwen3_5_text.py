"""Qwen3.5's language model, dense (0.8B to 27B): Qwen3-Next with one MLP, and a tensor for each kind of projection."""

from dpo_jax.models.architecture import Architecture, Delta
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, qwen3_next
from dpo_jax.models.families.qwen3_next import WHERE
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, linear

CLASS = "Qwen3_5ForCausalLM"
PREFIX, HEAD, BUFFERS = llama.PREFIX, llama.HEAD, llama.BUFFERS
READS = llama.READS | {"layer_types"}
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 256}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Qwen3.5 config.json of model_type qwen3_5_text. The three positions of images are
    one in texts.

    Raises:
      UserError: a setting is missing or not supported.
    """
    return qwen3_next.delta_like({**DEFAULTS, **config}, "qwen3_5_text")


def tensors(a: Architecture) -> dict[str, Tensor]:
    """Returns Hugging Face's tensors by name, with `{i}` for the layer."""
    return qwen3_next.with_delta(llama.tensors(a), a, separate_projections)


def separate_projections(d: Delta, width: int) -> dict[str, Tensor]:
    """Returns the projections of linear attention: queries, keys and values in a tensor, the others in one each."""
    parts = qwen3_next.delta_parts(d)
    mixed = (TensorPart(("layers", f"delta_{name}", "kernel"), 1, (part,)) for name, part in parts)
    sizes = {"z": ("gate", d.value_channels), "b": ("rate", d.value_heads), "a": ("decay", d.value_heads)}
    return {
        WHERE + "in_proj_qkv.weight": Tensor(((parts[-1][1].stop,), (width,)), tuple(mixed)),
        **{
            f"{WHERE}in_proj_{name}.weight": linear(("layers", f"delta_{ours}", "kernel"), (size,), (width,))
            for name, (ours, size) in sizes.items()
        },
    }
