"""Gemma 4 with a mixture beside the MLP: text, recomputation, and experts sharded over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_routing import one_step
from test_sample import prompts_of, torch_greedy
from tiny import EOS, GEMMA4_MIXTURE, folder_of, largest_difference, tokens_of, unpacked_rows

from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.model import build_model
from dpo_jax.sampling import generate


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
@pytest.mark.parametrize(
    "sizes", [pytest.param((1, 1, 1, 1, 4), marks=pytest.mark.milestone), (1, 2, 1, 1, 2)], ids=str
)
def test_a_step_with_experts_over_devices_is_that_of_one_device(folder, sizes):
    """Metrics and gradients; each device has the whole MLP beside its experts."""
    (expected, grads, _), (metrics, found, _) = (one_step(folder, n, rows=4) for n in ((1, 1, 1, 1, 1), sizes))
    for key in ("loss", "aux_loss", "grad_norm"):
        assert metrics[key] == pytest.approx(expected[key], rel=2e-6)
    assert largest_difference(found, grads) < 1e-5
