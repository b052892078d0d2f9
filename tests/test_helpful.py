"""Dialogues in two halves: every pair is in one of them, and no first question in both."""

import json
from pathlib import Path

import pytest

from dpo_jax.data.encode import encode
from dpo_jax.data.sources.functions import open_source
from dpo_jax.errors import UserError
from dpo_jax.experiments.helpful import dialogues
from dpo_jax.models.huggingface.folder import load_tokenizer

OPTIONS = {"max_length": 256, "max_prompt_length": 128, "truncation": "refuse", "degenerate": "drop", "add_bos": False}
HERE = "dpo_jax.experiments.helpful:dialogues"


@pytest.fixture
def transcripts(tmp_path):
    """Four hundred pairs about 100 first questions, one of which has a rejected answer to another question."""
    path = tmp_path / "test.jsonl"
    with path.open("w") as file:
        for i in range(400):
            opening = f"\n\nHuman: Question {i % 100}\n\nAssistant:"
            opening += f" Which one?\n\nHuman: {i}\n\nAssistant:" * (i >= 300)
            lost = "\n\nHuman: Another\n\nAssistant:" if i == 7 else opening
            json.dump({"chosen": f"{opening} Yes {i}.", "rejected": f"{lost} No {i}."}, file)
            file.write("\n")
    return str(path)


def test_each_pair_is_in_one_half_and_each_question_too(transcripts):
    halves = [list(dialogues((transcripts,), "test", half=half)) for half in ("policy", "judge")]
    assert sorted(int(row["chosen"][5:-1]) for half in halves for row in half) == list(range(400))
    asked = [{row["prompt"].partition("\n\nAssistant:")[0] for row in half} for half in halves]
    assert len(asked[0]) + len(asked[1]) == 100
    assert all(35 <= len(half) <= 65 for half in asked)
    row = next(row for half in halves for row in half if row["chosen"] == " Yes 301.")
    turns = "\n\nHuman: Question 1\n\nAssistant: Which one?\n\nHuman: 301\n\nAssistant:"
    assert row == {"prompt": turns, "chosen": " Yes 301.", "rejected": " No 301."}


def test_an_answer_to_another_question_is_dropped_and_counted(transcripts, shared):
    gpt2 = load_tokenizer(str(shared / "tokenizers" / "gpt2"))
    sizes, dropped = [], []
    for half in ("policy", "judge"):
        stream = open_source(HERE, (transcripts,), "test", 2, (f"half={half}",))
        table, report = encode(stream, gpt2, **OPTIONS)
        sizes.append(len(table))
        dropped.append(report.empty_dropped)
    assert (sum(sizes), sorted(dropped)) == (399, [0, 1])


def test_a_bad_line_is_one_bad_example(transcripts):
    with Path(transcripts).open("a") as file:
        file.write("{}\n")
    stream = open_source(HERE, (transcripts,), "test", 2)
    (bad,) = [item for item in stream if isinstance(item, UserError)]
    assert "test.jsonl:401" in str(bad)


def test_another_half_is_refused(transcripts):
    with pytest.raises(UserError, match=r"half.*'both'.*policy"):
        open_source(HERE, (transcripts,), "test", 2, ("half=both",))
