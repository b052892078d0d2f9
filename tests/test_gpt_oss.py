"""GPT-OSS: attention sinks in every way that attends, the clamped activation, MXFP4. Parity is in test_models.py."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_attention import PLAIN, H, K, inputs, layout, visible
from test_kernels import PLAIN_MODEL
from tiny import folder_of, load_torch, logits_of, tokens_of, torch_model

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.models import qlora
from dpo_jax.models.attention import packed_attention
from dpo_jax.models.blocks import block_attention
from dpo_jax.models.experts import project_groups
from dpo_jax.models.huggingface.folder import load_folder, open_folder, save_folder
from dpo_jax.models.huggingface.mxfp4 import Unpacked
from dpo_jax.models.init import map_layers
from dpo_jax.models.layers import activate
from dpo_jax.models.model import build_model
from dpo_jax.training import attention_check
from dpo_jax.training.attention_check import kernel_mismatch

SINKS = jnp.linspace(-2.0, 3.0, H)


def dense(q, k, v, sinks, seen):
    """Textbook attention with a column of sinks, which is dropped after the softmax."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    scores = jnp.where(seen[:, None], jnp.einsum("rqhd,rkhd->rhqk", q, k) * PLAIN.scale, -jnp.inf)
    column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
    p = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("rhqk,rkhd->rqhd", p, v)


def with_gradients(attend, given):
    q, k, v, g = given
    return jax.jit(lambda *x: (attend(*x), *jax.vjp(attend, *x)[1](g)))(q, k, v, SINKS)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    "way", [partial(packed_attention, chunk=32), partial(block_attention, block=15)], ids=["chunks", "blocks"]
)
def test_a_sink_is_a_key_of_value_0_that_all_see(way, window):
    """The output, and the gradients of queries, keys, values and sinks. `flash` has its own test."""
    rows = layout(window)
    found = with_gradients(lambda q, k, v, sinks: way(q, k, v, rows, PLAIN, sinks), inputs())
    theirs = with_gradients(partial(dense, seen=visible(rows)), inputs())
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_each_device_has_the_sinks_of_its_heads():
    mesh, rows, seen = sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2]), layout(), []

    def attend(q, k, v, mask, scoring, sinks):
        seen.append((q.shape[2], sinks.shape))
        return packed_attention(q, k, v, mask, scoring, sinks)

    split = sharding.shard_heads(mesh, attend)
    found, theirs = (with_gradients(lambda *x, f=f: f(*x[:3], rows, PLAIN, x[3]), inputs()) for f in (split, attend))
    assert seen[0] == (H // 2, (H // 2,))
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def _without(q, k, v, rows, scoring, sinks):
    return packed_attention(q, k, v, rows, scoring, sinks - 30)


def _untaught(q, k, v, rows, scoring, sinks):
    return packed_attention(q, k, v, rows, scoring, jax.lax.stop_gradient(sinks))


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (packed_attention, ""),
        (_without, "relative error of the output"),
        (_untaught, "relative error of the gradient of sinks 1.0e+00"),
    ],
)
def test_a_kernel_is_used_only_if_it_has_the_sinks(attend, message):
    why = kernel_mismatch(attend, dataclasses.replace(PLAIN_MODEL, sinks=True), "float32")
    assert message in why
    assert bool(why) == bool(message)


def test_a_case_without_the_sinks_of_the_model_is_no_pass(monkeypatch):
    """Then the gradient of the sinks would be compared with nothing."""
    case = attention_check.attention_case
    monkeypatch.setattr(attention_check, "attention_case", lambda *x: (case(*x)[0][:4], case(*x)[1]))
    with pytest.raises(ValueError, match="zip"):
        kernel_mismatch(packed_attention, dataclasses.replace(PLAIN_MODEL, sinks=True), "float32")


@pytest.mark.parametrize(("name", "platform"), [("splash", "tpu"), ("cudnn", "gpu")])
def test_kernels_without_sinks_are_neither_planned_nor_tried(name, platform, monkeypatch):
    """A plan for another device says so too, before anything is compiled for it."""
    model = build_model(dataclasses.replace(PLAIN_MODEL, sinks=True))
    mesh, refusal = sharding.make_mesh(-1, 1, 1), f"model.attention: {name} cannot add attention sinks, which"
    with pytest.raises(UserError, match=refusal):
        attention_check.planned_attention(model, name, "bfloat16", mesh, platform)
    assert (
        attention_check.planned_attention(model, "auto", "bfloat16", mesh, platform, {"flash": "no", "blocks": "no"})[0]
        is model
    )
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    with pytest.raises(UserError, match=refusal):
        attention_check.with_attention(model, name, "bfloat16")


def test_the_clamped_activation_by_hand():
    """gate sigmoid(1.702 gate) (up + 1), gate at most 7 and up between -7 and 7; nothing passes back beyond."""
    gate, up = np.array([0.5, 9.0, -9.0, 2.0, 2.0]), np.array([1.0, 2.0, 2.0, 8.0, -8.0])
    low, kept = np.minimum(gate, 7), np.clip(up, -7, 7)
    sigmoid = 1 / (1 + np.exp(-1.702 * low))
    slope = sigmoid + 1.702 * low * sigmoid * (1 - sigmoid)
    y, back = jax.vjp(
        lambda up, gate: activate(up, gate, "clamped"), *(jnp.asarray(x, jnp.float32) for x in (up, gate))
    )
    d_up, d_gate = back(jnp.ones(5))
    np.testing.assert_allclose(y, low * sigmoid * (kept + 1), rtol=1e-6)
    np.testing.assert_allclose(d_up, [0.5 * sigmoid[0], 7 * sigmoid[1], -9 * sigmoid[2], 0, 0], rtol=1e-6)
    np.testing.assert_allclose(d_gate, slope * (kept + 1) * (gate < 7), rtol=1e-6)
    assert d_gate[1] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_biases_of_experts_are_added_to_their_own_rows(dtype):
    """Value and gradient, with an expert without rows, and rows of no expert; sums of gradients are not rounded."""
    sizes, bias = jnp.array([3, 0, 4]), jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0 + 2.0**-9]])
    x, kernel = jnp.zeros((9, 5), dtype), jnp.ones((3, 5, 2))
    g = jnp.ones((9, 2), dtype).at[0].set(2.0**-6).at[1].set(256.0)
    y, back = jax.vjp(lambda bias: project_groups(x, kernel, sizes, bias), bias)
    rows = np.array([0, 0, 0, 2, 2, 2, 2])
    assert y.dtype == dtype
    assert np.array_equal(y, np.concatenate([np.asarray(bias)[rows], np.zeros((2, 2))]).astype(y.dtype))
    assert back(g)[0].tolist() == [[257 + 2.0**-6] * 2, [0, 0], [4, 4]]


def test_new_parameters_are_transformers(tmp_path):
    """Sinks and the router's bias are drawn, the biases of experts are 0."""
    architecture, _, _ = open_folder(folder_of("gpt_oss", tmp_path, num_local_experts=64))
    layers = jax.jit(build_model(architecture).init)(jax.random.key(0))["layers"]
    assert layers["router"]["bias"].std() == pytest.approx(0.2, rel=0.2)
    assert 0.05 < layers["sinks"]["score"].std() < 0.4
    assert not any(layers[f"expert_{name}"]["bias"].any() for name in ("gate", "up", "down"))
    assert layers["expert_gate"]["kernel"].std() == pytest.approx(0.2, rel=0.05)


# MXFP4.


def test_all_bytes_and_exponents_are_transformers_numbers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.permutation(np.arange(256, dtype=np.uint8)).reshape(2, 4, 2, 16)
    scales = rng.integers(1, 240, (2, 4, 2)).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy().swapaxes(1, 2)
    ours = Unpacked(blocks, scales)
    found = ours[slice(0, 2), slice(0, 4), slice(0, 64)]
    assert found.dtype == ml_dtypes.bfloat16
    assert np.array_equal(found.astype(np.float32), theirs)
    assert found[0, 0, :2].tolist() == [_value(blocks[0, 0, 0, 0] % 16, scales[0, 0, 0]), theirs[0, 0, 1]]
    part = ours[slice(1, 2), slice(1, 3), slice(20, 45)]
    assert np.array_equal(part, found[1:2, 1:3, 20:45])


def _value(nibble, scale):
    """E2M1: a sign, two bits of exponent, one of mantissa; 0 has subnormals."""
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (int(exponent) - 1)
    return (-1) ** int(sign) * size * 2.0 ** (int(scale) - 127)


def quantized_folder(folder, dtype=torch.float32):
    """Writes a model whose experts are random in MXFP4, in two files that part blocks and scales; returns it."""
    rng = np.random.default_rng(0)
    torch_model("gpt_oss", hidden_size=64, intermediate_size=32).to(dtype).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(config))
    first, second = load_file(folder / "model.safetensors"), {}
    for name in [name for name in first if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs_, outputs = first.pop(name).shape
        first[f"{name}_blocks"] = rng.integers(0, 256, (count, outputs, inputs_ // 32, 16)).astype(np.uint8)
        second[f"{name}_scales"] = rng.integers(122, 126, (count, outputs, inputs_ // 32)).astype(np.uint8)
    (folder / "model.safetensors").unlink()
    files = {"model-1.safetensors": first, "model-2.safetensors": second}
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    names = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def test_mxfp4_is_read_and_plain_tensors_are_written(tmp_path):
    """transformers dequantizes the released form, and loads ours."""
    source, out, tokens = quantized_folder(tmp_path / "in"), tmp_path / "out", tokens_of(2, 20)
    architecture, config, params = load_folder(source)
    model = build_model(architecture)
    ours = jax.jit(lambda p: logits_of(model, p, tokens))(params)
    theirs = load_torch(source)
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=3e-6 * np.abs(ours).max())
    lazy = open_folder(source)[2]["layers"]["expert_up"]["kernel"]
    whole, every = np.asarray(lazy), slice(None)
    for index in ((1, slice(2, 3)), (every, slice(1, 3), slice(20, 45), slice(3, 9)), (0, every, slice(40, 64))):
        assert np.array_equal(lazy[index], whole[index])
    save_folder(out, params, config, dtype="bfloat16")
    written = load_file(out / "model.safetensors")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert written["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 64, 64)
    for name, p in theirs.named_parameters():
        assert np.array_equal(written[name], p.detach().numpy().astype(ml_dtypes.bfloat16)), name
    load_torch(out)


def test_the_released_form_is_bfloat16(tmp_path):
    """As every number of MXFP4 is one of bfloat16, an export has the dtype of the other tensors."""
    _, config, params = open_folder(quantized_folder(tmp_path, torch.bfloat16))
    assert config["dtype"] == "bfloat16"
    assert params["layers"]["expert_gate"]["kernel"].narrow().dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scales", r"model\.layers\.1\.mlp\.experts\.down_proj_scales is missing"),
        ("shape", r"down_proj_scales has shape \(4, 64, 0\), which does not fit .*down_proj_blocks, \(4, 64, 1, 16\)"),
        ("method", r"quantization_config is not supported; use the model before quantization"),
    ],
)
def test_damaged_mxfp4_is_one_line(change, message, tmp_path):
    folder = quantized_folder(tmp_path)
    scales, name = load_file(folder / "model-2.safetensors"), "model.layers.1.mlp.experts.down_proj_scales"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    if change == "scales":
        del scales[name], index["weight_map"][name]
    elif change == "shape":
        scales[name] = scales[name][..., :0]
    else:
        config["quantization_config"]["quant_method"] = "gptq"
    save_file({k: np.ascontiguousarray(x) for k, x in scales.items()}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as refused:
        open_folder(folder)
    assert "\n" not in str(refused.value)


def test_a_quantized_base_keeps_biases_and_sinks(tmp_path):
    pytest.importorskip("qwix")
    architecture, config, params = load_folder(folder_of("gpt_oss", tmp_path / "in"))
    base = qlora.quantize_base(params, architecture, "int8", map_layers)
    assert sorted(base["layers"]["expert_up"]) == ["bias", "quantized", "scale"]
    save_folder(tmp_path / "floats", qlora.as_floats(base), config)
    floats, model, tokens = load_folder(tmp_path / "floats")[2], build_model(architecture), tokens_of(2, 16)
    run = jax.jit(lambda p: logits_of(model, p, tokens))
    np.testing.assert_allclose(run(base), run(floats), atol=2e-5)
