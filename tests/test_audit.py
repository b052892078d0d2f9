"""`dpo-jax data`: counts against tables by hand, planted shortcuts and none, the page."""

import json
import random
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from words import OPTIONS, make_tokenizer

from dpo_jax.data import audit
from dpo_jax.data.encode import EncodeOptions, encode
from dpo_jax.data.shortcuts import FORMATS, find_shortcuts, fit_shortcut
from dpo_jax.data.sources.base import Note
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison


def pair(prompt, chosen, rejected, **fields):
    return Comparison(prompt, (chosen, rejected), **fields)


def test_counts_by_hand():
    items = [
        pair("p", "a", "b", where="1"),
        pair("p", "a", "b", where="2"),  # the same again
        pair("p", "b", "a"),  # and against both
        pair("p", "a", "c"),
        pair("q", "a", "b"),
        pair("q", "x", "x"),
        pair("r", "u", None),
        pair("r", None, "u"),  # wanted and not
        pair("s", "a", "b"),
        pair("s", "a", "b"),  # again, and against nothing
        Note("is no comparison"),
        UserError("nor is this"),
    ]
    counts = audit.count_pairs(items)
    assert counts[:-1] == (10, 4, 2, 1, 5, 2, 1)
    assert len(counts.keys) == 10
    assert counts.lines() == [
        "10 comparisons of 4 prompts",
        "2 comparisons that repeat an earlier one",
        "1 with identical responses",
        "5 with conflicting labels: the responses of another comparison in another order",
        "2 unpaired, 1 of them wanted",
    ]
    other = audit.count_pairs([pair("q", "1", "2"), pair("t", "1", "2"), pair("q", "3", "4")])
    assert audit.shared_prompts(counts, other) == 2
    assert audit.count_pairs([])[:-1] == (0,) * 7


def test_boundaries_are_compared():
    """Words are tokens here: two texts without a space between them are one token only if tokenized together."""
    tokenizer = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    items = [pair("w1 ", "w2", "w3"), pair("w1 w", "2", "3 w4"), pair("w1", " w2", " w3")]
    assert audit.boundary_differences(items, tokenizer, EncodeOptions(**OPTIONS)) == (1, 3)


@pytest.mark.parametrize("name", ["gpt2", "smollm2_sorachio"])
def test_pieces_join_to_the_text_and_mark_scored_tokens(shared, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    table, _ = encode([pair("Say 你好 🙂", " 你好！", "e\u0301")], tokenizer, **(OPTIONS | {"max_length": 99}))
    prompt, chosen, rejected = audit.pieces(table, 0, tokenizer)
    assert "".join(piece.text for piece in prompt) == "Say 你好 🙂"
    assert "".join(piece.text for piece in chosen) == f" 你好！{tokenizer.eos_token}"
    assert rejected[-1].text == tokenizer.eos_token
    assert not any("\ufffd" in piece.text for part in (prompt, chosen, rejected) for piece in part)
    assert [{piece.scored for piece in part} for part in (prompt, chosen, rejected)] == [{False}, {True}, {True}]


def test_pieces_keep_the_spaces_that_a_tokenizer_leaves_out_at_the_start(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    table, _ = encode([pair("Once upon a time", "a b", "c")], tokenizer, **(OPTIONS | {"max_length": 99}))
    assert "".join(piece.text for piece in audit.pieces(table, 0, tokenizer)[0]) == "Once upon a time"


def test_logistic_regression_is_at_its_minimum():
    """With one feature, 3 of 4 right and no penalty the weight is log 3; elsewhere the gradient is 0."""
    labels = np.array([1.0, 1, 1, -1])
    assert fit_shortcut(np.ones((4, 1)), labels, strength=0.0) == pytest.approx(np.log(3), abs=1e-4)
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(200, 5)), np.sign(rng.normal(size=200))
    weights = fit_shortcut(features, labels)
    slopes = -labels / (1 + np.exp(labels * (features @ weights)))
    np.testing.assert_allclose(features.T @ slopes + weights, 0, atol=2e-3)


def words(rng, count):
    return " ".join(rng.choice(["sun", "moon", "rain", "wind", "snow", "fog"]) for _ in range(count))


def test_a_word_that_gives_the_label_away_is_found_and_length_is_not():
    rng = random.Random(0)
    items = [pair(f"p{i}", f"{words(rng, 9)} please", f"{words(rng, 9)} damned") for i in range(400)]
    length, formats, bags = find_shortcuts(items)
    assert bags.right == bags.total == length.total
    assert {bags.top[0][0], bags.top[1][0]} == {"please", "damned"}
    assert dict(bags.top)["please"] > 0 > dict(bags.top)["damned"]
    assert length.right / length.total < 0.7
    assert (bags.chance, formats.name) == (0.5, "length and format")


def test_words_of_languages_without_spaces_are_their_characters():
    rng = random.Random(0)
    texts = ["".join(rng.choice("天地日月山水") for _ in range(12)) for _ in range(400)]
    items = [pair(f"p{i}", f"{text}好。", f"{text}坏。") for i, text in enumerate(texts)]
    bags = find_shortcuts(items)[2]
    assert bags.right == bags.total
    assert {"好", "坏", "好 。", "坏 。"} == {name for name, _ in bags.top[:4]}
    mixed = [pair(f"p{i}", f"GPT4很{text}", f"GPT3很{text}") for i, text in enumerate(texts)]
    assert {"gpt4", "gpt3", "gpt4 很", "gpt3 很"} == {name for name, _ in find_shortcuts(mixed)[2].top[:4]}


def test_length_alone_is_found():
    rng = random.Random(0)
    items = [pair(f"p{i}", words(rng, rng.randint(8, 20)), words(rng, rng.randint(4, 9))) for i in range(400)]
    length, _, _ = find_shortcuts(items)
    assert length.right / length.total > 0.95
    assert {name for name, _ in length.top} <= {"characters", "log of characters"}


def test_labels_that_nothing_predicts_are_chance():
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(500)}" for _ in range(12)) for _ in range(4000)]
    items = [pair(f"p{i}", *texts[2 * i : 2 * i + 2]) for i in range(2000)]
    for found in find_shortcuts(items):
        assert abs(found.right / found.total - 0.5) < 4 * (0.25 / found.total) ** 0.5


def test_unpaired_responses_are_classified_one_by_one():
    rng = random.Random(0)
    texts = [(words(rng, 9) + (" fine" if i % 4 else " evil"), i % 4 > 0) for i in range(400)]
    items = [pair(f"p{i}", text if good else None, None if good else text) for i, (text, good) in enumerate(texts)]
    length, _, bags = find_shortcuts(items)
    assert bags.right == bags.total
    assert bags.chance == pytest.approx(0.75, abs=0.1)
    assert length.right / length.total == pytest.approx(length.chance, abs=0.05)


def test_formats():
    text = "# Yes\n- one\n2. two **bold**\n```x```\nSure? 3!"
    expected = {
        "characters": 44, "lines": 4, "list items": 2, "headings": 1, "bold": 1, "code blocks": 1, "digits": 2,
        "question marks": 1, "exclamation marks": 1, "begins with a space": 0, "ends with punctuation": 1,
    }  # fmt: skip
    assert {name: FORMATS[name](text) for name in expected} == expected
    assert find_shortcuts([pair("p", "a", "b")] * 49) == []
    assert find_shortcuts([pair("p", "a", "b")] * 60) == []  # one prompt cannot be on both sides


class Page(HTMLParser):
    """Checks that elements close in order, and collects their names and texts."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_weights_of_tokens_are_marked_where_they_end(tmp_path, shared, monkeypatch, capsys):
    """Of one response with weights; of the other, with weights of 1, nothing is marked."""
    from dpo_jax import cli

    row = {"prompt": "I saw it.", "chosen": " I loved it so much", "rejected": " I hated it"}
    rows = [{**row, "prompt": f"I saw it {i}.", "token_weights": [[2, 2, 0, 0.5, 1], None]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = "data: {path: [a.jsonl], eval_fraction: 0.2, max_length: 64, max_prompt_length: 32}\n"
    (tmp_path / "c.yaml").write_text(config + f"model: {{config: x.json, tokenizer: {shared}/tokenizers/gpt2}}\n")
    monkeypatch.chdir(tmp_path)
    cli.run_command(["data", "c.yaml", "--out", "a.html", "--show", "1"])
    said, html = capsys.readouterr().out, (tmp_path / "a.html").read_text()
    assert "chosen:  I loved×2 it×0 so×0.5 much<|endoftext|>×1\n" in said
    assert "rejected:  I hated it<|endoftext|>\n" in said
    assert " loved</span><sub>×2</sub> it<sub>×0</sub><span" in html
    assert "A mark such as ×2 is the weight of the tokens before it" in html
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({**one, "token_weights": None}) for one in rows))
    cli.run_command(["data", "c.yaml", "--out", "a.html", "--show", "1"])
    assert "×" not in capsys.readouterr().out + (tmp_path / "a.html").read_text()


def test_the_command(tmp_path, shared, monkeypatch, capsys):
    from dpo_jax import cli

    rng = random.Random(0)
    prompts = [f"I saw it {i} <script>alert(1)</script> {words(rng, 3)}." for i in range(200)]
    texts = [(f" I loved it, {words(rng, 3)}", f" I hated <b>it</b>, {words(rng, 3)}") for _ in prompts]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in zip(prompts, texts, strict=True)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, lines[0], "{bad"]))
    config = "data: {path: [a.jsonl], skip_bad_rows: 1, eval_fraction: 0.2, max_length: 300, max_prompt_length: 100}\n"
    (tmp_path / "first.yaml").write_text(config + f"model: {{config: x.json, tokenizer: {shared}/tokenizers/gpt2}}\n")
    (tmp_path / "c.yaml").write_text(config + "model: {path: first.yaml}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["dpo-jax", "data", "c.yaml", "--show", "2"])
    cli.main()
    said = capsys.readouterr().out
    assert "training data: 1 comparisons that repeat an earlier one" in said
    assert "training data: 1 bad examples skipped; the first: a.jsonl:202: not valid JSON" in said
    assert "shortcut: words and pairs of words predict 1.000" in said
    html = (tmp_path / "runs" / "c.data.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert not page.seen & {"script", "b", "img", "iframe"}
    assert "alert(1)" in "".join(page.text)
    assert "1 comparisons that repeat an earlier one" in page.text
    assert 'class="t0"' in html


def test_the_command_on_unpaired_and_single_responses(tmp_path, shared, monkeypatch, capsys):
    """Unpaired responses have a label to predict, which DPO cannot use; single responses have none."""
    from dpo_jax import cli

    rng = random.Random(0)
    rows = [{"prompt": f"p{i}", "completion": f" {words(rng, 5)}", "label": i % 3 > 0} for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = "data: {path: [a.jsonl], eval_fraction: 0.2, max_length: 64, max_prompt_length: 32}\n"
    (tmp_path / "c.yaml").write_text(config + f"model: {{config: x.json, tokenizer: {shared}/tokenizers/gpt2}}\n")
    monkeypatch.chdir(tmp_path)
    found = {}
    for loss in ("dpo", "kto", "sft"):
        cli.run_command(["data", "c.yaml", "--loss.name", loss, "--out", f"{loss}.html", "--show", "3"])
        found[loss] = capsys.readouterr().out, (tmp_path / f"{loss}.html").read_text()
    refusal = (
        "comparisons with an absent response (unpaired), which this loss cannot use; set another loss or remove them"
    )
    assert {loss: f"{refusal}\n" in said.replace(":", "\n") for loss, (said, _) in found.items()} == {
        "dpo": True, "kto": False, "sft": False
    }  # fmt: skip
    assert refusal in found["dpo"][1]
    assert all("Shortcuts" in found[loss][1] for loss in ("dpo", "kto"))
    assert "Shortcuts" not in found["sft"][1]
    said = found["kto"][0]
    held = sum(int(line.split(": ")[1].split()[0]) for line in said.splitlines() if " of them wanted" in line)
    wanted = sum(int(line.split(", ")[1].split()[0]) for line in said.splitlines() if " of them wanted" in line)
    assert (held, wanted) == (120, 80)
    assert {"chosen: ", "rejected: "} <= {line[: line.find(":") + 2] for line in said.splitlines()}
    assert "<td>chosen</td>" in found["kto"][1]
