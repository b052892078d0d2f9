"""Real data of every form, from files to training steps, through `dpo-jax train`."""

import json

import numpy as np
import pytest

from dpo_jax import cli
from dpo_jax.training.metrics_file import read_metrics

# What there is, how it is to be read, and how many rows it has.
DATA = {
    "the four splits of HH": ("hh", ("hh",), "dpo", 8552),
    "English conversations": ("files", ("conversations", "dpo_en_demo.json"), "dpo", 300),
    "Chinese conversations": ("files", ("conversations", "dpo_zh_demo.json"), "dpo", 300),
    "rows with a label": ("files", ("conversations", "kto_en_demo.json"), "kto", 300),
}
CONFIG = """
data: {name: %s, path: [%s], split: test, eval_fraction: 0.1, eval_examples: 8, max_length: 96, max_prompt_length: 48}
model: {config: model.json, tokenizer: %s}
reference: {mode: online}
loss: {name: %s}
samples: {prompts: 0}
batch_size: 4
max_steps: 2
"""
MODEL = {
    "model_type": "llama", "vocab_size": 6400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("what", DATA)
@pytest.mark.slow
def test_it_trains(what, shared, tmp_path, monkeypatch):
    name, place, loss, count = DATA[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    tokenizer = shared / "tokenizers" / "minimind_6400"
    (tmp_path / "c.yaml").write_text(CONFIG % (name, shared.joinpath("data", *place), tokenizer, loss))
    cli.run_command(["train", "c.yaml", "--run", "run"])
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    read = [line for line in told if "comparisons read" in line]
    assert [line.split()[0] for line in read] == ["training", "held-out"]
    assert sum(int(line.split()[2].replace(",", "")) for line in read) == count
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    at_start = next(row for row in rows if "eval_loss" in row)["eval_loss"]
    assert at_start == pytest.approx(np.log(2) if loss == "dpo" else 0.5, abs=1e-6)  # KTO: 1 - sigmoid(0)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows if "loss" in row)
    if name == "hh":  # of seven such rows four have an empty response too
        dropped = [line.split()[2] for line in told if "rejected transcript does not start with the prompt" in line]
        assert sum(map(int, dropped)) == 3
