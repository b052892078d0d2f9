"""Gemma 4 with a mixture beside the MLP: text, adapters, recomputation, and experts sharded over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from test_routing import one_step
from test_sample import prompts_of, torch_greedy
from tiny import EOS, GEMMA4_MIXTURE, folder_of, largest_difference, load_torch, logits_of, tokens_of, unpacked_rows

from dpo_jax.models import lora
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import load_folder, open_folder, save_folder
from dpo_jax.models.model import build_model
from dpo_jax.sampling import generate

TARGETS = (lora.ALL, "experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of("gemma4_text", tmp_path_factory.mktemp("models") / "model", **GEMMA4_MIXTURE)


def test_greedy_text_is_that_of_transformers(folder):
    architecture, _, params = load_folder(folder)
    prompts = prompts_of(7, 1, 20)
    ours = generate(build_model(architecture), params, prompts, max_new_tokens=12, temperature=0, eos_id=EOS)
    for prompt, new in zip(prompts, ours, strict=True):
        assert new.tolist() == torch_greedy(folder, prompt, 12, EOS).tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT and transformers of each other
def test_adapters_of_experts_are_those_of_peft(folder, tmp_path):
    """The folder that we write, read by PEFT, and the merged folder have our logits; so have the adapters read back."""
    architecture, config, base = load_folder(folder)
    spec, tokens, rng = lora.Lora(3, 7.0, TARGETS), tokens_of(2, 20), np.random.default_rng(0)
    adapters = lora.init_adapters(architecture, spec, 0)
    for leaves in adapters["layers"].values():
        leaves["lora_b"] = rng.normal(size=leaves["lora_b"].shape).astype(np.float32) * 0.1
    model = build_model(architecture)
    run = jax.jit(lambda p: logits_of(model, p, tokens))
    ours = run(lora.attach_adapters(architecture, base, adapters, spec))
    assert np.abs(ours - run(base)).max() > 0.01
    peft_folder.save_adapters(tmp_path / "adapter", adapters, spec, architecture, "base")
    theirs = PeftModel.from_pretrained(load_torch(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(tokens).long()).logits, atol=1e-4)
    save_folder(tmp_path / "merged", lora.merge_adapters(architecture, open_folder(folder)[2], adapters, spec), config)
    np.testing.assert_allclose(run(load_folder(tmp_path / "merged")[2]), ours, atol=1e-4)
    read, found = peft_folder.load_adapters(tmp_path / "adapter", architecture)
    np.testing.assert_allclose(run(lora.attach_adapters(architecture, base, read, found)), ours, atol=1e-6)


@pytest.mark.slow
def test_recomputation_changes_no_gradient(folder):
    architecture, _, params = load_folder(folder)
    rows, grads = unpacked_rows(tokens_of(2, 40)), []
    for remat in ("none", "dots", "full"):
        model = build_model(architecture, remat=remat)
        grads.append(jax.jit(jax.grad(lambda p, m=model: jnp.sin(m.hidden(p, *rows)).sum()))(params))
    for found in grads[1:]:
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(grads[0]), strict=True):
            assert largest_difference(one, other) < 1e-5 * max(1.0, np.abs(other).max())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 4), (1, 2, 1, 1, 2)], ids=["expert 4", "fsdp 2 x expert 2"])
def test_a_step_with_experts_over_devices_is_that_of_one_device(folder, sizes):
    """Metrics and gradients; each device has the whole MLP beside its experts."""
    (expected, grads, _), (metrics, found, _) = (one_step(folder, n, rows=4) for n in ((1, 1, 1, 1, 1), sizes))
    for key in ("loss", "aux_loss", "grad_norm"):
        assert metrics[key] == pytest.approx(expected[key], rel=2e-6)
    assert largest_difference(found, grads) < 1e-5
