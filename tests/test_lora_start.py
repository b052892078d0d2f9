"""DPO that starts from trained adapters: its reference is the model with them, or another one that is named."""

import json
import logging
import math

import numpy as np
import pytest
from test_lora import random_adapters
from tiny import MILESTONE, folder_of

import dpo_jax
from dpo_jax.data.sources import memory, synthetic
from dpo_jax.errors import UserError
from dpo_jax.models import lora
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import load_folder, save_folder
from dpo_jax.models.lora import Lora
from dpo_jax.training.metrics_file import read_metrics

SPEC = Lora(3, 7.0, ("all-linear",))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A base, adapters of it that change it much, the same as one merged model, and pairs."""
    folder, tokenizer = tmp_path_factory.mktemp("start"), synthetic.synthetic_tokenizer()
    base = folder_of("llama", folder / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    architecture, config, params = load_folder(base)
    adapters = random_adapters(architecture, SPEC)
    peft_folder.save_adapters(folder / "adapter", adapters, SPEC, architecture, str(base))
    merged = lora.merge_adapters(architecture, params, adapters, SPEC)
    save_folder(folder / "merged", merged, config, tokenizer)
    rows = [r for r, _ in zip(synthetic.read((), "train", 2), range(24), strict=False)]
    return folder, [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rows]


def trained(start, tmp_path, **keys):
    """Returns the metrics of the first step and of the evaluation before it, and the run's folder."""
    folder, rows = start
    data = {"name": "memory", "path": [memory.keep_examples(rows[:16])], "eval_path": [memory.keep_examples(rows[16:])]}
    options = {
        "data": data | {"max_length": 96, "max_prompt_length": 32},
        "batch_size": 8,
        "max_steps": 2,
        "optim": {"learning_rate": 1e-2, "warmup_steps": 0},
    }
    options |= {"samples": {"prompts": 2, "max_new_tokens": 6, "temperature": 0.0}, "run": str(tmp_path / "run")}
    dpo_jax.train(**({"model": str(folder / "base")} | options | keys))
    found = read_metrics(tmp_path / "run/metrics.jsonl")
    first = next(m for m in found if m["step"] == 1 and "loss" in m)
    before = next(m for m in found if "eval_loss" in m)
    return first, before, tmp_path / "run"


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"reference": {"mode": "online"}}, marks=MILESTONE),
        pytest.param({"mesh": {"fsdp": 2}}, marks=MILESTONE),
        pytest.param({"lora": {"base": "int8"}}, marks=pytest.mark.slow),
    ],
    ids=["cache", "online", "fsdp", "qlora"],
)
def test_the_reference_is_the_model_with_the_adapters(start, tmp_path, caplog, more):
    caplog.set_level(logging.INFO, "dpo_jax")
    adapter = {"path": str(start[0] / "adapter"), **more.get("lora", {})}
    first, before, run = trained(start, tmp_path, **(more | {"lora": adapter}))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert before["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert f"the reference is the model with the adapters of {adapter['path']}; reference.path " in caplog.text
    assert any("the reference is the model with" in line for line in json.loads((run / "data.json").read_text()))
    if not more:
        shown = [row for row in read_metrics(run / "samples.jsonl") if row["step"] == 0]
        assert shown
        assert all(row["policy"] == row["reference"] for row in shown), shown
        found = dpo_jax.evaluate(run, prompts=64)
        again = found["eval_rewards/margins"]["mean"]
        last = [m for m in read_metrics(run / "metrics.jsonl") if "eval_loss" in m][-1]
        assert again == pytest.approx(last["eval_rewards/margins"], abs=1e-3)
        assert again != 0
        # Of samples at temperature 1, though those to show are greedy.
        assert found["eval_kl"]["mean"] == pytest.approx(last["eval_kl"], rel=1e-3)
        assert found["eval_kl"]["mean"] > 0.01
        assert found["eval_kl"]["n"] == json.loads((run / "eval.json").read_text())["metrics"]["eval_kl"]["n"] > 4


@pytest.mark.slow
def test_the_base_is_the_reference_if_it_is_named(start, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dpo_jax")
    folder, rows = start
    adapter = {"path": str(folder / "adapter")}
    first, before, _ = trained(start, tmp_path, lora=adapter, reference=str(folder / "base"))
    assert f"the reference is {folder / 'base'}, without the adapters of lora.path" in caplog.text
    assert abs(first["loss"] - math.log(2)) > 1e-3
    held_out = {"name": "memory", "path": [memory.keep_examples(rows[16:])], "max_length": 96, "max_prompt_length": 32}
    options = {"data": held_out, "reference": str(folder / "base"), "prompts": 0}
    theirs = dpo_jax.evaluate(folder / "merged", **options)["eval_rewards/margins"]["mean"]
    assert before["eval_rewards/margins"] == pytest.approx(theirs, abs=1e-4)
    assert np.abs(theirs) > 1e-3


@pytest.mark.slow
def test_a_quantized_base_may_be_named_but_no_other_model(start, tmp_path):
    folder, _ = start
    adapter = {"path": str(folder / "adapter"), "base": "int8"}
    first, _, _ = trained(start, tmp_path, lora=adapter, reference=str(folder / "base"))
    assert abs(first["loss"] - math.log(2)) > 1e-3
    with pytest.raises(UserError, match=r"reference\.path: with lora.base int8 only model.path, for that base, is"):
        trained(start, tmp_path / "other", lora=adapter, reference=str(folder / "merged"))


@pytest.mark.slow
def test_adapters_that_the_model_has_merged_already_are_refused(start, tmp_path):
    folder, _ = start
    run = trained(start, tmp_path, lora={"rank": 2})[2]
    with pytest.raises(UserError, match=rf"merged already; set model\.path to their base {folder / 'base'}, or remove"):
        trained(start, tmp_path / "again", model=str(run), lora={"path": str(run)})
