"""Files and HH as sources, and the split by prompt."""

import gzip
import hashlib
import json

import pytest

from dpo_jax.data.sources import files, hh
from dpo_jax.data.sources.base import (
    Note,
    holdout,
    load_comparisons,
    only_comparisons,
    open_stream,
    prompt_hash,
    source_names,
)
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
# rows, distinct prompts, rejected with another prompt, empty chosen, empty rejected (also blank ones), identical pairs
HH = {
    "harmless-base": (2312, 2310, 4, 4, 2, 0),
    "helpful-base": (2354, 2354, 2, 0, 5, 2),
    "helpful-online": (1137, 1137, 0, 0, 3, 2),
    "helpful-rejection-sampled": (2749, 2748, 1, 0, 1, 32),
}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(path, responses=2, split="train"):
    return list(only_comparisons(files.read((str(path),), split, responses)))


def notes(items):
    return {item.text: item.number for item in items if isinstance(item, Note)}


def test_every_kind_of_file_gives_the_same_comparisons(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [PAIR | {"weight": 0.5}, {"prompt": "é\u2028", "chosen": " c", "rejected": "", "weight": 2}]
    names = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl.gz", rows), str(tmp_path / "c.json")]
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in [*names, str(tmp_path / "d.parquet")]:
        assert read(name) == [
            Comparison("p", ("c", "r"), 0.5, f"{name}:1"),
            Comparison("é\u2028", (" c", ""), 2.0, f"{name}:2"),
        ]


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_keep_their_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\n" + json.dumps(PAIR).encode())
    assert [comparison.where for comparison in read(file)] == [f"{file}:1", f"{file}:3"]


def test_one_response_is_the_completion_or_each_distinct_chosen(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}] * 2)
    assert [c.responses for c in read(file, responses=1)] == [("c",)] * 2
    rows = [PAIR, PAIR | {"rejected": "s"}, PAIR | {"chosen": "d"}]
    file = write(tmp_path / "b.jsonl", rows)
    assert [(c.responses, c.where[-1]) for c in read(file, responses=1)] == [(("c",), "1"), (("d",), "3")]
    repeated = "examples left out: they repeat a prompt and its chosen response"
    assert notes(files.read((file,), "train", 1)) == {repeated: 1}


def test_no_response_is_the_prompt_alone(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "p"}])
    assert read(file, responses=0) == [Comparison("p", (), 1.0, f"{file}:1")]


BAD_EXAMPLES = {
    '{"prompt": "p"': r"a\.jsonl:2: not valid JSON",
    "[1]": r"a\.jsonl:2: an example must be an object with named columns, not a list",
    '{"prompt": "p", "chosen": "c"}': r"a\.jsonl:2: no column 'rejected'; the columns are: chosen, prompt",
    '{"prompt": "p", "chosen": ["c"], "rejected": "r"}': r"a\.jsonl:2: 'chosen' must be text, not a list",
    '{"prompt": null, "chosen": "c", "rejected": "r"}': r"a\.jsonl:2: no column 'prompt'; the.*null: prompt",
    '{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}': r"a\.jsonl:2: 'prompt' holds half of a surrogate pair",
    '{"prompt": "p", "completion": "c"}': r"a\.jsonl:2: the loss needs pairs.*the columns are: completion, prompt",
    '{"chosen": "c", "rejected": "r"}': r"a\.jsonl:2: no column 'prompt'; the columns are: chosen, rejected; set",
    '{"prompt": "p", "chosen": "c", "rejected": "r", "weight": -1}': r"a\.jsonl:2: 'weight' must be finite and not neg",
    '{"prompt": "p", "chosen": "c", "rejected": "r", "weight": NaN}': r"a\.jsonl:2: 'weight' must be finite",
    '{"prompt": "p", "chosen": "c", "rejected": "r", "weight": 1e39}': r"a\.jsonl:2: 'weight' must be finite",
    '{"prompt": "p", "chosen": "c", "rejected": "r", "weight": true}': r"a\.jsonl:2: 'weight' must be a number, not a",
}


@pytest.mark.parametrize("bad", BAD_EXAMPLES)
def test_a_bad_example_is_named_by_file_and_line(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(PAIR)}\n{bad}\n")
    with pytest.raises(UserError, match=BAD_EXAMPLES[bad]):
        read(tmp_path / "a.jsonl")


def test_bytes_that_are_not_utf8_and_truncated_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: not UTF-8 text \(invalid start byte at byte 12\)"):
        read(tmp_path / "a.jsonl")
    whole = gzip.compress(json.dumps(PAIR).encode())
    for name, content in {"cut": whole[:-9], "other": b"not gzip"}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.jsonl\.gz:1: cannot be read"):
            read(tmp_path / f"{name}.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet after example 0"):
        read(tmp_path / "a.parquet")


def test_json_must_be_a_list_of_objects(tmp_path):
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(UserError, match=r"a\.json: a \.json file must hold objects, not a number"):
        read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[1]\n[2]")
    with pytest.raises(UserError, match=r"b\.json: not valid JSON.*name a file with one object per line \.jsonl"):
        read(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps([PAIR, "x"]))
    with pytest.raises(UserError, match=r"c\.json:2: an example must be an object with named columns, not text"):
        read(tmp_path / "c.json")


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "sub/train", "train/b", "test", "train_8k", "notes"):
        write(tmp_path / f"{name}.jsonl", [PAIR])
    found = [str(file.relative_to(tmp_path)) for file in files.resolve_files([str(tmp_path)], "train")]
    names = ["sub/train", "train/b", "train-00000-of-00002", "train-00001-of-00002"]
    assert found == [f"{name}.jsonl" for name in names]
    assert [c.where for c in read(tmp_path, split="test")] == [f"{tmp_path / 'test.jsonl'}:1"]
    with pytest.raises(UserError, match=r"no file for split 'validation'; it has: notes.jsonl, sub/train.jsonl, test"):
        read(tmp_path, split="validation")


def test_a_folder_that_mentions_no_split_is_a_train_split(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [PAIR])
    assert [file.name for file in files.resolve_files([str(tmp_path)], "train")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="no file for split 'test'"):
        read(tmp_path, split="test")
    write(tmp_path / "my_test_set.jsonl", [PAIR])
    with pytest.raises(UserError, match="no file for split 'train'"):
        read(tmp_path)


def test_ambiguous_and_missing_paths_are_refused(tmp_path):
    one = write(tmp_path / "train.jsonl", [PAIR])
    with pytest.raises(UserError, match=r"named twice by data\.path"):
        list(files.read((one, str(tmp_path / "*.jsonl")), "train", 2))
    write(tmp_path / "train.jsonl.gz", [PAIR])
    with pytest.raises(UserError, match=r"train\.jsonl and train\.jsonl\.gz may be the same data"):
        read(tmp_path)
    for path, message in {"x.jsonl": "x.jsonl: no such file", "*.txt": "no such file"}.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path / path)
    (tmp_path / "a.xls").write_text("prompt")
    with pytest.raises(UserError, match=r"a\.xls: unknown kind of data file; known: \.jsonl"):
        read(tmp_path / "a.xls")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no data files in this folder"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"data\.path is empty; set it to files"):
        list(files.read((), "train", 2))
    with pytest.raises(UserError, match="the loss needs 3 ranked responses: columns prompt, completions, scores"):
        read(one, responses=3)


def test_load_finds_a_source_by_name(tmp_path):
    file = write(tmp_path / "a.jsonl", [PAIR])
    assert len(load_comparisons("files", (file,), "train", 2)) == 1
    stream = open_stream("files", (file,), "train", 2)
    assert [len(list(stream)), len(list(stream))] == [1, 1]
    assert {"files", "hh", "synthetic"} <= set(source_names())
    assert not {"encode", "order", "pack", "table"} & set(source_names())
    with pytest.raises(
        UserError, match=r"unknown data source \(data.name\) 'file'; did you mean 'files'\? known: files,"
    ):
        load_comparisons("file", (file,), "train", 2)
    with pytest.raises(UserError, match="unknown data source"):
        load_comparisons("pack", (file,), "train", 2)
    with pytest.raises(UserError, match="has no comparisons in split 'train'"):
        load_comparisons("files", (write(tmp_path / "b.jsonl", []),), "train", 2)


def test_holdout_is_by_prompt_and_stays_when_data_is_added():
    comparisons = [Comparison(f"prompt {i % 500}", ("a", "b"), where=str(i)) for i in range(1000)]
    train, held = map(list, holdout(comparisons, 0.1))
    assert len(train) + len(held) == 1000
    assert len(held) == 100  # 50 of 500 prompts, each twice
    assert not {c.prompt for c in train} & {c.prompt for c in held}
    assert list(holdout(comparisons[:500], 0.1)[1]) == [c for c in held if int(c.where) < 500]
    assert [list(side) for side in holdout(comparisons, 0.0)] == [comparisons, []]
    assert prompt_hash("prompt 0") == pytest.approx(0.1170173416, abs=1e-9)
    with pytest.raises(UserError, match="must be at least 0 and below 1, not 1"):
        holdout(comparisons, 1.0)
    with pytest.raises(UserError, match="leaves 1 of 1 comparisons to train on and 0 to evaluate"):
        list(holdout(comparisons[:1], 0.1)[0])
    for fraction in (0.0, 0.1):
        with pytest.raises(UserError, match="all examples are bad; the first: f:1: no column 'prompt'"):
            list(holdout([Note("x"), UserError("f:1: no column 'prompt'"), UserError("f:2")], fraction)[0])


def originals_hh(files_):
    """Reads HH as the paper's code does, written independently: pairs, and one (prompt, sft_target) for each prompt."""
    found = {}
    for file in files_:
        for line in gzip.decompress(file.read_bytes()).decode().split("\n")[:-1]:
            row = json.loads(line)
            head, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
            found.setdefault(head + mark, []).append((chosen, row["rejected"][len(head) + len(mark) :]))
    pairs = [(prompt, *pair) for prompt, group in found.items() for pair in group]
    return pairs, [(prompt, group[-1][0]) for prompt, group in found.items()]


def hh_read(path, split, responses):
    items = list(open_stream("hh", path, split, responses))
    return list(only_comparisons(items)), notes(items)


def test_hh_is_read_as_the_original_reads_it(shared):
    folder = shared / "data" / "hh"
    pairs, examples = originals_hh(sorted(folder.glob("*/test.jsonl.gz")))
    read_pairs, noted = hh_read((str(folder),), "test", 2)
    assert [(c.prompt, *c.responses) for c in read_pairs] == pairs
    assert len(pairs) == 8552
    assert noted == {}
    read_examples, noted = hh_read((str(folder),), "test", 1)
    assert [(c.prompt, *c.responses) for c in read_examples] == examples
    assert noted == {"examples left out: a later one has the same prompt": 8552 - len(examples)}
    assert [c.prompt for c in hh_read((str(folder),), "test", 0)[0]] == [prompt for prompt, _ in examples]


@pytest.mark.parametrize("name", HH)
def test_hh_counts(shared, name):
    rows = list(hh.hh_pairs((str(shared / "data" / "hh" / name),), "test"))
    empty = [sum(not getattr(row, key).strip() for row in rows) for key in ("chosen", "rejected")]
    same = sum(row.chosen == row.rejected for row in rows)
    elsewhere = sum(not row.same_prompt for row in rows)
    assert (len(rows), len({row.prompt for row in rows}), elsewhere, *empty, same) == HH[name]


def test_hh_is_split_at_the_last_turn_of_every_example(shared):
    """Where both transcripts begin with the prompt they are the prompt and a response, cut before nothing but a turn's
    text; the seven others are marked, and are not trained on unless they are to be kept."""
    folder = shared / "data" / "hh"
    rows, _ = hh_read((str(folder),), "test", 2)
    texts = {}
    for file in sorted(folder.glob("*/test.jsonl.gz")):
        for number, line in enumerate(gzip.decompress(file.read_bytes()).decode().split("\n")[:-1], 1):
            texts[f"{file}:{number}"] = json.loads(line)
    assert len(rows) == len(texts) == 8552
    for row in rows:
        both = [texts[row.where]["chosen"], texts[row.where]["rejected"]]
        assert row.prompt + row.responses[0] == both[0]
        assert row.prompt.endswith("\n\nAssistant:")
        assert "\n\nAssistant:" not in row.responses[0]
        assert row.misplaced == (row.prompt + row.responses[1] != both[1])
    assert [row.where.split("hh/")[1] for row in rows if row.misplaced] == [
        *(f"harmless-base/test.jsonl.gz:{line}" for line in (1255, 1689, 1953, 2037)),
        *(f"helpful-base/test.jsonl.gz:{line}" for line in (568, 1167)),
        "helpful-rejection-sampled/test.jsonl.gz:1598",
    ]


def test_hh_first_examples(shared):
    rows, _ = hh_read((str(shared / "data" / "hh" / "helpful-base" / "test.jsonl.gz"),), "test", 2)
    first = rows[0]
    assert first.prompt.startswith("\n\nHuman: Do you know why turkeys became the official food of thanksgiving?\n\n")
    assert first.prompt.endswith("\n\nAssistant:")
    assert first.where.endswith("test.jsonl.gz:1")
    digest = hashlib.blake2b(repr([c[:2] for c in rows[:10]]).encode(), digest_size=4).hexdigest()
    assert digest == "79c937dc"


def test_hh_groups_equal_prompts_at_the_first_of_them(tmp_path):
    turn = "\n\nHuman: {}\n\nAssistant:{}".format
    rows = [(turn("a", " 1"), turn("a", " 2")), (turn("b", " 3"), turn("c", " 4")), (turn("a", " 5"), turn("a", " 6"))]
    file = write(tmp_path / "x.jsonl", [{"chosen": c, "rejected": r} for c, r in rows])
    pairs, noted = hh_read((file,), "train", 2)
    assert [(c.prompt[9], c.responses, c.where[-1]) for c in pairs] == [
        ("a", (" 1", " 2"), "1"),
        ("a", (" 5", " 6"), "3"),
        ("b", (" 3", " 4"), "2"),
    ]
    assert [c.misplaced for c in pairs] == [False, False, True]
    assert noted == {}
    assert [c.responses for c in hh_read((file,), "train", 1)[0]] == [(" 5",), (" 3",)]
    file = write(tmp_path / "y.jsonl", [{"chosen": "\n\nHuman: a", "rejected": ""}])
    with pytest.raises(UserError, match=r"y\.jsonl:1: 'chosen' has no .*Assistant:'; it is not a dialogue"):
        hh_read((file,), "train", 2)
    with pytest.raises(UserError, match="at most 2 responses"):
        load_comparisons("hh", (file,), "train", 3)


def test_hh_from_the_hub(monkeypatch):
    import datasets

    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or [row])
    assert hh_read((), "test", 2)[0][0].where == "Anthropic/hh-rlhf[test]:1"
    assert asked[0] == (("Anthropic/hh-rlhf",), {"split": "test"})
    list(files.rows(("me/mine:one",), "dev"))
    assert asked[-1] == (("me/mine", "one"), {"split": "dev"})
    list(files.rows(("me/mine:one@v1.0",), "dev"))
    assert asked[-1] == (("me/mine", "one"), {"split": "dev", "revision": "v1.0"})

    def absent(*args, **options):
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(UserError, match=r"^me/mine: no such local path, and split 'test' .*hub: offline and more$"):
        load_comparisons("hh", ("me/mine",), "test", 2)
    with pytest.raises(UserError, match=r"me/mine\.jsonl: no such file"):
        load_comparisons("hh", ("me/mine.jsonl",), "test", 2)
