"""Mixtures of experts: routes, grouped matmuls, both forms of files, padding. Parity is in test_models.py."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from tiny import (
    GEMMA4_MIXTURE,
    folders_of,
    largest_difference,
    load_torch,
    logits_of,
    tokens_of,
    torch_model,
    unpacked_rows,
)

from dpo_jax.errors import UserError
from dpo_jax.models import grouped, lora, qlora
from dpo_jax.models.architecture import Mixture
from dpo_jax.models.experts import project_groups, route
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import load_folder, open_folder, save_folder
from dpo_jax.models.init import map_layers
from dpo_jax.models.model import build_model
from dpo_jax.training.roofline import matmul_weights

KINDS = ("mixtral", "olmoe", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, made when first asked for."""
    kinds = {kind: (kind, {}) for kind in (*KINDS, "gpt_oss", "granitemoe", "qwen3_next")}
    return folders_of(kinds | {"gemma4_text": ("gemma4_text", GEMMA4_MIXTURE)}, tmp_path_factory.mktemp)


@pytest.mark.parametrize(("renormalized", "weights"), [(False, (0.5, 0.3)), (True, (0.625, 0.375))])
def test_routes_by_hand(renormalized, weights):
    """The two largest of the softmax, as they are or divided by their sum 0.8."""
    probs = np.array([[0.2, 0.5, 0.3], [0.3, 0.2, 0.5]], np.float32)
    found = route(jnp.log(probs) + 7.0, Mixture(3, 2, renormalized))
    assert found.expert.tolist() == [[1, 2], [2, 0]]
    np.testing.assert_allclose(found.weight, [weights, weights], rtol=1e-6)
    np.testing.assert_allclose(found.probs, probs, rtol=1e-6)


@pytest.mark.parametrize("way", ["one block", "blocks of 2", "4 blocks of 2 at a time", "ragged_dot"])
def test_grouped_matmuls_equal_those_of_each_expert(way, monkeypatch):
    """Value and gradients, with an expert without rows, and rows of no expert, which are zero."""
    if way == "ragged_dot":  # the way of a TPU
        monkeypatch.setattr(grouped, "multiply_blocks", grouped._multiply_ragged)  # noqa: SLF001
        monkeypatch.setattr(grouped, "outer_blocks", grouped._outer_ragged)  # noqa: SLF001
    elif way != "one block":
        monkeypatch.setattr(grouped, "BLOCK", 2)
    if way.endswith("at a time"):  # the way of a GPU
        monkeypatch.setattr(grouped, "multiply_blocks", grouped.multiply_batches)
        monkeypatch.setattr(grouped, "outer_blocks", partial(grouped.outer_blocks, block=2))
        monkeypatch.setattr(grouped, "TOGETHER", 4)
    rng, sizes = np.random.default_rng(0), jnp.array([3, 0, 3])  # odd: a block of 2 goes beyond its group
    x, kernel, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((9, 5), (3, 5, 2), (9, 2)))
    groups, ends = [slice(0, 3), slice(3, 3), slice(3, 6)], 6
    y, back = jax.vjp(lambda x, kernel: project_groups(x, kernel, sizes), x, kernel)
    dx, dkernel = back(g)
    for e, rows in enumerate(groups):
        np.testing.assert_allclose(y[rows], x[rows] @ kernel[e], atol=1e-5)
        np.testing.assert_allclose(dx[rows], g[rows] @ kernel[e].T, atol=1e-5)
        np.testing.assert_allclose(dkernel[e], x[rows].T @ g[rows], atol=1e-5)
    assert not y[ends:].any()
    assert not dx[ends:].any()


def test_a_gpu_has_many_blocks_or_large_ones_in_an_iteration():
    """Read in the program that its compiler gets: an iteration there costs some launches, whatever it computes."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1024, 8), (4, 8, 16), (1024, 16))]
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def operands(function, *arrays):
        text = jax.jit(function).trace(*arrays, sizes).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"dot_general.*: \(tensor<([\dx]+)xbf16>, tensor<([\dx]+)xbf16>\)", text)

    assert operands(grouped.multiply_groups, *shapes[:2]) == [("32x128x8", "32x8x16")]
    assert operands(grouped.outer_groups, shapes[0], shapes[2]) == [("8x512", "512x16")]


def test_a_gpu_takes_the_rows_of_its_own_experts_only(monkeypatch):
    """Of 4,096 rows 131 are those of its experts, in 3 blocks: 2 iterations of 2, each of which reads 3 numbers."""
    sizes, reads, cut = jnp.array([130, 0, 1]), [], grouped._cut  # noqa: SLF001
    monkeypatch.setattr(grouped, "_cut", lambda *args: reads.append(args) or cut(*args))
    monkeypatch.setattr(grouped, "TOGETHER", 2)
    with jax.disable_jit():
        y = grouped.multiply_batches(jnp.ones((4096, 3)), jnp.ones((3, 3, 2)), sizes)
    assert len(reads) == 2 * 3
    assert y.sum() == 131 * 3 * 2


@pytest.mark.parametrize(("rows", "most"), [(1, 32), (8, 32), (4096, 160)])
def test_few_rows_have_few_blocks(rows, most):
    """A group with rows has a block of its own, and each 128 rows: min(128, N) + N / 128, up to a multiple of 32."""
    blocks = grouped._blocks_of(jnp.zeros(128, jnp.int32).at[3].set(rows), rows, min(grouped.BLOCK, rows))  # noqa: SLF001
    assert (len(blocks.group), blocks.count) == (most, -(-rows // grouped.BLOCK))


def test_a_kernels_gradient_is_not_rounded_to_the_compute_dtype():
    """127 products of 1 sum to 127, which bfloat16 has, plus one of 2^-6, which it would lose: in one block of rows."""
    x = jnp.ones((128, 1), jnp.bfloat16).at[127].set(2.0**-6)
    kernel = jnp.ones((1, 1, 1), jnp.float32)
    _, back = jax.vjp(lambda kernel: project_groups(x, kernel, jnp.array([128])), kernel)
    assert back(jnp.ones((128, 1), jnp.bfloat16))[0].item() == 127 + 2.0**-6


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


GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT and transformers of each other
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3_moe", (lora.ALL, GATE_UP, DOWN)),
        ("gpt_oss", (lora.ALL, GATE_UP, DOWN)),
        pytest.param("gemma4_text", (lora.ALL, GATE_UP, DOWN), marks=pytest.mark.slow),
        pytest.param("granitemoe", (lora.ALL, GATE_UP), marks=pytest.mark.slow),
        pytest.param("mixtral", ("q_proj", GATE_UP), marks=pytest.mark.slow),
        pytest.param("olmoe", (DOWN,), marks=pytest.mark.slow),
    ],
)
def test_adapters_of_experts_are_pefts_in_both_directions(folders, kind, targets, tmp_path):
    """Ours, PEFT's model of the folder that we write, and the merged folder have the same logits; so has its folder."""
    spec, tokens = lora.Lora(3, 7.0, targets), tokens_of(2, 20)
    architecture, config, base = load_folder(folders(kind))
    adapters, rng = lora.init_adapters(architecture, spec, 0), np.random.default_rng(0)
    for leaves in adapters["layers"].values():
        leaves["lora_b"] = rng.normal(size=leaves["lora_b"].shape).astype(np.float32) * 0.1
    model = build_model(architecture)
    run = jax.jit(lambda p: logits_of(model, p, tokens))
    ours = run(lora.attach_adapters(architecture, base, adapters, spec))
    assert np.abs(ours - run(base)).max() > 0.01
    peft_folder.save_adapters(tmp_path / "adapter", adapters, spec, architecture, "base")
    theirs = PeftModel.from_pretrained(load_torch(folders(kind)), tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4)
    merged = lora.merge_adapters(architecture, open_folder(folders(kind))[2], adapters, spec)
    save_folder(tmp_path / "merged", merged, config)
    np.testing.assert_allclose(run(load_folder(tmp_path / "merged")[2]), ours, atol=1e-4)
    own = [f"{name}_proj" for name in ("qkvo" if lora.ALL in targets else "q" * ("q_proj" in targets))]
    settings = {"target_modules": own}
    settings |= {"target_parameters": [t for t in targets if t in (GATE_UP, DOWN)]}
    torch.manual_seed(0)
    theirs = get_peft_model(load_torch(folders(kind)), LoraConfig(r=2, lora_alpha=5, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    read, spec = peft_folder.load_adapters(tmp_path / "theirs", architecture)
    ours = run(lora.attach_adapters(architecture, base, read, spec))
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4)


def test_all_linear_leaves_experts_and_routers_alone(folders):
    """They are parameters in transformers 5, and no linear modules. Adapters of experts have names for all axes."""
    architecture, _, _ = open_folder(folders("qwen3_moe"))
    names = lora.adapted_modules(architecture, (lora.ALL,))
    assert sorted(name.rpartition(".")[2] for name in names) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(UserError, match=r"'router' is no projection of a qwen3_moe; it has down_proj, embed_tokens, g"):
        lora.adapted_modules(architecture, ("router",))
    spec = lora.Lora(2, 2.0, (GATE_UP, DOWN))
    axes = lora.adapter_axes(architecture, build_model(architecture).axes, spec)["layers"]
    assert axes["expert_down"]["lora_a"] == ("layers", "experts", "mlp", "rank")
    assert axes["expert_gate_expert_up"]["lora_b"] == ("layers", "experts", "rank", None, None)
    shapes = jax.tree.map(np.shape, lora.init_adapters(architecture, spec, 0)["layers"])
    assert shapes["expert_gate_expert_up"] == {"lora_a": (2, 4, 32, 2), "lora_b": (2, 4, 2, 2, 24)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_that_of_its_dequantized_numbers(folders, kind, tmp_path):
    """Experts are quantized one by one, trained over, and written as floats."""
    pytest.importorskip("qwix")
    architecture, config, params = load_folder(folders("qwen3_moe"))
    base = qlora.quantize_base(params, architecture, kind, map_layers)
    leaves = base["layers"]["expert_up"]
    assert leaves["quantized"].shape == (2, 4, 32, 12 if kind == "nf4" else 24)
    assert leaves["scale"].shape == (2, 4, 1, 24)  # 32 inputs of an expert share a scale
    save_folder(tmp_path / "floats", qlora.as_floats(base), config)
    floats, model, tokens = load_folder(tmp_path / "floats")[2], build_model(architecture), tokens_of(2, 16)
    near = np.abs(floats["layers"]["expert_up"]["kernel"] - params["layers"]["expert_up"]["kernel"]).max()
    assert 0 < near < 0.2
    run = jax.jit(lambda p: logits_of(model, p, tokens))
    np.testing.assert_allclose(run(base), run(floats), atol=2e-5)


def test_a_shared_expert_is_quantized_but_for_its_gate(folders):
    """It has no adapters, but 4 bits a number, as all projections."""
    pytest.importorskip("qwix")
    architecture, _, params = load_folder(folders("qwen3_next"))
    layers = qlora.quantize_base(params, architecture, "nf4", map_layers)["layers"]
    for name, shape in (("shared_up", (4, 32, 10)), ("shared_gate", (4, 32, 10)), ("shared_down", (4, 20, 16))):
        assert layers[name]["quantized"].shape == shape
    assert layers["shared_weight"].keys() == {"kernel"}  # one number a token
    floats = {name for name, leaves in layers.items() if "kernel" in leaves}
    assert floats == {"shared_weight"}


def test_the_work_of_a_step_is_that_of_the_chosen_experts():
    """Qwen3-30B-A3B: 3.3 billion weights for a token, of 30.5 billion; the embedding is no matmul, the head is one."""
    from known_models import KNOWN

    config, count = KNOWN["Qwen3-30B-A3B"]
    a = architecture_of(config)
    norms = a.layers * (2 * a.width + 2 * a.head_dim) + a.width
    assert matmul_weights(a, a.mixture.experts) + 2 * a.vocab * a.width + norms == count
    assert matmul_weights(a) + 2 * a.vocab * a.width + norms == pytest.approx(3.35e9, rel=0.01)
    assert matmul_weights(a, a.mixture.experts) - matmul_weights(a) == 48 * 120 * 3 * 2048 * 768
