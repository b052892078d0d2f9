"""Rewards by transformers classifiers: small random models of a real architecture with a real tokenizer."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers

from dpo_jax.errors import UserError
from dpo_jax.rewards.registry import get_reward

PROMPTS = ["Once upon a time", "The", "", "Tom had a dog. " * 20]
COMPLETIONS = [" there was a girl.", " end", "What?", "It barked."]
LABELS = {"NEGATIVE": 0, "NEUTRAL": 1, "POSITIVE": 2}


def write(folder, shared, kind=transformers.RobertaForSequenceClassification, labels=LABELS):
    """Writes a random model with logits far apart and a real tokenizer; returns its folder."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=42, pad_token_id=0, label2id=labels, id2label={i: name for name, i in labels.items()},
        initializer_range=0.5,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(shared / "models/stories260k" / name, folder)
    return folder


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    return write(tmp_path_factory.mktemp("classifier"), shared)


def probabilities(folder, texts):
    """Probabilities [texts, labels], text by text without padding; the fourth text is cut at the 41 positions."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"][:41]]) for text in texts]
        return np.concatenate([model(input_ids=i).logits.double().softmax(-1).numpy() for i in ids])


def test_the_reward_is_the_log_odds_of_the_label(folder, caplog):
    p = probabilities(folder, [a + b for a, b in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert np.ptp(p, axis=0).min() > 0.05  # another label or text would differ
    for label, place in LABELS.items():
        found = get_reward(f"classifier:{folder}#{label}")(PROMPTS, COMPLETIONS)
        np.testing.assert_allclose(found, np.log(p[:, place] / (1 - p[:, place])), rtol=1e-4, atol=1e-5)
    assert caplog.text.count("1 of 4 texts have more than 41 tokens; their starts count") == 3
    assert get_reward(f"classifier:{folder}#POSITIVE")([], []).shape == (0,)


def test_many_texts_keep_their_order(folder):
    """More than a batch, of mixed lengths."""
    completions = ["very " * (i * 7 % 13) + "good" for i in range(80)]
    reward = get_reward(f"classifier:{folder}#POSITIVE")
    one_by_one = [reward([""], [text])[0] for text in completions]
    np.testing.assert_allclose(reward([""] * 80, completions), one_by_one, rtol=1e-4, atol=1e-5)


def test_one_label_is_its_logit(shared, tmp_path):
    write(tmp_path, shared, labels={"reward": 0})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("The end", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, 0].item()
    assert get_reward(f"classifier:{tmp_path}")(["The"], [" end"]) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "name a label as FOLDER#LABEL; known: NEGATIVE, NEUTRAL, POSITIVE"), ("#POSITIV", "mean 'POSITIVE'")],
)
def test_a_label_must_be_named(folder, name, message):
    with pytest.raises(UserError, match=message):
        get_reward(f"classifier:{folder}{name}")


def test_a_model_without_a_trained_head_is_refused(shared, tmp_path):
    write(tmp_path, shared, transformers.RobertaForMaskedLM)
    with pytest.raises(UserError, match=r"holds RobertaForMaskedLM; give a .*ForSequenceClassification"):
        get_reward(f"classifier:{tmp_path}#POSITIVE")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["RobertaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"classifier lacks classifier\.dense\.bias"):
        get_reward(f"classifier:{tmp_path}#POSITIVE")


def test_a_pickle_is_not_read(shared, tmp_path):
    write(tmp_path, shared)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot read a classifier: .*safetensors"):
        get_reward(f"classifier:{tmp_path}#POSITIVE")


def test_without_torch(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"not installed; install dpo_jax\[classifier\]"):
        get_reward(f"classifier:{folder}#POSITIVE")
