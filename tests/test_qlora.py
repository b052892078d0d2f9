"""QLoRA: nf4 is the paper's, memory is that of 4 or 8 bits, and training equals that over the dequantized base."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from scipy.stats import norm
from tiny import MILESTONE, largest_difference, logits_of, tokens_of, torch_model

from dpo_jax import cli, optim, sharding
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data import pack
from dpo_jax.data.sources import synthetic
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.models import lora, qlora
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import load_folder, open_folder
from dpo_jax.models.huggingface.lazy import load_into_memory, narrow_dtypes
from dpo_jax.models.huggingface.safetensors import weights_hash
from dpo_jax.models.init import map_layers
from dpo_jax.models.model import build_model
from dpo_jax.models.quantized import Quantized, dequantize, quantize
from dpo_jax.records import Tokens
from dpo_jax.step import init_state
from dpo_jax.training.abstract import abstract_run, bytes_per_device, sharded_shapes
from dpo_jax.training.load import load_policy
from dpo_jax.training.shard import policy_shardings, state_shardings
from dpo_jax.training.train_step import compiled_step, hparams

WORDS = len(synthetic.synthetic_tokenizer())


def nf4_table():
    """The paper's nf4 values: normal quantiles, eight below 0 and nine from 0 on, scaled to at most 1 (appendix E)."""
    most = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above, below = (norm.ppf(np.linspace(most, 0.5, n)[:-1]) for n in (9, 8))
    values = np.sort([*above, 0.0, *-below])
    return values / values.max()


def as_floats(kernel):
    return np.asarray(dequantize(kernel, jnp.float32))


@pytest.mark.parametrize(("inputs", "tile"), [(1, 64), (2, 8)])
def test_nf4_takes_the_nearest_of_the_papers_numbers_in_every_tile(inputs, tile):
    kernel = np.random.default_rng(0).normal(size=(128, 8, 6)).astype(np.float32)
    made = quantize(jnp.asarray(kernel), inputs, "nf4")
    assert (made.values.dtype, made.values.shape) == (jnp.uint8, (128, 8, 3))
    tiles = np.moveaxis(kernel, inputs - 1, -1)  # the last input axis is tiled
    tiles = tiles.reshape(*tiles.shape[:-1], -1, tile)
    most = np.abs(tiles).max(-1, keepdims=True)
    table = nf4_table()
    nearest = table[np.abs(tiles[..., None] / most[..., None] - table).argmin(-1)] * most
    expected = np.moveaxis(nearest.reshape(np.moveaxis(kernel, inputs - 1, -1).shape), -1, inputs - 1)
    np.testing.assert_allclose(as_floats(made), expected, atol=1e-5)
    assert (np.abs(tiles - nearest) <= np.diff(table).max() / 2 * most + 1e-6).all()


@pytest.mark.parametrize("inputs", [1, 2])
def test_int8_is_off_by_half_a_step_of_the_outputs_largest_number(inputs):
    kernel = np.random.default_rng(0).normal(size=(16, 8, 6)).astype(np.float32)
    made = quantize(jnp.asarray(kernel), inputs, "int8")
    assert made.values.dtype == jnp.int8
    step = np.abs(kernel).max(tuple(range(inputs)), keepdims=True) / 127.5
    np.testing.assert_allclose(made.scale, step, rtol=1e-6)
    assert (
        np.abs(as_floats(made) - kernel) <= step * (0.5 + 1e-4)
    ).all()  # the largest is 127.5 steps, and 127 is kept


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A bfloat16 folder of a small Llama with the vocabulary of the synthetic tokenizer."""
    import torch

    folder = tmp_path_factory.mktemp("base")
    torch_model("llama", vocab_size=WORDS).to(torch.bfloat16).save_pretrained(folder)
    synthetic.synthetic_tokenizer().save_pretrained(folder)
    return folder


def quantized_model(folder, kind):
    """Returns an architecture, its quantized base as host arrays, and the same base dequantized."""
    architecture, _, params = open_folder(folder)
    few = load_into_memory(qlora.quantize_base(narrow_dtypes(params), architecture, kind, map_layers))
    floats = qlora.as_floats(few)
    layers = {name: dict(leaves) for name, leaves in floats["layers"].items()}
    for leaves in layers.values():
        if "kernel" in leaves:
            leaves["kernel"] = np.stack([leaves["kernel"][i] for i in range(architecture.layers)])
    return architecture, few, {**floats, "layers": layers}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_model_equals_its_dequantized_one(llama, kind):
    architecture, few, floats = quantized_model(llama, kind)
    _, _, before = load_folder(llama)
    run = jax.jit(partial(logits_of, build_model(architecture), tokens=tokens_of(2, 20)))
    np.testing.assert_allclose(run(few), run(floats), atol=1e-5)
    kernels = [name for name, leaves in few["layers"].items() if "quantized" in leaves]
    assert sorted(kernels) == ["down", "gate", "k", "o", "q", "up", "v"]
    for name in kernels:
        kernel, dequantized = (tree["layers"][name]["kernel"] for tree in (before, floats))
        error = np.linalg.norm(dequantized - kernel) / np.linalg.norm(kernel)
        assert 0 < error < {"nf4": 0.1, "int8": 0.01}[kind], name  # 9.2 % for normal numbers with tiles of 64
    assert few["embedding"].dtype == few["layers"]["mlp_norm"]["scale"].dtype == "bfloat16"  # as in the file


# The compiled step of a run.


@pytest.fixture(scope="module")
def table():
    """Random comparisons."""
    rng = np.random.default_rng(1)

    def ids(low, high):
        return rng.integers(3, WORDS, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 12), (ids(2, 20), ids(2, 20))) for _ in range(16))


def config_of(folder, *options):
    fixed = ["--model.path", str(folder), "--data.max_length", "32", "--batch_size", "16", "--lora.rank", "2"]
    fixed += ["--optim.learning_rate", "1e-2", "--optim.warmup_steps", "0"]
    return parse_config(Config, None, [*fixed, *options], prog="x")


def two_steps(config, table, base, adapters):
    """Returns the metrics and the adapters after two steps of the compiled step of a run over a base."""
    run = abstract_run(config)._replace(params=adapters, base=base)
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.sequence
    mesh, tx = sharding.make_mesh(*sizes), optim.build(**config.optim)
    trained, like = state_shardings(run, tx, mesh)
    parts = policy_shardings(run, mesh, trained)
    step, on_devices = compiled_step(run, parts, like), sharding.put_params(base, parts.base)
    shape = pack.choose_layout(table, max_length=32, batch_size=16, rows=4, length=64)
    column = np.random.default_rng(0).normal(size=(16, 2, 1)).astype(np.float32).repeat(2, axis=2) - 90
    batch, count, _ = pack.build_batch(table, np.arange(16), shape, column)
    batch = sharding.put_batch(mesh, batch)
    state = jax.device_put(jax.device_get(init_state(adapters, tx, run.loss)), jax.tree.map(lambda x: x.sharding, like))
    assert count > 1
    for _ in range(2):
        state, metrics = step(state, batch, np.int32(count), on_devices, hparams(config))
    return jax.device_get((metrics, state.params))


def assert_same(one, two):
    assert one[0].keys() == two[0].keys()
    for name, value in one[0].items():
        np.testing.assert_allclose(two[0][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert largest_difference(two[1], one[1]) < 2e-4  # RMSprop's first steps have the gradient's signs


@pytest.fixture(scope="module")
def adapters(llama):
    """Adapters that change the model."""
    architecture, _, _ = open_folder(llama)
    made = lora.init_adapters(architecture, lora.Lora(2, 16.0, ("all-linear",)), 0)
    for leaves in made["layers"].values():
        leaves["lora_b"] = np.random.default_rng(0).normal(size=leaves["lora_b"].shape).astype(np.float32) * 0.1
    return made


LAYOUTS = [
    pytest.param("nf4", ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--model.remat", "full"], marks=pytest.mark.slow),
    pytest.param("int8", ["--mesh.fsdp", "4", "--model.remat", "dots"], marks=pytest.mark.slow),
    pytest.param("nf4", ["--mesh.mode", "pmap"], marks=MILESTONE),
    pytest.param("nf4", ["--mesh.data", "1", "--mesh.tensor", "4"], marks=MILESTONE),
    pytest.param("nf4", ["--mesh.fsdp", "2", "--mesh.sequence", "2", "--model.remat", "full"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "options"), LAYOUTS)
def test_adapters_learn_as_over_the_dequantized_base(llama, table, adapters, kind, options):
    """Equal training over several microbatches, for every mesh and remat policy."""
    _, few, floats = quantized_model(llama, kind)
    expected = two_steps(config_of(llama), table, floats, adapters)
    assert largest_difference(expected[1], adapters) > 0.01
    assert_same(expected, two_steps(config_of(llama, "--lora.base", kind, *options), table, few, adapters))


@pytest.mark.slow
def test_a_base_in_the_dtype_of_its_file_trains_the_same(llama, adapters, monkeypatch):
    """On an accelerator a bfloat16 base stays bfloat16 under adapters, which changes no result."""
    architecture, _, params = open_folder(llama)
    config = config_of(llama)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    narrow = load_into_memory(load_policy(config.model, synthetic.synthetic_tokenizer(), 0, config.lora).params)
    monkeypatch.undo()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}
    assert weights_hash(narrow, architecture) == weights_hash(params, architecture)
    model, spec = build_model(architecture), lora.Lora(2, 16.0, ("all-linear",))

    def loss(adapters, base):
        return jnp.sin(
            logits_of(model, lora.attach_adapters(architecture, base, adapters, spec), tokens_of(2, 20))
        ).sum()

    one, two = (jax.jit(jax.value_and_grad(loss))(adapters, base) for base in (load_into_memory(params), narrow))
    assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-6)
    assert largest_difference(two[1], one[1]) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_memory_is_that_of_4_or_8_bits(llama, kind):
    """In the plan and in the arguments of a compiled program; a byte holds two nf4 numbers."""
    config = config_of(llama, "--lora.base", kind)
    run, mesh = abstract_run(config), sharding.make_mesh()
    trained, _ = state_shardings(run, optim.build(**config.optim), mesh)
    base = sharded_shapes(run.base, policy_shardings(run, mesh, trained).base)
    bits, mlp = {"nf4": 4, "int8": 8}[kind], 2 * 32 * 48
    numbers = 2 * (2 * 32 * 32 + 2 * 32 * 16) + 3 * mlp
    scales = {
        "nf4": 2 * (32 + 2 * 16 + 4 * 32 + 2 * 48 + 3 * 32),  # of q; k, v; o, by head; gate, up; down, 16 a tile
        "int8": 2 * (32 + 2 * 16 + 32 + 2 * 48 + 32),
    }[kind]
    rest = 2 * WORDS * 32 + 2 * 2 * 32 + 32
    assert bytes_per_device(base) == numbers * bits // 8 + 4 * scales + 2 * rest  # bfloat16, as in the file
    _, few, _ = quantized_model(llama, kind)
    gate = Quantized(*(jnp.asarray(few["layers"]["gate"][name]) for name in ("quantized", "scale")))
    memory = jax.jit(partial(dequantize, dtype=jnp.float32)).lower(gate).compile().memory_analysis()
    assert memory.argument_size_in_bytes == mlp * bits // 8 + gate.scale.nbytes


# The command line.


@pytest.mark.slow
def test_a_run_over_a_quantized_base_trains_and_exports_the_trained_policy(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [r for r, _ in zip(synthetic.read((), "train", 2), range(40), strict=False)]
    lines = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {
        "data": {"path": ["pairs.jsonl"], "max_length": 96, "max_prompt_length": 32, "eval_fraction": 0.2},
        "model": {"path": str(llama), "compute": "bfloat16"},
        "lora": {"rank": 4, "base": "nf4"},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 0},
        "samples": {"prompts": 0},
        "batch_size": 8,
        "max_steps": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    cli.run_command(["train", "run.yaml"])
    out = capsys.readouterr().out
    assert "the policy is exported in bfloat16, the dtype of the initial model: trained weights are rounded" in out
    assert "adapters merged into the nf4 base, dequantized; adapter/ holds the adapters alone" in out
    metrics = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)  # the reference is the quantized base
    assert losses[-1] < losses[0]
    architecture, few, floats = quantized_model(llama, "nf4")
    trained, spec = peft_folder.load_adapters(tmp_path / "runs/run/adapter", architecture)
    expected = lora.merge_adapters(architecture, floats, trained, spec)["layers"]["down"]["kernel"][1,]
    _, hf_config, after = load_folder(tmp_path / "runs/run/model")
    assert hf_config["dtype"] == "bfloat16"
    np.testing.assert_allclose(after["layers"]["down"]["kernel"][1], expected, rtol=2**-8)
    np.testing.assert_array_equal(after["embedding"], np.float32(few["embedding"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lora.rank", "0", "--lora.base", "nf4"],
            "lora.base: a nf4 base can only be trained through adapters; set lora.rank",
        ),
        (
            ["--lora.rank", "1", "--lora.base", "int8", "--reference.path", "other"],
            "reference.path: with lora.base int8 only model.path, for that base, is supported; remove it",
        ),
    ],
)
def test_options_without_meaning_are_refused(llama, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"path": str(llama)}}))
    with pytest.raises(UserError, match=message):
        cli.run_command(["train", "run.yaml", *options])


def test_a_missing_package_is_one_line(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    config = config_of(llama, "--lora.base", "nf4")
    with pytest.raises(UserError, match=r"lora.base: needs a package .*: pip install dpo_jax\[qlora\]"):
        load_policy(config.model, synthetic.synthetic_tokenizer(), 0, config.lora)
