"""A model and its tokenizer: ids without an embedding, texts longer than the model, folders of another kind."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import folder_of, shared_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_jax
from dpo_jax import cli
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, ModelConfig
from dpo_jax.data.sources import memory, synthetic
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import adapter_folder, load_tokenizer, open_folder
from dpo_jax.training.load import load_policy
from dpo_jax.training.plan import plan_run

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


def test_the_tokenizer_of_another_model_is_refused(model):
    options = ModelConfig(path=str(model))
    load_policy(options, synthetic.synthetic_tokenizer(), 0)
    other = load_tokenizer(shared_model("tinystories-656k"))
    with pytest.raises(UserError, match=rf"vocab_size {WORDS} is too small for the tokenizer's ids up to \d+; set ano"):
        load_policy(options, other, 0)


@pytest.mark.parametrize("special", [False, True])
def test_tokens_that_were_added_get_the_mean_of_the_other_rows(model, special):
    tokenizer = with_token(special)
    loaded = load_policy(ModelConfig(path=str(model)), tokenizer, 0)
    _, _, before = open_folder(model)
    rows, old = np.asarray(loaded.params["embedding"]), np.asarray(before["embedding"])
    grown = -(-(WORDS + 1) // 64) * 64
    assert loaded.model.architecture.vocab == loaded.hf_config["vocab_size"] == len(rows) == grown
    assert np.array_equal(rows[:WORDS], old)
    np.testing.assert_allclose(rows[WORDS:], np.broadcast_to(old.mean(0), (grown - WORDS, 32)), atol=1e-7)
    assert "has no row for 1 tokens of the tokenizer ('<picture>'): its" in loaded.note


def test_an_untied_head_and_its_bias_grow_too(tmp_path):
    folder = folder_of("gptj", tmp_path / "m", vocab_size=WORDS, n_positions=64)
    loaded, (_, _, before) = load_policy(ModelConfig(path=str(folder)), with_token(True), 0), open_folder(folder)
    for key in ("embedding", "head", "head_bias"):
        new, old = np.asarray(loaded.params[key]), np.asarray(before[key])
        np.testing.assert_allclose(new[-1], old.mean(0), atol=1e-6)
        assert len(new) == loaded.model.architecture.vocab
    initial = load_policy(ModelConfig(config=str(folder), tokenizer="x"), with_token(True), 0)
    assert initial.params["embedding"].shape[0] == loaded.model.architecture.vocab


@pytest.mark.slow
def test_a_run_on_added_tokens_exports_them(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_token(True).save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"I {verb}", "chosen": " <picture>", "rejected": " the film"} for verb in ("saw", "chose")]
    data = {"path": [memory.keep_examples(rows * 2)], "eval_path": [memory.keep_examples(rows)], "name": "memory"}
    options = {"data": data | {"max_length": 32, "max_prompt_length": 16}, "batch_size": 4, "max_steps": 2}
    options |= {"model": {"path": str(model), "tokenizer": "tokenizer"}, "samples": {"prompts": 0}, "run": "r"}
    found = dpo_jax.train(optim={"learning_rate": 1e-2, "warmup_steps": 0}, reference=str(model), **options)
    assert found.metrics["eval_rewards/margins"] > 0
    tokens = AutoTokenizer.from_pretrained("r/model")("I saw <picture>", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained("r/model")
    assert int(tokens.max()) == WORDS
    assert theirs.config.vocab_size == theirs.get_input_embeddings().weight.shape[0] > WORDS
    assert torch.isfinite(theirs(tokens).logits).all()
    trained = theirs.get_input_embeddings().weight[WORDS].detach().numpy()
    assert np.abs(trained - np.asarray(open_folder(model)[2]["embedding"]).mean(0)).max() > 1e-4


def test_a_token_of_images_is_refused_in_a_text_and_gets_no_row(model, tmp_path, monkeypatch):
    """As with Gemma 3, whose tokenizer names an image token without an embedding in the 1B model."""
    with_token(True).save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": {"image_token": "<picture>"}}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.convert_tokens_to_ids("<picture>") == WORDS
    assert load_policy(ModelConfig(path=str(model)), tokenizer, 0).model.architecture.vocab == WORDS
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "I saw", "chosen": " <picture>", "rejected": " the film"}] * 4
    data = {"path": [memory.keep_examples(rows)], "eval_path": [memory.keep_examples(rows)], "name": "memory"}
    data |= {"max_length": 32, "max_prompt_length": 16}
    with pytest.raises(UserError, match="training data: the model has no embedding for '<picture>'; remove it"):
        dpo_jax.train(model={"path": str(model), "tokenizer": "tokenizer"}, data=data, run="r")


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


@pytest.mark.parametrize("model_type", ["", "llama", "gpt2", "qwen2"])
def test_a_tokenizer_is_that_of_transformers_whatever_the_model(shared, tmp_path, model_type):
    """transformers chooses a tokenizer's class by the model's type too; we give it the type without its config."""
    text = "Hello  world, it's 12345 o'clock.\n\tÄ 日本"
    for source in sorted((shared / "tokenizers").iterdir()):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
        try:
            expected = AutoTokenizer.from_pretrained(folder)
        except (ValueError, KeyError, AttributeError, TypeError):
            with pytest.raises(UserError, match="no tokenizer could be read"):
                load_tokenizer(folder)
            continue
        found = load_tokenizer(folder)
        assert type(found) is type(expected)
        assert found(text)["input_ids"] == expected(text)["input_ids"]
        assert found.special_tokens_map == expected.special_tokens_map
