"""A family in a file of the user's, `model.family: module:function`: the example of dpo_jax/models/README.md."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import load_torch, logits_of, tokens_of
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.models import lora
from dpo_jax.models.families.registry import family
from dpo_jax.models.huggingface.folder import load_folder, open_folder, save_folder
from dpo_jax.models.model import build_model
from dpo_jax.training.run_folder import function_hashes

OWN = "my_ernie:architecture"
SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.2, "use_bias": True, "max_position_embeddings": 256}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model of transformers beside the file of the example, in the working directory."""
    import torch

    page = (Path(__file__).parent.parent / "dpo_jax/models/README.md").read_text()
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "# my_ernie.py" in text]
    (tmp_path / "my_ernie.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("ernie4_5", **SIZES))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    model.save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    sys.modules.pop("my_ernie")


def test_a_family_of_the_user_equals_transformers(folder):
    import torch

    tokens = tokens_of(2, 40)
    with pytest.raises(UserError, match=r"'ernie4_5' is a family that is not supported; .*; for one of your own"):
        open_folder(folder)
    architecture, config, params = load_folder(folder, OWN)
    assert (architecture.family, architecture.qkv_bias, architecture.rope.theta) == (OWN, True, 500000.0)
    with torch.no_grad():
        theirs = load_torch(folder)(torch.tensor(tokens).long()).logits.numpy()
    model = build_model(architecture)
    np.testing.assert_allclose(jax.jit(lambda p: logits_of(model, p, tokens))(params), theirs, atol=1e-4)
    save_folder(folder.parent / "out", params, config)
    with torch.no_grad():
        again = load_torch(folder.parent / "out")(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_array_equal(again, theirs)
    written = json.loads((folder.parent / "out/config.json").read_text())
    assert written["architectures"] == ["Ernie4_5ForCausalLM"]
    assert not [key for key in written if key.startswith("_family")]
    assert "model.layers.{i}.self_attn.q_proj" in lora.adapted_modules(architecture, ("all-linear",))


def test_a_run_notes_the_function_and_names_what_is_missing(folder, tmp_path):
    config = parse_config(Config, None, ["--model.path", str(folder), "--model.family", OWN], prog="p")
    assert f"model family {OWN}" in function_hashes(config)
    (tmp_path / "less.py").write_text("def architecture(config):\n    pass\n")
    with pytest.raises(UserError, match=r"model\.family: the module of 'less:architecture' defines no CLASS; add it"):
        family("less:architecture")
    with pytest.raises(UserError, match=r"model\.family: cannot import 'none'"):
        family("none:architecture")
