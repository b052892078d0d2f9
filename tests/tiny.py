"""Tiny random models of each family, made by transformers and saved as it saves them."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models.attention import capped

SHARED = Path(os.environ.get("DPO_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))
WINDOW = 8  # tokens, fewer than any sequence in the tests
VOCAB = 128
EOS = 2

_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0, "initializer_range": 0.2}
_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 256}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_MIXTURE = {**_LLAMA, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}
# Head dimensions that are not D / H, and a score scale that is not d ** -0.5.
_GEMMA = {**_LLAMA, "head_dim": 16}
_GEMMA2 = {**_GEMMA, "query_pre_attn_scalar": 10, "sliding_window": WINDOW}
# Unlike heads in full attention, of which a part is rotated.
_GEMMA4 = {**_GEMMA, "global_head_dim": 24, "sliding_window": WINDOW, "hidden_size_per_layer_input": 8}
_GEMMA4 |= {"vocab_size_per_layer_input": VOCAB, "use_double_wide_mlp": True, "final_logit_softcapping": 3.0}
# Ministral 3's, with a context of pretraining that most sequences in the tests exceed.
_GROWING = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_GROWING |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
# Sizes that differ from each other, and rotary positions of a part of a head.
_LINEAR = {**_LLAMA, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "full_attention_interval": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_EXPERTS |= {"shared_expert_intermediate_size": 20}
# A dense layer before the others; two of four groups, of two experts each; an inner width for each kind of MLP.
_CORRECTED = {"first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4}
_CORRECTED |= {"topk_group": 2, "moe_intermediate_size": 20, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
# Values that are shorter than keys, and YaRN that scales both rotary positions and scores.
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 18, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
_LATENT["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 1.0}
_LATENT["rope_parameters"] |= {"original_max_position_embeddings": 16, "mscale_all_dim": 0.8}
_MIXED = ["sliding_attention", "full_attention"]
_GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.5}
_ARGUMENTS = {
    # Slopes of four heads and of two between them.
    "bloom": {"hidden_size": 36, "n_head": 6, "n_layer": 2},
    "cohere2": {**_LLAMA, "sliding_window": WINDOW, "layer_types": _MIXED, "logit_scale": 0.4},
    "deepseek_v3": {**_LLAMA, **_CORRECTED, **_LATENT, "num_hidden_layers": 3, "num_key_value_heads": 4},
    "exaone4": {**_LLAMA, "head_dim": 16, "sliding_window": WINDOW, "layer_types": _MIXED},
    "falcon": {**_SIZES, "num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA2, "num_hidden_layers": 3, "layer_types": [*["sliding_attention"] * 2, "full_attention"]},
    # All kinds of layers: the last two read the keys and values of the two before them, and of no others.
    "gemma4_text": {**_GEMMA4, "num_hidden_layers": 6, "layer_types": _MIXED * 3, "num_kv_shared_layers": 2},
    "glm4": _GEMMA,
    "glm4_moe": {**_GEMMA, **_CORRECTED, "num_hidden_layers": 3, "use_qk_norm": True, "attention_bias": True},
    "gpt2": _GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
        "max_position_embeddings": 256,
    },
    "gpt_neox": {**_SIZES, "num_attention_heads": 2, "intermediate_size": 48, "rotary_pct": 0.25},
    "gpt_oss": {**_MIXTURE, "num_local_experts": 4, "head_dim": 16, "sliding_window": WINDOW, "rope_parameters": _YARN},
    "gptj": {**_GPT2, "n_head": 2, "rotary_dim": 8},
    "granite": {**_LLAMA, **_GRANITE},
    "granitemoe": {**_MIXTURE, **_GRANITE, "num_local_experts": 5},
    "internlm3": {**_LLAMA, "head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 6.0}},
    "llama": _LLAMA,
    "ministral3": {**_GEMMA, "rope_parameters": _GROWING},
    "mistral": {**_LLAMA, "sliding_window": WINDOW},
    "mixtral": {**_MIXTURE, "num_local_experts": 4},
    "olmo2": _LLAMA,
    "olmo3": {**_LLAMA, "sliding_window": WINDOW, "layer_types": _MIXED},
    "olmoe": {**_MIXTURE, "num_experts": 5},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {**_LLAMA, "intermediate_size": 40},
    "phi3": {**_LLAMA, "sliding_window": WINDOW},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "qwen3_5_moe_text": {**_LINEAR, **_EXPERTS, "num_experts": 5},
    # Smaller weights than the others', as those of qwen3_next: such layers would grow a rounding error by a hundred.
    "qwen3_5_text": {**_LINEAR, "num_hidden_layers": 3, "full_attention_interval": 3, "initializer_range": 0.1},
    "qwen3_moe": {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_next": {**_LINEAR, **_EXPERTS, "num_hidden_layers": 4, "initializer_range": 0.1},
    "seed_oss": {**_LLAMA, "head_dim": 16},
    "smollm3": {**_LLAMA, "no_rope_layers": [1, 0]},
    "stablelm": {**_LLAMA, "partial_rotary_factor": 0.5},
    "starcoder2": {**_LLAMA, "sliding_window": WINDOW},
}
FAMILIES = tuple(_ARGUMENTS)
# Settings of a gemma4_text whose layers have a mixture beside the MLP.
GEMMA4_MIXTURE = {"num_kv_shared_layers": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
GEMMA4_MIXTURE |= {"moe_intermediate_size": 24, "num_hidden_layers": 2, "layer_types": None}
# Families made of the options of others. The default suite compares their logits and gradients with transformers';
# packing, decoding, sampling and adapters have these marks for them.
PLAIN = ("cohere2", "falcon", "glm4", "granite", "internlm3", "olmo3", "phi", "seed_oss", "smollm3", "stablelm")
MILESTONE = (pytest.mark.slow, pytest.mark.milestone)  # `.ci/run` leaves the case out
COMPOSED = dict.fromkeys((*PLAIN, "starcoder2"), MILESTONE)
COMPOSED |= dict.fromkeys(("granitemoe", "qwen3_5_moe_text", "qwen3_next", "glm4_moe"), (pytest.mark.slow,))


def for_milestones(cases, *kept):
    """Returns the cases of a slow test, of which `.ci/run` leaves out all but those kept."""
    assert all(case in [*cases] for case in kept), kept
    values = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [case if case in kept else pytest.param(*value, marks=pytest.mark.milestone) for case, value in values]


def torch_model(family: str, **settings):
    """Returns a random torch model whose norms and biases are random too; dropout is off."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_IDS, **_ARGUMENTS[family], **settings})
    if family == "opt":
        config.init_std = config.initializer_range
    config._attn_implementation = "eager"  # noqa: SLF001 (the only way before the model is made)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # They store the scale of a norm minus 1.
    centered = family.startswith(("gemma", "qwen3_5", "qwen3_next")) and family != "gemma4_text"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith("bias"):
                p.copy_(torch.randn_like(p) * 0.2 + ("bias" not in name and not centered))
            if name.endswith("linear_attn.norm.weight"):
                p.add_(1)
            if family == "gemma4_text" and ("q_norm" in name or "post_" in name):
                p.mul_(0.1)  # scores are not divided by the root of d; large branches would grow a rounding error
            if name.endswith("A_log"):  # a state that lasts for some tens of tokens
                p.sub_(3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
            if name.endswith("layer_scalar"):
                buffer.copy_(torch.randn_like(buffer) * 0.2 + 1)
    return model


def folder_of(family: str, folder: Path, **settings) -> Path:
    """Saves a random torch model and returns its folder."""
    torch_model(family, **settings).save_pretrained(folder)
    return folder


def folders_of(cases, make_folder):
    """Returns `case -> model folder`, each created on first use; cases are name -> (family, settings)."""
    made = {}

    def get(case):
        if case not in made:
            family, settings = cases[case]
            made[case] = folder_of(family, make_folder("models") / case.replace(" ", "-"), **settings)
        return made[case]

    return get


def load_torch(folder: Path):
    """Returns transformers' float32 model of a folder, and asserts that the file fits it exactly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # By its eager attention, transformers adds the biases of a Falcon with ALiBi twice, by its default once.
    attention = "sdpa" if getattr(AutoConfig.from_pretrained(folder), "alibi", False) else "eager"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tokens_of(rows: int, length: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    """Returns random ids int32[rows, length]."""
    return np.random.default_rng(seed).integers(3, vocab, (rows, length)).astype(np.int32)


def unpacked_rows(tokens):
    """Returns tokens, positions, segment ids and branch ids of rows with one sequence each."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return tokens, positions, jnp.ones_like(tokens), jnp.zeros_like(tokens)


def logits_of(model, params, tokens):
    """Returns float32 logits [R, T, V] of rows with one sequence each."""
    hidden, head = model.hidden(params, *unpacked_rows(tokens)), model.head(params)
    logits = jnp.einsum("rtd,vd->rtv", hidden, head.astype(hidden.dtype), preferred_element_type="float32")
    return capped(logits, model.architecture.logit_cap)


def largest_difference(ours, theirs) -> float:
    """Returns the largest absolute difference of two trees, each relative to its array's largest value above 1."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        return np.abs(a - b).max() / max(1.0, np.abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(one, ours, theirs)))


def shared_model(name: str) -> Path:
    """Returns a real model's folder, or skips the test if the shared data is missing."""
    if not SHARED.exists():
        pytest.skip(f"the shared data is not at {SHARED}; set DPO_JAX_SHARED")
    return SHARED / "models" / name
