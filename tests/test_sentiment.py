"""`scripts/sentiment` finds the minimum that it names, and what it writes is a reward."""

import gzip
import itertools
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dpo_jax.rewards.registry import get_reward

SCRIPT = Path(__file__).parent.parent / "scripts" / "sentiment"


@pytest.fixture(scope="module")
def reviews(shared):
    with gzip.open(shared / "data/imdb/train_8k.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in itertools.islice(file, 1000)]


def run(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True)


def test_no_slope_is_left(reviews):
    """The slopes written out once more, for weights w = ratio * scaled: X'(p - y) / n + penalty w / ratio^2 = 0."""
    sentiment = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    texts, labels = [r["text"] for r in reviews], np.array([bool(r["label"]) for r in reviews])
    bias, weights = sentiment.fitted(sentiment.Labelled(texts, labels), 300, 1e-2)
    has = np.array([[name in found for name in weights] for found in map(sentiment.ngrams, texts)], float)
    w = np.array(list(weights.values()))
    slopes = 1 / (1 + np.exp(-(has @ w + bias))) - labels
    assert abs(slopes.mean()) < 1e-4
    counts = np.array([1 + has[labels == side].sum(0) for side in (True, False)])
    ratio = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
    pull, push = ratio * (has.T @ slopes) / len(labels), 1e-2 * w / ratio
    assert np.abs(push).max() > 1e-3
    np.testing.assert_allclose(pull, -push, atol=1e-4)
    assert list(weights)[:3] == ["the", "a", "and"]  # the most frequent ones


def test_what_is_written_is_a_reward(reviews, shared, tmp_path):
    train, test, out = tmp_path / "train.jsonl", shared / "data/imdb/test_2k.jsonl.gz", tmp_path / "out.json.gz"
    train.write_text("\n".join(map(json.dumps, reviews)))
    done = run(out, "--train", train, "--test", test, "--features", 20000)
    assert done.returncode == 0, done.stderr
    with gzip.open(test, "rt") as file:
        rows = [json.loads(line) for line in file]
    scores = get_reward(f"logistic:{out}")([""] * len(rows), [r["text"] for r in rows])
    right = np.mean([(score > 0) == r["label"] for score, r in zip(scores, rows, strict=True)])
    assert right > 0.8
    assert f"right on {right:.4f} (" in done.stdout
    assert "of 2,000 texts" in done.stdout


def test_the_responses_of_a_run_are_told_apart_on_its_held_out_pairs(tmp_path):
    """Chosen responses of the training pairs say "good"; of four held-out pairs one has it the other way round."""
    good, bad = "a good answer", "a bad answer"
    rows = [{"prompt": f"{i}", "chosen": good, "rejected": bad} for i in range(30)]
    held = [{"prompt": f"h{i}", "chosen": good, "rejected": bad} for i in range(3)]
    held.append({"prompt": "h3", "chosen": bad, "rejected": good})
    for name, part in (("train", rows), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (config := tmp_path / "run.yaml").write_text("data: {path: [train.jsonl], eval_path: [held.jsonl]}\n")
    out = tmp_path / "out.json.gz"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), "--config", str(config)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "right on 0.7500 (" in done.stdout
    assert "of 4 pairs" in done.stdout
    weights = json.loads(gzip.decompress(out.read_bytes()))["weights"]
    assert weights["good"] > 0 > weights["bad"]
    assert "a" not in weights  # as often in both


def test_a_run_brings_its_own_data(tmp_path):
    done = run(tmp_path / "out.json.gz", "--config", "run.yaml", "--test", "rows.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sentiment: --config: names the data of a run; remove --train and --test\n"


def test_rows_without_a_label_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": "neg"}\n')
    done = run(tmp_path / "out.json.gz", "--train", path, "--test", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"sentiment: {path}:2: a row has a `text` and a `label`, 0 or 1\n"
