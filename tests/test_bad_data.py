"""Bad data through the command line: one line names the example, or it is skipped and counted."""

import json

import numpy as np
import pytest
from words import make_tokenizer

from dpo_jax import cli, losses
from dpo_jax.config.schema import Config, DataConfig
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Tokens
from dpo_jax.training.tables import eval_examples, label_faults

USER, YES, NO = ({"role": r, "content": f"w{i}"} for i, r in enumerate(("user", "assistant", "assistant")))
PAIR = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}
TALK = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
SINGLE = {"prompt": "w1 w2", "completion": "w3", "label": True}
RANKED = {"prompt": "w1 w2", "completions": ["w3", "w4", "w5"], "scores": [3, 2, 1]}
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'w99' %}{{ raise_exception('no w99') }}{% endif %}w9 {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
)
RANK = ("--loss.name", "plackett_luce", "--data.responses", "3")
# Name: a good example, a bad one (or its bytes), arguments, the message.
BAD = {
    "a column of mixed types": (PAIR, PAIR | {"chosen": 3}, (), "'chosen' must be text, not a number"),
    "texts and conversations": (PAIR, TALK, (), "a conversation, but the examples before it are texts"),
    "no JSON": (PAIR, b'{"prompt": "w1"', (), "not valid JSON"),
    "no UTF-8": (PAIR, b'{"prompt": "\xff"}', (), "not UTF-8 text"),
    "an endless line": (PAIR, b"w" * 10_000_000, (), "not valid JSON"),
    "a template that fails": (
        TALK,
        TALK | {"chosen": [YES | {"content": "w99"}]},
        (),
        "the chat template fails: no w99",
    ),
    "no user turn": (TALK, TALK | {"prompt": [{"role": "system", "content": "w1"}]}, (), "the prompt has no user turn"),
    "no assistant turn": (TALK, TALK | {"chosen": [USER]}, (), "'chosen' does not end with an assistant turn"),
    "no binary label": (SINGLE, SINGLE | {"label": 2}, ("--loss.name", "kto"), "'label' must be true or false, not 2"),
    "scores that are NaN": (PAIR, PAIR | {"scores": [1, float("nan")]}, (), "'scores' must be finite, not nan"),
    "a tie of a ranking": (RANKED, RANKED | {"scores": [2, 2, 1]}, RANK, "two responses have the same score, a tie"),
    "an empty prompt": (PAIR, PAIR | {"prompt": ""}, (), "the prompt has no tokens"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a command on the bytes of a file: (exit code, stdout, stderr)."""
    tokenizer = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    limits = "max_length: 32, max_prompt_length: 16, eval_fraction: 0.3"
    (tmp_path / "c.yaml").write_text(
        f"data: {{path: [a.jsonl], {limits}}}\nmodel: {{config: m.json, tokenizer: tokenizer}}\n"
    )
    monkeypatch.chdir(tmp_path)

    def command(name, content, *argv):
        (tmp_path / "a.jsonl").write_bytes(content)
        monkeypatch.setattr("sys.argv", ["dpo-jax", name, "c.yaml", *argv])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return command


def examples(good, *bad):
    """Returns twenty good examples with different prompts, then the bad ones, as JSON lines."""
    prompts = [[USER | {"content": f"w{i}"}] if isinstance(good["prompt"], list) else f"w{i}" for i in range(20)]
    every = [good | {"prompt": prompt} for prompt in prompts]
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in (*every, *bad))


@pytest.mark.parametrize("what", BAD)
def test_one_line_names_the_bad_example_or_it_is_counted(run, what):
    good, bad, argv, message = BAD[what]
    code, _, said = run("data", examples(good, bad), *argv)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("dpo-jax: a.jsonl:21: ")
    assert message in said
    assert len(said) < 400
    code, out, said = run("data", examples(good, bad, bad), "--data.skip_bad_rows", "2", *argv)
    assert (code, said) == (0, "")
    (counted,) = [line for line in out.splitlines() if "bad examples skipped" in line]
    assert counted.startswith("training data: 2 bad examples skipped; the first: a.jsonl:21: ")
    assert message in counted
    code, _, said = run("data", examples(good, bad, bad), "--data.skip_bad_rows", "1", *argv)
    assert (code, said.startswith("dpo-jax: a.jsonl:2")) == (2, True)
    assert said.endswith("(2 bad rows; correct or remove them, or set data.skip_bad_rows: 2)\n")


UNNAMED = json.dumps({"prompt": "w1", "text": "w2"}).encode()
ALL_BAD = "all examples are bad; the first: a.jsonl:1: "
NOTHING = {
    "an empty file": (b"", (), "has no comparisons in split 'train' of ['a.jsonl']; check data.path"),
    "examples without the columns": (
        UNNAMED,
        (),
        f"{ALL_BAD}the loss needs pairs: columns prompt, chosen, rejected; the col",
    ),
    "bad examples only": (b"{\n{\n", ("--data.skip_bad_rows", "9"), f"{ALL_BAD}not valid JSON"),
    "nothing usable": (examples(PAIR | {"rejected": "w3"}), (), "comparisons is left to encode; counted: {"),
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_to_train_on_is_one_line(run, what):
    content, argv, message = NOTHING[what]
    code, _, said = run("data", content, *argv)
    assert (code, said.count("\n")) == (2, 1)
    assert message in said


def test_data_without_weight_are_refused(run):
    rows = examples(PAIR | {"weight": 0})
    code, out, _ = run("data", rows)
    assert code == 0
    assert "training data: `train` will refuse this data: every example has weight 0, so that none counts; c" in out


def test_the_evaluated_examples_need_a_weight():
    weighted = pair_table([0.0, 0.0, 1.0])
    with pytest.raises(UserError, match=r"^held-out data: the first 2 examples \(data.eval_examples\) have weight 0"):
        eval_examples(Config(run="r", data=DataConfig(eval_examples=2)), weighted)
    assert len(eval_examples(Config(run="r", data=DataConfig(eval_examples=3)), weighted)) == 3
    assert label_faults(weighted, losses.build("dpo")) == []
    (fault,) = label_faults(pair_table([0.0, 0.0]), losses.build("dpo"))
    assert fault == "every example has weight 0, so that none counts; correct column 'weight'"


def pair_table(weights):
    ids = np.array([3, 4], np.int32)
    return Table.of(Tokens(ids, (ids, ids[:1]), weight=weight) for weight in weights)


@pytest.mark.parametrize("sparse", [False, True])
def test_ids_out_of_the_vocabulary_are_refused(run, tmp_path, sparse):
    """The last word of the tokenizer is one more than the model has; then one of its words has an id far beyond."""
    vocab = 100 if sparse else 97
    (tmp_path / "m.json").write_text(
        json.dumps({"model_type": "gpt2", "vocab_size": vocab, "n_embd": 8, "n_layer": 1, "n_head": 1})
    )
    if sparse:
        file = tmp_path / "tokenizer" / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"]["w3"] = 1000
        file.write_text(json.dumps(content))
    code, _, said = run("train", examples(PAIR))
    assert (code, said.count("\n")) == (2, 1)
    expected = f"vocab_size {vocab} is too small for the tokenizer's ids up to {1000 if sparse else 99}"
    assert expected in said
