"""Ends of sampled texts: the tokenizer's EOS and all of generation_config.json's, wherever text is sampled."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import shared_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_jax
from dpo_jax import cli
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.schema import ModelConfig
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.experiments import setup, world
from dpo_jax.models.huggingface.folder import end_ids, load_tokenizer
from dpo_jax.training.load import load_policy
from dpo_jax.training.metrics_file import read_metrics
from dpo_jax.training.tables import decode_texts

PROMPT = "Once upon a time"
SAMPLES = ["--samples.temperature", "0", "--samples.max-new-tokens", "24"]


def greedy(folder, **options):
    """Returns transformers' greedy continuation of the prompt, ids."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, **options)
    return out[0, ids.shape[1] :].tolist()


def ending_at(ends, folder):
    """Copies a small trained model, whose generation_config.json names more ends of a text."""
    shutil.copytree(shared_model("tinystories-656k"), folder)
    folder.chmod(0o755)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that ends a text at its sixth greedy token too, and the text up to there as transformers gives it."""
    free = greedy(shared_model("tinystories-656k"))
    end = next(i for i in range(5, 24) if free[i] not in free[:i])
    folder = ending_at([free[end], 2], tmp_path_factory.mktemp("ends") / "model")
    theirs = greedy(folder)
    assert theirs == free[: end + 1]
    return folder, AutoTokenizer.from_pretrained(folder).decode(theirs, skip_special_tokens=True), free[end]


def test_the_ids_are_a_union():
    tokenizer = synthetic.synthetic_tokenizer()
    own = tokenizer.eos_token_id
    assert end_ids(tokenizer, {"eos_token_id": [5, own, 9]}, {"eos_token_id": 7}) == (own, 5, 9)
    assert end_ids(tokenizer, {"eos_token_id": 6}, {}) == (own, 6)
    assert end_ids(tokenizer, {}, {"eos_token_id": [7, 8]}) == (own, 7, 8)
    assert end_ids(None, {}, {}) == ()


@pytest.mark.parametrize("value", ["2", 2.5, [2, None], True, -1, {"a": 1}])
def test_a_value_that_is_no_id_is_refused_before_training(value, tmp_path):
    folder = ending_at(value, tmp_path / "model")
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id has .*; give a token id, or a"):
        load_policy(ModelConfig(path=str(folder)), load_tokenizer(folder), 0)


def test_markers_are_no_text_but_words_are():
    tokenizer = synthetic.synthetic_tokenizer()
    tokenizer.add_tokens(["<end>"])
    word, end = (tokenizer.convert_tokens_to_ids(token) for token in ("▁film", "<end>"))
    assert "film" in decode_texts(tokenizer, [[word]], (word, end))[0]
    assert decode_texts(tokenizer, [[word, end]], (word, end)) == decode_texts(tokenizer, [[word]])
    assert "<end>" in decode_texts(tokenizer, [[word, end]])[0]


def test_sample_stops_where_transformers_stops(model):
    folder, text, _ = model
    found = dpo_jax.sample(folder, [PROMPT], samples={"temperature": 0.0, "max_new_tokens": 24})
    assert found == {"policy": [text]}


@pytest.mark.slow
def test_pairs_winrate_and_eval_stop_there_too(model, tmp_path, monkeypatch):
    folder, text, _ = model
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": PROMPT, "chosen": f" there was {i} cat.", "rejected": f" no {i}"} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data.path", "d.jsonl", "--data.eval-path", "d.jsonl"]
    greedily = ["--temperature", "0", "--max-new-tokens", "24", "--completions", "1"]
    cli.run_command(["pairs", str(folder), "out.jsonl", "--by", "self", "--data.path", "d.jsonl", *greedily])
    assert {row["rejected"] for row in read_metrics(tmp_path / "out.jsonl")} == {text}
    cli.run_command(["winrate", str(folder), "--judge", "happy", "--temperatures", "0", "--out", "w", *data, *SAMPLES])
    assert {row["response"] for row in read_metrics(tmp_path / "w/judgements.jsonl")} == {text}
    options = {"samples": {"temperature": 0.0, "max_new_tokens": 24, "prompts": 1}, "batch_size": 2, "max_steps": 1}
    dpo_jax.train(model=folder, data=rows, eval_data=rows, run="r", optim={"learning_rate": 0.0}, **options)
    assert {row["policy"] for row in read_metrics(tmp_path / "r/samples.jsonl")} == {text}
    found = dpo_jax.evaluate("r", prompts=1)
    assert found["eval_kl"]["n"] == 1


def test_experiments_stop_there_too(model):
    folder, _, end = model
    settings = FrontierConfig(model=ModelConfig(path=str(folder)), reward="happy", max_new_tokens=16)
    made = setup._world(settings)  # noqa: SLF001 (the rest of the setup samples thousands of pairs)
    assert set(made.ends) == {2, end}
    completions = world.sample_completions(made, made.start, [np.array([1, 50], np.int32)], copies=8)
    for ids in completions:
        assert not set(ids[:-1].tolist()) & {2, end}
