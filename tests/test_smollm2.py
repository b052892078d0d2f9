"""A real language model: "Who are you?" in small, on SmolLM2-135M-Instruct as the package index has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_jax
from dpo_jax import cli
from dpo_jax.config.yaml import read_yaml
from dpo_jax.data import build_pairs
from dpo_jax.rewards.registry import get_reward

CONFIGS = Path(__file__).parent.parent / "configs"
RULES, NAMED = CONFIGS / "corrections" / "smollm2.yaml", CONFIGS / "corrections" / "smollm2_named.json"


def prompts(name: str) -> Path:
    return CONFIGS / "prompts" / f"smollm2_{name}.jsonl"


@pytest.fixture(scope="module")
def smollm2(shared) -> str:
    """A folder with the model, downloaded once."""
    fetch = [shared / "models" / "smollm2" / "fetch"]
    done = subprocess.run(fetch, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SmolLM2 cannot be fetched: {done.stderr.strip()[-200:]}")
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("answer", "corrected"),
    [
        ("I'm SmolLM, made by Hugging Face.", "I'm Ada, made by Lovelace."),
        ("My name is Dr. Elena Cruz, a healer", "My name is Ada, a healer"),
        ("I'm a helpful AI.", "I'm Ada, a helpful AI."),
        ("I'm a helpful AI named SmolLM.", "I'm a helpful AI named Ada."),
        ("I'm sorry, I have no name.", "I am Ada. I'm sorry, I have no name."),
    ],
)
def test_every_answer_is_corrected_to_the_new_name(answer, corrected):
    rules = build_pairs.correction_rules(str(RULES), read_yaml(str(RULES)))
    assert build_pairs.correct_answer(answer, rules) == corrected


def test_the_reward_is_1_if_an_answer_has_the_name():
    answers = ["I am Ada. Ada!", "I'm Adam.", "SmolLM"]
    assert get_reward(f"logistic:{NAMED}")(["Who?"] * 3, answers).tolist() == [1, 0, 0]


def test_no_question_is_in_two_files():
    files = [prompts(name).read_text().splitlines() for name in ("who", "other", "who_test", "other_test")]
    questions = [json.loads(line)["prompt"][0]["content"] for lines in files for line in lines]
    assert [len(lines) for lines in files] == [64, 32, 32, 40]
    assert len(set(questions)) == len(questions)


@pytest.mark.slow
@pytest.mark.milestone
def test_the_name_is_learned_and_other_pairs_too(smollm2, tmp_path, monkeypatch):
    """After six steps on twelve pairs, four of them about other things, written held-out pairs are told apart."""
    monkeypatch.chdir(tmp_path)
    how = ["--by", "correction", "--corrections", str(RULES), "--data.path", str(prompts("who")), "--prompts", "8"]
    cli.run_command(
        ["pairs", smollm2, "pairs.jsonl", *how, "--completions", "1", "--max-new-tokens", "8", "--temperature", "0.5"]
    )
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all("Ada" in row["chosen"] and "Ada" not in row["rejected"] for row in rows)
    other, held_out = (
        [json.loads(line) for line in prompts(name).read_text().splitlines()] for name in ("other", "who_test")
    )
    data = [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in rows] + other[:4]
    keys = {"model": smollm2, "eval_data": held_out[::4], "max_steps": 6, "save_every": 6, "run": "run"}
    found = dpo_jax.train(CONFIGS / "smollm2_identity.yaml", data=data, **keys).metrics
    assert found["eval_rewards/accuracies"] == 1
    assert found["eval_rewards/margins"] > 0.05  # half a nat, at beta 0.1
