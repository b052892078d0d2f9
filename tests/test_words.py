"""Word lists and the logistic regression against sums by hand, and against real reviews."""

import gzip
import json
import math
import sys
import types

import pytest

from dpo_jax.errors import UserError
from dpo_jax.rewards.registry import get_reward
from dpo_jax.rewards.words import ngrams


def written(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_word_list_adds_up_every_occurrence(tmp_path):
    path = written(tmp_path / "list.json", {"good": 1, "bad": -2.5})
    found = get_reward(f"words:{path}")(["good good"] * 3, ["Good, GOOD; bad goodness", "", "badly"])
    assert found.tolist() == [-0.5, 0.0, 0.0]


def test_ngrams_are_a_set_of_words_and_neighbours():
    assert ngrams("It's bad,<br />bad! Is IT?") == {
        *("it's", "bad", "!", "is", "it", "?"),
        *("it's bad", "bad bad", "bad !", "! is", "is it", "it ?"),
    }
    assert ngrams("") == set()


def test_a_logistic_regression_reads_prompt_and_completion_as_one_text(tmp_path):
    weights = {"not": -0.5, "not good": -2.0, "good": 1.0, "good good": 10.0}
    path = written(tmp_path / "lr.json", {"bias": 0.25, "weights": weights})
    found = get_reward(f"logistic:{path}")(["It is not", "", "Good", ""], [" good", "good", " day. Good", "a"])
    assert found.tolist() == [0.25 - 0.5 - 2.0 + 1.0, 1.25, 1.25, 0.25]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("words", {"good": "1"}, "the weight of 'good' is '1', not a finite number"),
        ("words", {"good": True}, "the weight of 'good' is True"),
        ("words", {"Good": 1}, "'Good' is not a word"),
        ("words", ["good"], "not a JSON object"),
        ("logistic", {"good": 1}, "not a logistic regression"),
        ("logistic", {"bias": 0, "weights": [1]}, r'write {"bias": number, "weights": {n-gram: number}}'),
        ("logistic", {"bias": None, "weights": {}}, "the weight of 'bias' is None"),
        ("logistic", {"bias": 0, "weights": {"a": math.nan}}, "the weight of 'a' is nan"),
    ],
)
def test_invalid_files_are_refused(tmp_path, kind, content, message):
    path = written(tmp_path / "x.json", content)
    with pytest.raises(UserError, match=message) as error:
        get_reward(f"{kind}:{path}")
    assert str(path) in str(error.value)


def test_the_logistic_regression_of_real_reviews_is_right_about_nine_of_ten(shared):
    """90.5% was measured on 25,000 reviews; the standard error on these 2,000 is 0.7%."""
    with gzip.open(shared / "data/imdb/test_2k.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    score = get_reward(f"logistic:{shared / 'data/sentiment_lr/weights.json.gz'}")
    found = score([""] * len(rows), [row["text"] for row in rows])
    right = sum((s > 0) == (row["label"] == 1) for s, row in zip(found, rows, strict=True))
    assert abs(right / len(rows) - 0.905) < 0.02


def test_vader_is_refused_if_it_is_not_installed(monkeypatch):
    from dpo_jax.errors import UserError
    from dpo_jax.rewards import words
    from dpo_jax.rewards.registry import get_reward

    words._analyser.cache_clear()  # noqa: SLF001
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match=r"install dpo_jax\[vader\]"):
        get_reward("vader")(["p"], ["c"])


def test_vader_is_the_compound_score_of_the_completion(monkeypatch):
    """A stand-in with the interface of the optional package."""
    from dpo_jax.rewards import words
    from dpo_jax.rewards.registry import get_reward

    class Analyser:
        def polarity_scores(self, text):
            return {"neg": 0.0, "compound": len(text) / 10}

    module = types.SimpleNamespace(SentimentIntensityAnalyzer=Analyser)
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    words._analyser.cache_clear()  # noqa: SLF001
    assert get_reward("vader")(["prompt"], ["four"]).tolist() == [0.4]
    words._analyser.cache_clear()  # noqa: SLF001
