"""Summaries in small: the rule that scores them, worked out by hand, and the prompts that reviews become."""

import gzip
import json

import pytest

from dpo_jax.data.sources.functions import open_source
from dpo_jax.errors import UserError
from dpo_jax.experiments.summaries import coverage, reviews
from dpo_jax.rewards.registry import get_reward

HERE = "dpo_jax.experiments.summaries"


def prompt_of(review):
    return f"<user>Review: {review}\n\nSum up this review in one short sentence.<assistant>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", 0.0),
        ("A grand movie.", 10 * 2 / 4),  # of grand, movie, about, whales; the words of the frame do not count
        ("GRAND grand movie, about whales!", 10.0),  # each word once, in any case
        ("short sentence review user", 0.0),
        ("a " * 20, 0.0),
        ("a " * 24 + "grand", 10 / 4 - 0.25 * 5),  # five words beyond twenty
    ],
)
def test_a_summary_has_the_words_of_its_review_in_few(completion, expected):
    assert coverage([prompt_of("A grand movie; about, of all, whales.")], [completion]) == [pytest.approx(expected)]


def test_a_review_without_long_words_scores_its_length_alone():
    assert coverage([prompt_of("So so."), prompt_of("So so.")], ["so so", "so " * 22]) == [0.0, -0.5]


def test_reviews_are_cut_and_keep_their_first_sentence(tmp_path):
    texts = ["It cost $3.50.<br /><br />It  was bad! Never again.", "no end of it", "One. " * 100]
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    found = [*reviews((str(tmp_path / "r.jsonl.gz"),), "train", words=8)]
    frame = "Review: {}\n\nSum up this review in one short sentence."
    assert [row["prompt"] for row in found] == [
        frame.format("It cost $3.50. It was bad! Never again."),
        frame.format("no end of it"),
        frame.format("One. One. One. One. One. One. One. One."),
    ]
    assert [row["completion"] for row in found] == ["It cost $3.50.", "no end of it", "One."]


def test_a_file_without_texts_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"review": "Good."}\n')
    with pytest.raises(UserError, match=r"r.jsonl:1.*text"):
        next(reviews((str(tmp_path / "r.jsonl"),), "train"))


def test_the_names_of_the_config_work(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "Grand whales. Long movie."}\n')
    (pair,) = open_source(f"{HERE}:reviews", (str(tmp_path / "r.jsonl"),), "train", 1)
    assert pair.responses == ("Grand whales.",)
    score = get_reward(f"{HERE}:coverage")([prompt_of("Grand whales. Long movie.")], ["whales"])
    assert score == pytest.approx([10 / 3])
