"""Scales of embeddings and logits in bfloat16, as in transformers."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from tiny import folder_of, load_torch, logits_of, tokens_of, unpacked_rows

from dpo_jax.models.attention import RowMask
from dpo_jax.models.decoder import Decoder
from dpo_jax.models.decoder_layer import Context
from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.model import build_model


def test_multipliers_are_not_rounded_to_bfloat16(tmp_path):
    """Granite divides its logits by 2.5; 0.4 in bfloat16 is 0.4004, by which all logits would be too large."""
    architecture, _, params = load_folder(folder_of("granite", tmp_path))
    tokens = tokens_of(2, 40)
    models = (build_model(architecture, compute=compute) for compute in ("float32", "bfloat16"))
    whole, near = (np.asarray(jax.jit(partial(logits_of, model))(params, tokens)) for model in models)
    assert float((whole * near).sum() / (whole * whole).sum()) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "settings"), [("granite", {"embedding_multiplier": 3.3}), ("gemma", {}), ("gemma2", {})]
)
def test_embeddings_are_scaled_as_in_transformers_in_bfloat16(tmp_path, kind, settings):
    """Bit for bit: sqrt(32) is rounded to bfloat16 by Gemma; 3.3 by Granite is not, and would be 3.296875."""
    architecture, _, params = load_folder(folder_of(kind, tmp_path, **settings))
    tokens, found = tokens_of(2, 40), []
    theirs = load_torch(tmp_path).bfloat16()
    theirs.model.layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().numpy()))
    with torch.no_grad():
        theirs(torch.tensor(tokens).long())
    ids, positions, segment_ids, branch_ids = unpacked_rows(tokens)
    given = {"params": params}, ids, positions, Context(RowMask.of(segment_ids, branch_ids, positions))
    kept = Decoder(architecture, "bfloat16").apply(*given, capture_intermediates=lambda _, name: name == "_embed")
    (ours,) = kept[1]["intermediates"]["_embed"]
    np.testing.assert_array_equal(np.asarray(ours, np.float32), found[0])
