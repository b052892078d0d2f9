"""Adapters: nothing changes at first, torch has the same mathematics, only they learn, PEFT's folders go in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, folders_of, largest_difference, load_torch, logits_of, tokens_of
from tiny import whole_rows as whole

from dpo_jax import cli
from dpo_jax.data import synthetic
from dpo_jax.models import build, family, hf, lora
from dpo_jax.models.lora import Lora
from dpo_jax.records import UserError

SPEC = Lora(3, 7.0, ("all-linear",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, made when first asked for."""
    return folders_of({name: (name, {}) for name in FAMILIES}, tmp_path_factory.mktemp)


def random_adapters(architecture, spec=SPEC, seed=0):
    """Adapters that change something: B is random too."""
    adapters = lora.init(architecture, spec, seed)
    rng = np.random.default_rng(seed)
    for leaves in adapters["layers"].values():
        leaves["lora_b"] = rng.normal(size=leaves["lora_b"].shape).astype(np.float32) * 0.1
    return adapters


def add_to_torch(model, folder):
    """Adds to torch's weights what PEFT adds by its own definition: alpha / r * B A, transposed for a Conv1D."""
    import torch

    settings, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / lora.WEIGHTS)
    modules = dict(model.named_modules())
    for key in [key for key in tensors if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert any(name.endswith(f".{target}") for target in settings["target_modules"]), name
        short = name.rpartition(".")[2]
        rank, alpha = (
            settings[f"{k}_pattern"].get(short, settings[v]) for k, v in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        a, b = (torch.tensor(tensors[key.replace("lora_A", f"lora_{side}")]) for side in "AB")
        assert a.shape[0] == b.shape[1] == rank
        delta = alpha / rank * b @ a
        with torch.no_grad():
            modules[name].weight += delta.T if settings["fan_in_fan_out"] else delta
    return model


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gptj", "olmo2", "phi3"])  # each way to store projections
def test_adapted_merged_and_peft_give_the_same_logits(folders, kind, tmp_path):
    import torch

    architecture, config, base = hf.load(folders(kind))
    adapters, model, tokens = random_adapters(architecture), build(architecture), tokens_of(2, 20)
    run = jax.jit(lambda p: logits_of(model, p, tokens))
    ours = run(lora.joined(base, adapters, SPEC))
    assert np.abs(ours - run(base)).max() > 0.01
    lora.save(tmp_path / "adapter", adapters, SPEC, architecture, "base")
    with torch.no_grad():
        theirs = add_to_torch(load_torch(folders(kind)), tmp_path / "adapter")(torch.tensor(tokens).long()).logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    hf.save(tmp_path / "merged", lora.merged(hf.stored(folders(kind))[2], adapters, SPEC), config)
    np.testing.assert_allclose(run(hf.load(tmp_path / "merged")[2]), ours, atol=1e-4)
    again, spec = lora.load(tmp_path / "adapter", architecture)
    assert spec[:2] == SPEC[:2]
    assert largest_difference(again, adapters) < 1e-6
    one, two = (lora.modules(architecture, targets).keys() for targets in (spec.targets, SPEC.targets))
    assert one == two


def test_new_adapters_change_nothing_and_are_all_that_is_differentiated(folders):
    architecture, _, base = hf.load(folders("llama"))
    adapters, model = lora.init(architecture, SPEC, 0), build(architecture, remat="dots")
    rows = whole(tokens_of(2, 24))

    def loss(adapters, base):
        return jnp.sin(model.hidden(lora.joined(base, adapters, SPEC), *rows)).sum()

    before = jnp.sin(model.hidden(base, *rows)).sum()
    value, grads = jax.jit(jax.value_and_grad(loss))(adapters, base)
    assert float(value) == pytest.approx(float(before), rel=1e-5)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, adapters)
    for leaves in grads["layers"].values():
        assert not leaves["lora_a"].any()  # since B is zero
        assert leaves["lora_b"].any()
    bound = 1 / np.sqrt(32)
    a = adapters["layers"]["q"]["lora_a"]
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert not np.array_equal(a[0], a[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_every_axis_of_an_adapter_has_a_name(folders, kind):
    architecture, _, _ = hf.stored(folders(kind))
    adapters = lora.init(architecture, SPEC, 0)
    axes = lora.axes(build(architecture).axes, adapters)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(np.ndim, adapters)
    assert axes["layers"]["o"]["lora_a"] == ("layers", "heads", "head_dim", "rank")
    assert axes["layers"]["q"]["lora_b"] == ("layers", "rank", "heads", "head_dim")


def test_ten_steps_equal_torchs(folders, tmp_path):
    """The same adapters, data and AdamW on both sides; torch's model is adapted by the definition."""
    import torch

    architecture, _, base = hf.load(folders("llama"))
    spec = Lora(4, 8.0, ("q_proj", "v_proj"))
    adapters, model = lora.init(architecture, spec, 1), build(architecture)
    lora.save(tmp_path / "adapter", adapters, spec, architecture, "base")
    start = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    theirs = {key.removeprefix("base_model.model."): torch.nn.Parameter(torch.tensor(x)) for key, x in start.items()}
    assert len(theirs) == 2 * 2 * architecture.layers
    torch_model, batches = load_torch(folders("llama")), [tokens_of(4, 16, seed=s) for s in range(10)]
    frozen = {name: p.detach() for name, p in torch_model.named_parameters()}
    optimiser = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.01)
    tx = optax.adamw(1e-2, weight_decay=0.01)

    def loss(adapters, tokens):
        logits = logits_of(model, lora.joined(base, adapters, spec), tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(adapters, state, tokens):
        value, grads = jax.value_and_grad(loss)(adapters, tokens)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, ours, torchs = tx.init(adapters), [], []
    for tokens in batches:
        adapters, state, value = step(adapters, state, tokens)
        ours.append(float(value))
        params = dict(frozen)
        for key in [key for key in theirs if "lora_A" in key]:
            name = key.replace("lora_A.weight", "weight")
            params[name] = frozen[name] + 2.0 * theirs[key.replace("lora_A", "lora_B")] @ theirs[key]
        ids = torch.tensor(tokens).long()
        logits = torch.func.functional_call(torch_model, params, (ids,)).logits[:, :-1]
        value = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        torchs.append(float(value.detach()))
    assert ours == pytest.approx(torchs, abs=1e-4)
    assert ours[0] - min(ours) > 0.001


def test_a_foreign_fused_adapter_is_read_whole(folders, tmp_path):
    """PEFT's own adapter of a fused projection has one A for all of its parts."""
    architecture, _, base = hf.load(folders("gpt2"))
    lora.save(tmp_path, random_adapters(architecture), SPEC, architecture, "base")
    rng = np.random.default_rng(3)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    for key, value in tensors.items():
        if "c_attn" in key:
            shape = (3, value.shape[1]) if "lora_A" in key else (value.shape[0], 3)
            tensors[key] = rng.normal(size=shape).astype(np.float32) * 0.1
    save_file(tensors, tmp_path / lora.WEIGHTS)
    settings = json.loads((tmp_path / lora.SETTINGS).read_text()) | {"rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / lora.SETTINGS).write_text(json.dumps(settings))
    adapters, spec = lora.load(tmp_path, architecture)
    theirs = add_to_torch(load_torch(folders("gpt2")), tmp_path).state_dict()
    ours = lora.merged(base, adapters, spec)["layers"]["v"]["kernel"][1]
    expected = theirs["transformer.h.1.attn.c_attn.weight"].numpy()[:, 64:].reshape(ours.shape)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.fixture
def written(folders, tmp_path):
    """An adapter's folder, its settings and its tensors, to be damaged."""
    architecture = family("llama").architecture(hf.read_config(folders("llama")))
    spec = Lora(2, 4.0, ("q_proj",))
    lora.save(tmp_path, random_adapters(architecture, spec), spec, architecture, "base")
    settings = json.loads((tmp_path / lora.SETTINGS).read_text())
    return tmp_path, architecture, settings, load_file(tmp_path / lora.WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "holds no LoRA"),
        ({"use_dora": True}, {}, "adapter_config.json: use_dora = True is not supported"),
        ({"bias": "all"}, {}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save = .* is not supported"),
        (
            {"target_modules": ["k_proj"]},
            {},
            "tensor base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight is missing",
        ),
        ({"target_modules": ["wq"]}, {}, "'wq' is no projection of a llama; it has down_proj, gate_proj"),
        ({}, {"more": np.zeros(1, np.float32)}, "tensor more is not part of the adapter of a llama"),
        (
            {},
            {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": np.zeros((2, 31)) for i in (0, 1)},
            "A and B do not fit the llama's model.layers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(written, settings, tensors, message):
    folder, architecture, old, values = written
    (folder / lora.SETTINGS).write_text(json.dumps(old | settings))
    save_file(values | tensors, folder / lora.WEIGHTS)
    with pytest.raises(UserError, match=message):
        lora.load(folder, architecture)


def test_settings_that_adapt_nothing_are_refused():
    architecture = family("gpt2").architecture({"vocab_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 1})
    with pytest.raises(
        UserError, match=r"lora.targets: 'q_proj' is no projection of a gpt2; it has c_attn, c_fc, c_proj"
    ):
        lora.init(architecture, Lora(2, 1.0, ("q_proj",)), 0)
    with pytest.raises(UserError, match="lora: rank must be at least 1"):
        lora.init(architecture, Lora(0, 1.0, ("c_attn",)), 0)
    assert len(lora.modules(architecture, ("mlp.c_proj",))) == 1
    assert len(lora.modules(architecture, ("c_proj",))) == 2


def test_a_run_trains_and_keeps_adapters_only(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [r for r, _ in zip(synthetic.read((), "train", 2), range(60), strict=False)]
    lines = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = synthetic.tokenizer()
    base = folders_of({"m": ("llama", {"vocab_size": len(tokenizer)})}, lambda _: tmp_path)("m")
    tokenizer.save_pretrained(base)
    config = {
        "data": {"path": ["pairs.jsonl"], "max_length": 96, "max_prompt_length": 32, "eval_fraction": 0.2},
        "model": {"path": str(base)},
        "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 1},
        "samples": {"prompts": 0},
        "batch_size": 8,
        "max_steps": 3,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    cli.run(["train", "run.yaml"])
    run = tmp_path / "runs/run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] != losses[0]
    architecture, _, before = hf.load(base)
    _, _, after = hf.load(run / "model")
    adapters, _ = lora.load(run / "adapter", architecture)
    assert set(adapters["layers"]) == {"q", "down"}
    changed = {
        name
        for name, leaves in after["layers"].items()
        if not np.array_equal(*(p["layers"][name].get("kernel", 0) for p in (after, before)))
    }
    assert changed == {"q", "down"}
    expected = before["layers"]["q"]["kernel"][1] + 2 * np.tensordot(
        adapters["layers"]["q"]["lora_a"][1], adapters["layers"]["q"]["lora_b"][1], 1
    )
    np.testing.assert_allclose(after["layers"]["q"]["kernel"][1], expected, atol=1e-6)
    size = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file())
    assert size < sum(leaf.nbytes for leaf in jax.tree.leaves(before))
    cli.run(["export", str(run), "out"])
    assert largest_difference(hf.load(tmp_path / "out")[2], after) == 0
    capsys.readouterr()
    cli.run(["eval", str(run), "--prompts", "0"])
    shown = capsys.readouterr().out
    last = [m["eval_rewards/margins"] for m in metrics if "eval_rewards/margins" in m][-1]
    assert f"{last:.4f}" in shown
