"""Pairs built by each value of --by, on examples small enough to check by eye, and by the command."""

import importlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml

from dpo_jax import cli
from dpo_jax.config.yaml import read_yaml
from dpo_jax.data import build_pairs
from dpo_jax.data.sources.base import load_comparisons
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison
from dpo_jax.training.metrics_file import read_metrics

GREETING = Chat(({"role": "user", "content": "Who are you?"},))


def rules_of(file):
    return build_pairs.correction_rules(str(file), read_yaml(file))


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write


def pairs(*argv):
    cli.run_command(["pairs", *argv])
    return read_metrics(next(a for a in argv if a.startswith("out")))


def test_corrections_are_made_in_their_order(tmp_path):
    (tmp_path / "who.yaml").write_text(
        yaml.safe_dump({r"I am \w+": "I am Ada", r"Ada, made by (\w+)": r"Ada, not \1's"}, sort_keys=False)
    )
    rules = rules_of(tmp_path / "who.yaml")
    assert build_pairs.correct_answer("Hi! I am Qwen, made by Acme.", rules) == "Hi! I am Ada, not Acme's."
    assert build_pairs.correct_answer("I don't know.", rules) == "I don't know."


def test_a_rule_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "who.yaml").write_text("No: Yes")
    with pytest.raises(UserError, match=r"who.yaml: False: True: both must be text"):
        rules_of(tmp_path / "who.yaml")


@pytest.mark.parametrize(("pattern", "replacement"), [("(", "x"), ("a", r"\1")])
def test_an_invalid_rule_is_refused(tmp_path, pattern, replacement):
    (tmp_path / "who.yaml").write_text(yaml.safe_dump({pattern: replacement}))
    with pytest.raises(UserError, match=r"who.yaml: .*no pattern and replacement"):
        rules_of(tmp_path / "who.yaml")


def test_corruption_drops_doubles_or_swaps_one_word_in_five():
    text = " one two three four five\n"
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        damaged = build_pairs.corrupt_answer(text, rng)
        if damaged is None:  # the edit changed nothing
            continue
        words = damaged.split()
        assert damaged.endswith("\n")
        assert damaged != text
        assert set(words) <= set(text.split())
        seen.add(len(words))
        if len(words) == 5:  # two were swapped
            assert sum(a != b for a, b in zip(words, text.split(), strict=True)) == 2
    assert seen == {4, 5, 6}
    assert build_pairs.corrupt_answer("one", rng) == "oneone"
    assert build_pairs.corrupt_answer(" \n", rng) is None


def test_the_answer_to_the_next_other_prompt():
    rows = [Comparison(p, (r,)) for p, r in (("a", "1"), ("a", "2"), ("b", "3"), ("c", "4"))]
    assert list(build_pairs.other_answers(rows)) == ["3", "3", "4", "1"]


def test_unpaired_examples_become_every_pair_and_back(at):
    rows = [("p", "good", True), ("p", "bad", False), ("p", "better", True), ("q", "alone", True), ("p", "bad", False)]
    at("single.jsonl", [{"prompt": p, "completion": c, "label": w} for p, c, w in rows])
    found = pairs("out.jsonl", "--by", "paired", "--data.path", "single.jsonl")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [("p", "good", "bad"), ("p", "better", "bad")]
    assert found[0]["provenance"] == {"by": "paired", "row": "single.jsonl:1"}
    back = pairs("out2.jsonl", "--by", "single", "--data.path", "out.jsonl")
    assert [(r["completion"], r["label"]) for r in back] == [
        ("good", True), ("bad", False), ("better", True), ("bad", False),
    ]  # fmt: skip
    assert back[2]["provenance"] == {"by": "single", "row": "out.jsonl:2"}


@pytest.mark.parametrize("way", ["others", "corrupted", "single"])
def test_pairs_of_data_are_written_as_they_are_read(way, at):
    """Of 4 MB of texts, little is in memory at a time; a command takes 1 MB without any."""
    name, more = ("chosen", {"rejected": "r"}) if way == "single" else ("completion", {})
    at("in.jsonl", [{"prompt": f"{i // 2}", name: f"{i} {'x' * 2000}", **more} for i in range(2000)])
    importlib.import_module("dpo_jax.commands.pairs")  # before what it takes is counted
    tracemalloc.start()
    cli.run_command(["pairs", "out.jsonl", "--by", way, "--data.path", "in.jsonl"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_600_000
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(lines) == (4000 if way == "single" else 2000)
    if way == "others":  # that of the next prompt, and the first one's at the end
        numbers = [int(line["rejected"].split()[0]) for line in lines]
        assert numbers == [2 * (i // 2 + 1) % 2000 for i in range(2000)]


def test_weights_are_kept_and_soft_preferences_refused(at, capsys):
    pair = {"prompt": "p", "chosen": "a b", "rejected": "c"}
    at("soft.jsonl", [pair | {"preference": 0.1}])
    with pytest.raises(UserError, match=r"soft.jsonl:1: preference 0.1: a row alone is wanted or not"):
        pairs("out.jsonl", "--by", "single", "--data.path", "soft.jsonl")
    assert not list(Path().glob("out*"))
    at("heavy.jsonl", [pair | {"weight": 0.25}])
    assert [r["weight"] for r in pairs("out.jsonl", "--by", "single", "--data.path", "heavy.jsonl")] == [0.25, 0.25]
    with pytest.raises(UserError, match=r"out.jsonl:1: weight 0.25: a pair is made of two rows"):
        pairs("out2.jsonl", "--by", "paired", "--data.path", "out.jsonl")
    both = [{"prompt": "p", "completion": "x", "label": label} for label in (True, False)]
    at("both.jsonl", both)
    with pytest.raises(UserError, match=r"out3.jsonl: no pair could be built from 2 examples"):
        pairs("out3.jsonl", "--by", "paired", "--data.path", "both.jsonl")
    assert "1 responses both wanted and not, left out" in capsys.readouterr().out
    at("bad.jsonl", [{"prompt": "p"}, {"prompt": "p", "completion": "x y"}])
    assert pairs("out4.jsonl", "--by", "corrupted", "--data.path", "bad.jsonl", "--data.skip_bad_rows", "1")
    assert "1 invalid examples skipped" in capsys.readouterr().out


def test_a_transcript_of_another_dialogue_is_left_out(at, capsys):
    turn = "\n\nHuman: {}\n\nAssistant: {}".format
    rows = [(turn("a", "1"), turn("a", "2")), (turn("some question", "3"), turn("q", "4"))]
    at("hh.jsonl", [{"chosen": c, "rejected": r} for c, r in rows])
    single = pairs("out.jsonl", "--by", "single", "--data.name", "hh", "--data.path", "hh.jsonl")
    assert [(r["completion"], r["label"]) for r in single] == [(" 1", True), (" 2", False)]
    assert "1 examples left out: the rejected transcript does not start with the prompt" in capsys.readouterr().out


def test_rejected_responses_for_data_without_any(at, capsys):
    turns = [
        [*GREETING.messages, answer("I am Ada, and you?")],
        [{"role": "user", "content": "Sum?"}, answer("It is 4")],
    ]
    at("chats.jsonl", [{"messages": t} for t in turns])
    others = pairs("out.jsonl", "--by", "others", "--data.path", "chats.jsonl")
    assert [r["rejected"] for r in others] == [[answer("It is 4")], [answer("I am Ada, and you?")]]
    assert "2 pairs from 2 of 2 prompts: out.jsonl" in capsys.readouterr().out
    damaged = pairs("out2.jsonl", "--by", "corrupted", "--data.path", "chats.jsonl", "--seed", "3")
    assert all(r["rejected"] != r["chosen"][0]["content"] for r in damaged)
    assert damaged == pairs("out3.jsonl", "--by", "corrupted", "--data.path", "chats.jsonl", "--seed", "3")
    several = [*GREETING.messages, answer("Hm?"), {"role": "user", "content": "Who?"}, answer("I am Ada")]
    at("several.jsonl", [{"messages": GREETING.messages, "chosen": several[-3:], "rejected": [answer("no")]}])
    (row,) = pairs("out4.jsonl", "--by", "corrupted", "--data.path", "several.jsonl", "--seed", "3")
    assert row["chosen"] == several[-3:]
    assert row["rejected"][:2] == several[-3:-1]
    assert row["rejected"][2]["content"] != "I am Ada"
    for name in ("out.jsonl", "out2.jsonl"):  # the output is read back
        first = load_comparisons("files", (name,), "train", 2)[0]
        assert first.prompt == GREETING
        assert first.responses[0] == answer("I am Ada, and you?")


def test_a_models_own_answers(at, shared):
    model = str(shared / "models" / "tinystories-656k")
    tokenizer = str(shared / "models" / "tinystories-656k" / "tokenizer_noprefix.json")
    at(
        "stories.jsonl",
        [{"prompt": "Once upon a time", "completion": " all was well."}, {"prompt": "One day", "completion": " x"}],
    )
    Path("who.yaml").write_text("'[Tt]he': 'that'\n")
    how = ("--model.tokenizer", tokenizer, "--data.path", "stories.jsonl", "--data.add_bos", "--max-new-tokens", "24")
    fixed = pairs(model, "out.jsonl", "--by", "correction", "--corrections", "who.yaml", *how)
    assert fixed
    for row in fixed:
        assert row["chosen"] == row["rejected"].replace("the", "that").replace("The", "that") != row["rejected"]
    own = pairs(model, "out2.jsonl", "--by", "self", "--completions", "2", "--prompts", "1", *how)
    assert [r["chosen"] for r in own] == [" all was well."] * 2
    assert own[0]["provenance"]["model"] == model
    best = pairs(model, "out3.jsonl", "--reward", "happy", "--label", "ranked", *how)
    for row in best:
        assert row["provenance"]["scores"][0] > row["provenance"]["scores"][1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["out.jsonl", "--reward", "happy"], r"--by reward: give RUN_OR_MODEL and OUT.jsonl"),
        (["model", "out.jsonl"], r"--reward is required by \(and only valid with\) --by reward"),
        (["out.jsonl.gz", "--by", "others"], r"out.jsonl.gz: the output is JSON lines; give .* ends in .jsonl"),
        (["out.jsonl", "--by", "corrupted", "--reward", "happy"], r"--reward is required by .* --by reward"),
        (["m", "out.jsonl", "--by", "correction"], r"--corrections is required by .* --by correction"),
        (["m", "out.jsonl", "--by", "paired"], r"--by paired: give OUT.jsonl, then options"),
        (["out.jsonl", "--by", "others", "--prompts", "0"], r"at least 1"),
        (["out.jsonl", "--by", "othes"], r"othes"),
        (["out.jsonl", "--by", "others", "--temperature", "0.3"], r"--temperature has no effect with --by others"),
        (["out.jsonl", "--by", "others", "--data.flip_labels", "1"], r"--data.flip_labels has no effect"),
        (["m", "out.jsonl", "--by", "self", "--label", "ranked"], r"--label has no effect with --by self"),
        (["m", "out.jsonl", "--reward", "happy", "--batch-size", "0"], r"--batch-size must be at least 1"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        cli.run_command(["pairs", *argv])
