"""Tiny random models of each family, made by transformers and saved as it saves them."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHARED = Path(os.environ.get("DPO_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FAMILIES = ("gpt2", "gpt_neox", "llama")
VOCAB = 128
EOS = 2

_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "initializer_range": 0.2}
_ARGUMENTS = {
    "llama": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "rotary_pct": 0.25,
    },
}


def torch_model(family: str, **settings):
    """Returns a random torch model whose norms and biases are random too; dropout is off."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_IDS, **_ARGUMENTS[family], **settings})
    config._attn_implementation = "eager"  # noqa: SLF001 (the only way before the model is made)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.2 + ("bias" not in name))
    return model


def folder_of(family: str, folder: Path, **settings) -> Path:
    """Saves a random torch model and returns its folder."""
    torch_model(family, **settings).save_pretrained(folder)
    return folder


def folders_of(cases, make_folder):
    """Returns `case -> model folder`, each made when first asked for; cases are name -> (family, settings)."""
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
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tokens_of(rows: int, length: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    """Returns random ids int32[rows, length]."""
    return np.random.default_rng(seed).integers(3, vocab, (rows, length)).astype(np.int32)


def whole_rows(tokens):
    """Returns tokens, positions, group and branch of rows that are one sequence each."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return tokens, positions, jnp.ones_like(tokens), jnp.zeros_like(tokens)


def logits_of(model, params, tokens):
    """Returns float32 logits [R, T, V] of whole rows."""
    hidden = model.hidden(params, *whole_rows(tokens))
    return jnp.einsum("rtd,vd->rtv", hidden, model.head(params).astype(hidden.dtype), preferred_element_type="float32")


def largest_difference(ours, theirs) -> float:
    """Returns the largest absolute difference of two trees, each relative to its array's largest value above 1."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        return np.abs(a - b).max() / max(1.0, np.abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(one, ours, theirs)))


def shared_model(name: str) -> Path:
    """Returns a real model's folder, or skips the test where the shared data is not at hand."""
    if not SHARED.exists():
        pytest.skip(f"the shared data is not at {SHARED}; set DPO_JAX_SHARED")
    return SHARED / "models" / name
