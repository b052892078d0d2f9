"""Folders of models that read images too: their language model is read, and exported alone."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import load_torch, logits_of, tokens_of

from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import load_folder, read_config, save_folder
from dpo_jax.models.model import build_model


@pytest.mark.parametrize("older", [False, True], ids=["transformers 5", "transformers 4"])
def test_the_language_model_of_a_gemma_3_with_images_is_read(tmp_path, caplog, older):
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    caplog.set_level("INFO", "dpo_jax")
    kinds = [*["sliding_attention"] * 2, "full_attention"]
    text = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "vocab_size": 128, "layer_types": kinds}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    marks = {"image_token_index": 127, "boi_token_index": 125, "eoi_token_index": 126, "eos_token_id": [1, 106]}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **marks)
    config._attn_implementation = "eager"  # noqa: SLF001 (the only way before the model is made)
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path / "in")
    if older:
        names = {"model.language_model.": "language_model.model.", "model.": ""}
        tensors = load_file(tmp_path / "in/model.safetensors")
        for old, new in names.items():
            tensors = {k.replace(old, new, 1) if k.startswith(old) else k: v for k, v in tensors.items()}
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
        save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    architecture, hf_config, params = load_folder(tmp_path / "in")
    assert "a gemma3, which reads images; its language model, a gemma3_text, is used alone" in caplog.text
    tokens = tokens_of(2, 20, vocab=120)
    ours = jax.jit(lambda p: logits_of(build_model(architecture), p, tokens))(params)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    save_folder(tmp_path / "out", params, hf_config)
    with torch.no_grad():
        exported = load_torch(tmp_path / "out")(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(exported, expected, atol=1e-4)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == ("gemma3_text", [1, 106])
    assert written["architectures"] == ["Gemma3ForCausalLM"]


def test_a_model_with_images_and_without_a_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(UserError, match=r"config\.json: text_config is missing; a gemma3 has its language model there"):
        read_config(tmp_path)
