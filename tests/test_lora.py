"""LoRA: new adapters change nothing, only adapters are trained, logits equal PEFT's, folders are read and written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny import COMPOSED, FAMILIES, folders_of, largest_difference, load_torch, logits_of, tokens_of, unpacked_rows

from dpo_jax import cli
from dpo_jax.config.schema import LoraConfig
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.models import lora
from dpo_jax.models.families.registry import family
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import load_folder, open_folder, read_config, save_folder
from dpo_jax.models.lora import Lora
from dpo_jax.models.model import build_model
from dpo_jax.training.load import initial_adapters

WAYS = ("gpt2", "gpt_neox", "olmo2", "phi3")  # layouts of projections: [in, out], fused by head, separate, fused
LATER = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("gptj", "llama", "ministral3", "exaone4", "deepseek_v3", "gemma4_text")
]
LATER += [pytest.param(kind, marks=marks) for kind, marks in COMPOSED.items()]
SPEC = Lora(3, 7.0, ("all-linear",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, created on first use."""
    return folders_of({name: (name, {}) for name in FAMILIES}, tmp_path_factory.mktemp)


def random_adapters(architecture, spec=SPEC, seed=0):
    """Returns adapters with random B, so that they change the model."""
    adapters = lora.init_adapters(architecture, spec, seed)
    rng = np.random.default_rng(seed)
    for leaves in adapters["layers"].values():
        leaves["lora_b"] = rng.normal(size=leaves["lora_b"].shape).astype(np.float32) * 0.1
    return adapters


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's use of transformers
@pytest.mark.parametrize("kind", [*WAYS, *LATER])
def test_adapted_merged_and_peft_give_the_same_logits(folders, kind, tmp_path):
    architecture, config, base = load_folder(folders(kind))
    adapters, model, tokens = random_adapters(architecture), build_model(architecture), tokens_of(2, 20)
    run = jax.jit(lambda p: logits_of(model, p, tokens))
    ours = run(lora.attach_adapters(architecture, base, adapters, SPEC))
    assert np.abs(ours - run(base)).max() > 0.01
    peft_folder.save_adapters(tmp_path / "adapter", adapters, SPEC, architecture, "base")
    theirs = PeftModel.from_pretrained(load_torch(folders(kind)), tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = theirs(torch.tensor(tokens).long()).logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    save_folder(
        tmp_path / "merged", lora.merge_adapters(architecture, open_folder(folders(kind))[2], adapters, SPEC), config
    )
    np.testing.assert_allclose(run(load_folder(tmp_path / "merged")[2]), ours, atol=1e-4)
    again, spec = peft_folder.load_adapters(tmp_path / "adapter", architecture)
    assert spec[:2] == SPEC[:2]
    assert largest_difference(again, adapters) < 1e-6
    one, two = (lora.adapted_modules(architecture, targets).keys() for targets in (spec.targets, SPEC.targets))
    assert one == two


def test_new_adapters_change_nothing_and_are_all_that_is_differentiated(folders):
    architecture, _, base = load_folder(folders("llama"))
    adapters, model = lora.init_adapters(architecture, SPEC, 0), build_model(architecture, remat="dots")
    rows = unpacked_rows(tokens_of(2, 24))

    def loss(adapters, base):
        return jnp.sin(model.hidden(lora.attach_adapters(architecture, base, adapters, SPEC), *rows)).sum()

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
    architecture, _, _ = open_folder(folders(kind))
    adapters = lora.init_adapters(architecture, SPEC, 0)
    axes = lora.adapter_axes(architecture, build_model(architecture).axes, SPEC)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(np.ndim, adapters)
    assert axes["layers"]["o"]["lora_a"] == ("layers", "heads", "head_dim", "rank")
    if kind == "llama":
        assert axes["layers"]["q"]["lora_b"] == ("layers", "rank", "heads", "head_dim")
    else:
        assert axes["layers"]["q_k_v"] == {
            "lora_a": ("layers", "embed", "rank"),
            "lora_b": ("layers", "rank", *[None] * 3),
        }


@pytest.fixture
def written(folders, tmp_path):
    """An adapter folder, its architecture, settings and tensors, to be damaged."""
    architecture = family("llama").architecture(read_config(folders("llama")))
    spec = Lora(2, 4.0, ("q_proj",))
    peft_folder.save_adapters(tmp_path, random_adapters(architecture, spec), spec, architecture, "base")
    settings = json.loads((tmp_path / peft_folder.SETTINGS).read_text())
    return tmp_path, architecture, settings, load_file(tmp_path / peft_folder.WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "holds no LoRA"),
        ({"use_dora": True}, {}, "adapter_config.json: use_dora = True is not supported"),
        ({"bias": "all"}, {}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, "tensor base_model.model.lm_head.weight is missing"),
        (
            {"target_modules": ["k_proj"]},
            {},
            "tensor base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight is missing",
        ),
        ({"target_modules": ["wq"]}, {}, "'wq' is no projection of a llama; it has down_proj, embed_tokens"),
        ({}, {"more": np.zeros(1, np.float32)}, "tensor more is not part of the adapter of a llama"),
        (
            {},
            {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": np.zeros((2, 31)) for i in (0, 1)},
            "A and B do not fit the llama's model.layers",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(written, settings, tensors, message):
    folder, architecture, old, values = written
    (folder / peft_folder.SETTINGS).write_text(json.dumps(old | settings))
    save_file(values | tensors, folder / peft_folder.WEIGHTS)
    with pytest.raises(UserError, match=message):
        peft_folder.load_adapters(folder, architecture)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT's use of transformers
@pytest.mark.parametrize(("kind", "rank"), [("gpt2", 3), ("gpt_neox", 3), ("phi3", 4)])
def test_fused_projections_share_one_adapter_as_with_peft(folders, kind, rank):
    """They share A, so that there are as many parameters as in PEFT."""
    architecture, _, base = open_folder(folders(kind))
    adapters = random_adapters(architecture, Lora(rank, 1.0, ("all-linear",)))
    theirs = get_peft_model(load_torch(folders(kind)), PeftLoraConfig(r=rank, target_modules="all-linear"))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == count
    layers = lora.attach_adapters(architecture, base, adapters, Lora(rank, 1.0, ("all-linear",)))["layers"]
    assert layers["q"]["lora_a"] is layers["k"]["lora_a"] is layers["v"]["lora_a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "path": "adapter"}, "lora.rank: fixed by the adapters at lora.path; remove it"),
        ({"alpha": 4.0, "path": "adapter"}, "lora.alpha: fixed by the adapters at lora.path; remove it"),
        ({"targets": ("q_proj",)}, "lora.targets: has no effect without adapters; set lora.rank too"),
        ({"alpha": 4.0}, "lora.alpha: has no effect without adapters"),
        ({"path": "absent"}, "absent: holds no LoRA; adapter_config.json with peft_type LORA is needed"),
    ],
)
def test_settings_without_effect_are_refused(options, message):
    architecture = family("gpt2").architecture({"vocab_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 1})
    with pytest.raises(UserError, match=message):
        initial_adapters(LoraConfig(**options), architecture, 0)


def test_targets_that_match_nothing_are_refused():
    architecture = family("gpt2").architecture({"vocab_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 1})
    with pytest.raises(
        UserError, match=r"lora.targets: 'q_proj' is no projection of a gpt2; it has c_attn, c_fc, c_proj"
    ):
        lora.init_adapters(architecture, Lora(2, 1.0, ("q_proj",)), 0)
    with pytest.raises(UserError, match="lora: rank must be at least 1"):
        lora.init_adapters(architecture, Lora(0, 1.0, ("c_attn",)), 0)
    assert len(lora.adapted_modules(architecture, ("mlp.c_proj",))) == 1
    assert len(lora.adapted_modules(architecture, ("c_proj",))) == 2


@pytest.mark.slow
def test_a_run_trains_and_saves_adapters_only(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [r for r, _ in zip(synthetic.read((), "train", 2), range(60), strict=False)]
    lines = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = synthetic.synthetic_tokenizer()
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
    cli.run_command(["train", "run.yaml"])
    run = tmp_path / "runs/run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] != losses[0]
    architecture, _, before = load_folder(base)
    _, _, after = load_folder(run / "model")
    adapters, _ = peft_folder.load_adapters(run / "adapter", architecture)
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
    cli.run_command(["export", str(run), "out"])
    assert largest_difference(load_folder(tmp_path / "out")[2], after) == 0
    capsys.readouterr()
    cli.run_command(["eval", str(run), "--prompts", "0"])
    shown = capsys.readouterr().out
    last = [m["eval_rewards/margins"] for m in metrics if "eval_rewards/margins" in m][-1]
    assert f"{last:.4f}" in shown
