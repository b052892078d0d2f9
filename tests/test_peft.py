"""Adapters written by PEFT: they are read or refused by name, and ten DPO steps have the same losses as with PEFT."""

import json
from functools import partial

import jax
import numpy as np
import originals
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import FAMILIES, folder_of, folders_of, load_torch, logits_of, tokens_of

from dpo_jax import losses, optim
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.logprobs import as_ref_logps, batch_logps
from dpo_jax.models import lora
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import load_folder, open_folder
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_train_step

# PEFT and transformers warn of each other.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

# A family per layout of projections ([in, out], fused by head, separate, fused), and its targets in PEFT.
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": "all-linear",
    "llama": ["q_proj", "v_proj"],
    "olmo2": r".*\.(k_proj|down_proj)",
    "phi3": "all-linear",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, created on first use."""
    return folders_of({name: (name, {}) for name in FAMILIES}, tmp_path_factory.mktemp)


def adapted(folder, seed=0, **settings):
    """Returns PEFT's model over a base, with random B, so that the adapter changes the model."""
    torch.manual_seed(seed)
    model = get_peft_model(load_torch(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    return model.eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def assert_loads_as(folder, adapter, theirs):
    """Asserts that our logits with an adapter folder equal PEFT's, and differ from the base's."""
    architecture, _, base = load_folder(folder)
    adapters, spec = peft_folder.load_adapters(adapter, architecture)
    model, tokens = build_model(architecture), tokens_of(2, 20)
    ours = jax.jit(lambda p: logits_of(model, p, tokens))(lora.attach_adapters(architecture, base, adapters, spec))
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4)
    with theirs.disable_adapter():
        assert np.abs(ours - torch_logits(theirs, tokens)).max() > 0.01


@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_written_by_peft_has_the_same_logits(folders, kind, tmp_path):
    theirs = adapted(folders(kind), r=3, lora_alpha=5, target_modules=TARGETS[kind])
    theirs.save_pretrained(tmp_path)
    assert_loads_as(folders(kind), tmp_path, theirs)


def test_rank_and_alpha_patterns_mean_what_they_mean_in_peft(folders, tmp_path):
    """Patterns match the end of a name, the first match counts, and a pattern may name a single layer."""
    ranks = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "self_attn.v_proj": 1}}
    theirs = adapted(folders("llama"), r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **ranks)
    theirs.save_pretrained(tmp_path)
    assert_loads_as(folders("llama"), tmp_path, theirs)
    architecture, _, _ = open_folder(folders("llama"))
    settings = json.loads((tmp_path / peft_folder.SETTINGS).read_text())
    (tmp_path / peft_folder.SETTINGS).write_text(json.dumps(settings | {"alpha_pattern": {"q_proj|v_proj": 1}}))
    with pytest.raises(UserError, match=r"alpha_pattern has 'q_proj\|v_proj'; only names of modules"):
        peft_folder.load_adapters(tmp_path, architecture)
    uneven = adapted(folders("llama"), r=3, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2})
    uneven.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"layers of model.layers.{i}.self_attn.q_proj have several ranks; give them one"
    ):
        peft_folder.load_adapters(tmp_path, architecture)


def test_kinds_of_layers_with_other_ranks_are_refused(folders, tmp_path):
    """One module of PEFT is two stacks of adapters, of layers with other heads."""
    full = {"rank_pattern": {f"layers.{i}.self_attn.q_proj": 2 for i in (1, 3, 5)}}
    adapted(folders("gemma4_text"), r=3, target_modules=["q_proj"], **full).save_pretrained(tmp_path)
    architecture, _, _ = open_folder(folders("gemma4_text"))
    with pytest.raises(UserError, match=r"layers of model.layers.{i:global}.self_attn.q_proj have several ranks"):
        peft_folder.load_adapters(tmp_path, architecture)


def test_rslora_divides_by_the_root_of_the_rank(folders, tmp_path):
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    theirs = adapted(
        folders("llama"), r=5, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_rslora=True, **patterns
    )
    theirs.save_pretrained(tmp_path)
    assert_loads_as(folders("llama"), tmp_path, theirs)
    architecture, _, _ = open_folder(folders("llama"))
    adapters, spec = peft_folder.load_adapters(tmp_path, architecture)
    peft_folder.save_adapters(tmp_path / "out", adapters, spec, architecture, "base")  # in the plain form
    assert_loads_as(folders("llama"), tmp_path / "out", theirs)


@pytest.mark.parametrize(
    ("kind", "tied", "saved"),
    [
        ("llama", False, ["lm_head"]),
        ("llama", False, ["embed_tokens"]),
        ("llama", True, ["embed_tokens", "lm_head"]),
        ("gpt_neox", False, ["embed_in", "lm_head"]),
        ("gpt2", True, ["wte", "lm_head"]),
    ],
)
def test_modules_saved_in_full_are_read_and_written(kind, tied, saved, tmp_path):
    folder = folder_of(kind, tmp_path / "base", tie_word_embeddings=tied)
    target = {"llama": "q_proj", "gpt_neox": "query_key_value", "gpt2": "c_attn"}[kind]
    theirs = adapted(folder, r=3, lora_alpha=5, target_modules=[target], modules_to_save=saved)
    change = torch.randn(128, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name:
                p.copy_(p + change)
    theirs.save_pretrained(tmp_path / "adapter")
    assert_loads_as(folder, tmp_path / "adapter", theirs)
    architecture, _, _ = open_folder(folder)
    adapters, spec = peft_folder.load_adapters(tmp_path / "adapter", architecture)
    keys = {"embedding" if tied or name != "lm_head" else "head" for name in saved}
    assert set(adapters) == {"layers"} | keys
    peft_folder.save_adapters(tmp_path / "out", adapters, spec, architecture, str(folder))
    again = PeftModel.from_pretrained(load_torch(folder), tmp_path / "out").eval()
    tokens = tokens_of(2, 20)
    np.testing.assert_allclose(torch_logits(again, tokens), torch_logits(theirs, tokens), atol=1e-5)
    assert_loads_as(folder, tmp_path / "out", theirs)


def test_saved_modules_that_do_not_fit_are_refused(tmp_path):
    folder = folder_of("llama", tmp_path / "base", tie_word_embeddings=True)
    architecture, _, _ = open_folder(folder)
    theirs = adapted(folder, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path / "one")
    with pytest.raises(UserError, match=r"embed_tokens\.weight is missing; the model ties embedding and head, so that"):
        peft_folder.load_adapters(tmp_path / "one", architecture)
    both = adapted(folder, r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    with torch.no_grad():
        next(p for n, p in both.named_parameters() if "lm_head.modules_to_save" in n).add_(1.0)
    both.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match=r"embedding and head differ, but config\.json ties them; untie them there"):
        peft_folder.load_adapters(tmp_path / "two", architecture)


def test_new_adapters_with_whole_modules_begin_as_the_base(folders):
    architecture, _, base = load_folder(folders("llama"))
    spec = lora.Lora(2, 4.0, ("q_proj", "lm_head", "embed_tokens"))
    adapters = lora.init_adapters(architecture, spec, 0, base)
    assert set(adapters) == {"layers", "embedding", "head"}
    attached = lora.attach_adapters(architecture, base, adapters, spec)
    assert np.array_equal(attached["head"], base["head"])
    changed = adapters | {"head": adapters["head"] + 1}
    merged = lora.merge_adapters(architecture, base, changed, spec)
    assert np.array_equal(merged["head"], base["head"] + 1)
    assert set(lora.adapter_axes(architecture, build_model(architecture).axes, spec)) == set(adapters)


def test_a_bfloat16_adapter_is_read(folders, tmp_path):
    theirs = adapted(folders("llama"), r=2, target_modules=["down_proj"])
    for name, p in theirs.named_parameters():
        if "lora" in name:
            p.data = p.data.bfloat16().float()
    wide = {name: p.detach().clone() for name, p in theirs.named_parameters() if "lora" in name}
    for name, p in theirs.named_parameters():
        p.data = p.data.bfloat16() if name in wide else p.data
    theirs.save_pretrained(tmp_path)
    for name, p in theirs.named_parameters():
        p.data = wide.get(name, p.data)
    assert_loads_as(folders("llama"), tmp_path, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["norm"]},
    ],
)
def test_unsupported_settings_of_peft_are_refused_by_name(folders, settings, tmp_path):
    theirs = adapted(folders("llama"), r=2, target_modules=["q_proj"], **settings)
    theirs.save_pretrained(tmp_path)
    (key,) = settings
    with pytest.raises(
        UserError, match=rf"adapter_config.json: {key} (= .* is not|has .*; only embed_tokens, lm_head are) supported"
    ):
        peft_folder.load_adapters(tmp_path, open_folder(folders("llama"))[0])


STEPS, BATCH, RATE = 10, 4, 2e-2


@pytest.fixture(scope="module")
def table():
    """Random comparisons."""
    rng = np.random.default_rng(1)

    def ids(low, high):
        return rng.integers(3, 128, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 12), (ids(2, 20), ids(2, 20))) for _ in range(2 * BATCH))


def rows_of(step):
    return (np.arange(BATCH) + step * BATCH) % (2 * BATCH)


def our_losses(folder, adapter, table):
    """Ten steps of the train step over an adapter's folder; the reference is the base."""
    architecture, _, base = load_folder(folder)
    adapters, spec = peft_folder.load_adapters(adapter, architecture)
    model, tx = build_model(architecture), optim.build("adamw", learning_rate=RATE, warmup_steps=0)
    logps, loss = partial(batch_logps, model), losses.build({"name": "dpo", "beta": 0.5})

    def policy(trained, base):
        return lora.attach_adapters(architecture, base, trained, spec)

    step = jax.jit(make_train_step(model, loss, tx, policy=policy))
    column = jax.jit(lambda p, m: as_ref_logps(logps(p, m), m))
    shape = pack.choose_layout(table, max_length=32, batch_size=BATCH, rows=2)
    state, found = init_state(adapters, tx, loss), []
    for i in range(STEPS):
        batch, count, _ = pack.build_batch(table, rows_of(i), shape)
        for m in range(count):
            batch.ref_logps[m] = column(base, jax.tree.map(lambda x, m=m: x[m], batch))
        state, metrics = step(state, batch, np.int32(count), base)
        found.append(float(metrics["loss"]))
    return found


def pefts_losses(folder, adapter, table):
    """The same steps by PEFT's model and torch's AdamW; the reference is the model with its adapter off."""
    model = PeftModel.from_pretrained(load_torch(folder), adapter, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found = []
    for i in range(STEPS):
        rows = [table[int(k)] for k in rows_of(i)]
        pi = torch.stack([originals.sequence_logps(model, t) for t in rows])
        with torch.no_grad(), model.disable_adapter():
            rho = torch.stack([originals.sequence_logps(model, t) for t in rows])
        loss = originals.preference_loss(pi, rho, beta=0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt2", "gpt_neox", "phi3"))]
)
def test_ten_steps_of_dpo_equal_pefts(folders, table, tmp_path, kind):
    """Adapters start as in PEFT: A random, B zero, so that the first loss is log 2."""
    config = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear")
    get_peft_model(load_torch(folders(kind)), config).save_pretrained(tmp_path)
    ours, theirs = (run(folders(kind), tmp_path, table) for run in (our_losses, pefts_losses))
    assert ours[0] == pytest.approx(np.log(2), abs=1e-5)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert min(ours) < 0.5 * ours[0]  # it learns, so that the comparison means something
