"""A model and its tokenizer: ids without an embedding, texts longer than the model, folders of another kind."""

import json

import pytest
import yaml
from tiny import folder_of
from tokenizers import AddedToken

from dpo_jax import cli
from dpo_jax.commands.plan import plan_run
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, ModelConfig
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import adapter_folder, open_folder
from dpo_jax.training.load import load_policy

WORDS = len(synthetic.synthetic_tokenizer())


def with_token(special):
    """Returns a tokenizer with one more token."""
    tokenizer = synthetic.synthetic_tokenizer()
    tokenizer.add_tokens([AddedToken("<picture>", special=special)])
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with the vocabulary of the synthetic tokenizer."""
    return folder_of("gpt2", tmp_path_factory.mktemp("model") / "m", vocab_size=WORDS, n_positions=64)


def test_a_vocabulary_without_the_tokenizers_ids_is_refused(model):
    options = ModelConfig(path=str(model))
    load_policy(options, synthetic.synthetic_tokenizer(), 0)
    message = f"vocab_size {WORDS} is too small for the tokenizer's ids up to {WORDS}"
    with pytest.raises(UserError, match=message):
        load_policy(options, with_token(False), 0)
    ending = with_token(True)
    ending.eos_token = "<picture>"
    with pytest.raises(UserError, match=message):
        load_policy(options, ending, 0)


def test_a_special_token_that_only_other_models_know_is_refused_in_a_text(model, tmp_path, monkeypatch):
    """As with Gemma 3, whose tokenizer has an image token without an embedding in the 1B model."""
    load_policy(ModelConfig(path=str(model)), with_token(True), 0)
    monkeypatch.chdir(tmp_path)
    with_token(True).save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"prompt": f"I {verb}", "chosen": " this film", "rejected": " the film"} for verb in ("saw", "chose", "like")
    ]
    rows += [{"prompt": "I saw", "chosen": " <picture>", "rejected": " the film"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "data": {"path": ["pairs.jsonl"], "eval_path": ["pairs.jsonl"], "max_length": 32, "max_prompt_length": 16}
    }
    options |= {"model": {"path": str(model), "tokenizer": "tokenizer"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(UserError, match="training data: the model has no embedding for '<picture>'; remove it"):
        cli.run_command(["train", "run.yaml"])


def test_texts_longer_than_the_model_are_refused_by_every_command(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic.synthetic_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chosen = ["--data.max-length", "65", "--model.tokenizer", "tokenizer"]
    message = "data.max_length: 65 exceeds the model's 64 positions"
    with pytest.raises(UserError, match=message):
        cli.run_command(["eval", str(model), "--reference.path", str(model), "--data.path", "none.jsonl", *chosen])
    with pytest.raises(UserError, match=message):
        plan_run(parse_config(Config, None, ["--model.path", str(model), *chosen], prog="x"))


def test_a_folder_of_adapters_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"config.json is missing; these are adapters: give them as lora.path, and the mod"
    ):
        open_folder(tmp_path)


def test_adapters_are_found_in_the_folder_of_a_run(tmp_path):
    assert adapter_folder(str(tmp_path)) == tmp_path
    (tmp_path / "config.yaml").write_text("")
    assert adapter_folder(str(tmp_path)) == tmp_path / "adapter"
