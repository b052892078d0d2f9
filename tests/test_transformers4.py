"""What we write, read by transformers 4.57, which vLLM and others still use: the logits of every family it knows."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import FAMILIES, folder_of, logits_of, tokens_of

from dpo_jax.models.huggingface.folder import load_folder, save_folder
from dpo_jax.models.model import build_model

PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0")
# Families that came with version 5, or have never been part of transformers.
NEWER = {"gemma4_text", "internlm3", "ministral3", "qwen3_5_moe_text", "qwen3_5_text"}
READ = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__ == "4.57.6"
tokens, found = torch.tensor(json.loads(sys.argv[1])), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found[folder] = model(tokens).logits.tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A folder with transformers 4.57, to stand before the installed one."""
    folder = tmp_path_factory.mktemp("older")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1:]}")
    return folder


@pytest.mark.slow
@pytest.mark.milestone
def test_exports_of_every_family_have_the_same_logits_in_version_4(older, tmp_path):
    kinds, tokens = sorted(set(FAMILIES) - NEWER), tokens_of(2, 12)
    ours = {}
    for kind in kinds:
        architecture, config, params = load_folder(folder_of(kind, tmp_path / "source" / kind))
        save_folder(tmp_path / kind, params, config)
        ours[kind] = jax.jit(lambda p, a=architecture: logits_of(build_model(a), p, tokens))(params)
    arguments = [json.dumps(tokens.tolist()), *(str(tmp_path / kind) for kind in kinds)]
    env = os.environ | {"PYTHONPATH": str(older)}
    done = subprocess.run(
        [sys.executable, "-c", READ, *arguments], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    for kind in kinds:
        np.testing.assert_allclose(theirs[str(tmp_path / kind)], ours[kind], atol=1e-5, err_msg=kind)
