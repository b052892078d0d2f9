"""Mixtures of experts: routes, grouped matmuls, both forms of files, padding. Parity is in test_models.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import folders_of, largest_difference, tokens_of, torch_model, unpacked_rows

from dpo_jax.errors import UserError
from dpo_jax.models import grouped
from dpo_jax.models.architecture import Mixture
from dpo_jax.models.experts import project_groups, route
from dpo_jax.models.huggingface.folder import load_folder, open_folder, save_folder
from dpo_jax.models.model import build_model

KINDS = ("mixtral", "olmoe", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, made when first asked for."""
    return folders_of({kind: (kind, {}) for kind in KINDS}, tmp_path_factory.mktemp)


@pytest.mark.parametrize(("renormalized", "weights"), [(False, (0.5, 0.3)), (True, (0.625, 0.375))])
def test_routes_by_hand(renormalized, weights):
    """The two largest of the softmax, as they are or divided by their sum 0.8."""
    probs = np.array([[0.2, 0.5, 0.3], [0.3, 0.2, 0.5]], np.float32)
    found = route(jnp.log(probs) + 7.0, Mixture(3, 2, renormalized))
    assert found.expert.tolist() == [[1, 2], [2, 0]]
    np.testing.assert_allclose(found.weight, [weights, weights], rtol=1e-6)
    np.testing.assert_allclose(found.probs, probs, rtol=1e-6)


@pytest.mark.parametrize("way", ["one block", "blocks of 2", "ragged_dot"])
def test_grouped_matmuls_equal_those_of_each_expert(way, monkeypatch):
    """Value and gradients, with an expert without rows, and rows of no expert, which are zero."""
    if way == "ragged_dot":  # the way of a TPU
        monkeypatch.setattr(grouped, "multiply_blocks", grouped._multiply_ragged)  # noqa: SLF001
        monkeypatch.setattr(grouped, "outer_blocks", grouped._outer_ragged)  # noqa: SLF001
    elif way == "blocks of 2":
        monkeypatch.setattr(grouped, "BLOCK", 2)
    rng, sizes = np.random.default_rng(0), jnp.array([3, 0, 4])
    x, kernel, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((9, 5), (3, 5, 2), (9, 2)))
    groups, ends = [slice(0, 3), slice(3, 3), slice(3, 7)], 7
    y, back = jax.vjp(lambda x, kernel: project_groups(x, kernel, sizes), x, kernel)
    dx, dkernel = back(g)
    for e, rows in enumerate(groups):
        np.testing.assert_allclose(y[rows], x[rows] @ kernel[e], atol=1e-5)
        np.testing.assert_allclose(dx[rows], g[rows] @ kernel[e].T, atol=1e-5)
        np.testing.assert_allclose(dkernel[e], x[rows].T @ g[rows], atol=1e-5)
    assert not y[ends:].any()
    assert not dx[ends:].any()


def test_a_kernels_gradient_is_not_rounded_to_the_compute_dtype():
    """256 products of 1 and 1 + 2^-7 sum to 258, which bfloat16 has, plus one of 2^-6, which it would lose."""
    x = jnp.ones((257, 1), jnp.bfloat16).at[256].set(2.0**-6)
    g = jnp.full((257, 1), 1 + 2.0**-7, jnp.bfloat16).at[256].set(1.0)
    kernel = jnp.ones((1, 1, 1), jnp.float32)
    _, back = jax.vjp(lambda kernel: project_groups(x, kernel, jnp.array([257])), kernel)
    assert back(g)[0].item() == 258 + 2.0**-6


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_of_a_file_are_read_and_the_form_of_all_programs_is_written(folders, kind, tmp_path):
    """transformers 5 has one tensor for all experts of a layer in memory, and may save it so."""
    torch_model(kind).save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = load_file(tmp_path / "fused/model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused
    _, config, params = load_folder(tmp_path / "fused")
    _, _, separate = load_folder(folders(kind))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, separate))
    save_folder(tmp_path / "out", params, config)
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", folders(kind)))
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)
    key = "num_local_experts" if kind == "mixtral" else "num_experts"  # as transformers 4.57 names it
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == (5 if kind == "olmoe" else 4)


def test_parts_of_lazy_experts_are_those_of_the_whole(folders, tmp_path):
    """As processes read their own blocks: by layer, by expert, by slices of any axis, of files in both forms."""
    torch_model("qwen3_moe").save_pretrained(tmp_path / "fused", save_original_format=False)
    for folder in (folders("qwen3_moe"), tmp_path / "fused"):
        lazy = open_folder(folder)[2]["layers"]["expert_gate"]["kernel"]
        whole = np.asarray(lazy)
        assert lazy.shape == whole.shape == (2, 4, 32, 24)
        every = slice(None)
        for index in (1, (1, slice(1, 3)), (every, slice(2, 4), slice(8, 16)), (slice(1, 2), every, slice(3))):
            assert np.array_equal(lazy[index], whole[index])
    separate = open_folder(folders("qwen3_moe"))[2]["layers"]["expert_up"]["kernel"]
    assert np.array_equal(separate[1, 2], np.asarray(separate)[1, 2])


def test_a_missing_expert_is_named(folders, tmp_path):
    from safetensors.numpy import save_file

    architecture, config, params = load_folder(folders("mixtral"))
    save_folder(tmp_path / "model", params, config)
    tensors = load_file(tmp_path / "model/model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight is missing"):
        open_folder(tmp_path / "model")
    assert architecture.mixture == Mixture(4, 2, True)


@pytest.mark.parametrize("remat", ["none", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dots", "full"))])
def test_padding_and_neighbors_change_no_token(folders, remat):
    """No capacity, no dropping: what a token's experts add does not depend on the other tokens of a batch."""
    architecture, _, params = load_folder(folders("qwen3_moe"))
    model = build_model(architecture, remat=remat)
    tokens = tokens_of(3, 12)
    whole = unpacked_rows(tokens)
    padded = tuple(jnp.pad(x[:1], ((0, 2), (0, 20))) for x in whole)

    def of(rows):
        def loss(p):
            hidden = model.hidden(p, *rows)[0, :12]
            return jnp.sin(hidden).sum(), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (grads, hidden), (alone_grads, alone) = of(whole), of(padded)
    np.testing.assert_allclose(hidden, alone, atol=2e-6)
    assert largest_difference(grads, alone_grads) < 2e-6
