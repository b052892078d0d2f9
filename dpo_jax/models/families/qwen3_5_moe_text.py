"""Qwen3.5's language model, mixtures of experts (35B-A3B to 397B-A17B): Qwen3.5 with eight of 256 experts or more."""

from collections.abc import Callable

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families import expert_tensors as experts
from dpo_jax.models.families import hf_config as hf
from dpo_jax.models.families import llama, qwen3_5_text, qwen3_next
from dpo_jax.models.families.tensor_map import Tensor

CLASS = "Qwen3_5MoeForCausalLM"
PREFIX, HEAD, BUFFERS, READS = llama.PREFIX, llama.HEAD, llama.BUFFERS, qwen3_next.READS
DEFAULTS = {**qwen3_next.DEFAULTS, "num_experts_per_tok": 8}


def architecture(config: hf.HfConfig) -> Architecture:
    """Returns the architecture of a Qwen3.5 config.json of model_type qwen3_5_moe_text.

    Raises:
      UserError: a setting is missing or not supported.
    """
    return qwen3_next.mixture_like({**DEFAULTS, **config}, "qwen3_5_moe_text", 256, True)


def _table(mixtures: Callable[[Architecture], dict[str, Tensor]]) -> Callable[[Architecture], dict[str, Tensor]]:
    """Returns the function of a table, from that of a mixture with Llama's attention."""

    def tensors_of(a: Architecture) -> dict[str, Tensor]:
        return qwen3_next.with_delta(qwen3_next.with_shared(mixtures(a), a), a, qwen3_5_text.separate_projections)

    return tensors_of


tensors, fused_tensors = _table(experts.per_expert_tensors), _table(experts.fused_expert_tensors)
