"""Data files by their form: JSON of every shape, CSV and TSV, compressed or not, and files that are damaged."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.sources import formats
from dpo_jax.data.sources.base import load_comparisons
from dpo_jax.data.sources.formats import examples_in_file
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

ROWS = [
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5\nor 6"},
    {"prompt": 'Say "hi", now', "chosen": "hi", "rejected": "é"},
]
CHAT = {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}


def examples(file, split="train"):
    return [example if isinstance(example, UserError) else example[1] for example in examples_in_file(file, split)]


SHAPES = {
    "list.json": ROWS,
    "wrapped.json": {"data": ROWS},
    "columns.json": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "splits.json": {"train": ROWS, "test": ROWS[:1]},
    "versioned.json": {"version": 1, "data": ROWS},
    "pandas.json": {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]},
    "columns_of_splits.json": {"train": {name: [row[name] for row in ROWS] for name in ROWS[0]}, "test": {}},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_json_of_every_shape(tmp_path, name, indent):
    (tmp_path / name).write_text(json.dumps(SHAPES[name], indent=indent))
    assert examples(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.ndjson.gz", "a.json.gz"])
def test_json_lines_under_any_name(tmp_path, name):
    content = ("".join(json.dumps(row) + "\n\n" for row in ROWS)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert examples(tmp_path / name) == ROWS


@pytest.mark.parametrize("one", [ROWS[0], CHAT, {"prompt": "a", "responses": ["b", "c"]}])
def test_an_object_that_is_one_example(tmp_path, one):
    (tmp_path / "a.json").write_text(json.dumps(one, indent=1))
    assert examples(tmp_path / "a.json") == [one]


def test_the_split_of_a_json_file_is_the_one_asked_for(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SHAPES["splits.json"]))
    assert examples(tmp_path / "a.json", "test") == ROWS[:1]
    with pytest.raises(UserError, match=r"a\.json: has the splits train, test, not 'validation'; set data\.split"):
        examples(tmp_path / "a.json", "validation")


def test_a_json_file_of_one_long_line_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LINE_LIMIT", 50)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert examples(tmp_path / "a.json") == ROWS
    monkeypatch.setattr(formats, "JSON_LIMIT", 50)
    with pytest.raises(UserError, match=r"a\.json: more than 0 GiB; write it as JSON lines"):
        examples(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz"])
def test_tables_of_texts(tmp_path, kind):
    """As the csv module, pandas and spreadsheets write them, with a mark of the byte order."""
    plain = tmp_path / "plain"
    with plain.open("w", newline="", encoding="utf-8-sig") as file:
        out = csv.DictWriter(file, [*ROWS[0], "label", "score_chosen"], delimiter="\t" if kind == "tsv" else ",")
        out.writeheader()
        out.writerows(
            [ROWS[0] | {"label": "True", "score_chosen": "0.5"}, ROWS[1] | {"label": "", "score_chosen": "x"}]
        )
    file = tmp_path / f"a.{kind}"
    file.write_bytes(gzip.compress(plain.read_bytes()) if kind.endswith("gz") else plain.read_bytes())
    assert examples(file) == [
        ROWS[0] | {"label": "True", "score_chosen": "0.5"},
        ROWS[1] | {"label": None, "score_chosen": "x"},
    ]


def test_a_row_of_a_table_with_other_cells_is_a_bad_example(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen\na,b\na\na,b,c\n\nc,d\n")
    found = examples(tmp_path / "a.csv")
    assert [found[0], found[3]] == [{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": "d"}]
    assert str(found[1]).endswith("a.csv:2: 1 cells for 2 columns; quote cells that hold the separator")
    assert "a.csv:3: 3 cells for 2 columns" in str(found[2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,a\n1,2\n", r"a\.csv:1: a column is named twice"),
        (b'a,b\n1,2\n"x', r"a\.csv: cannot be read after example 1 \(unexpected end of data\)"),
        (b"a,b\n\xff,2\n", r"a\.csv: cannot be read after example 0 .*; correct the file"),
    ],
)
def test_damaged_tables_are_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        examples(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("blank", [b"\n" * 2**20, b" " * 2**20 + b"\n"])
def test_endless_blank_lines_are_refused(tmp_path, name, blank):
    """400 KB that unpack to 400 MB of line feeds, or to lines of blanks."""
    with gzip.open(tmp_path / name, "wb", 1) as file:
        for _ in range(80 if b" " in blank else 3):
            file.write(blank)
    with pytest.raises(UserError, match=r"a\.jsonl?\.gz:\d+: more than 1,048,576 blank lines; remove them"):
        examples(tmp_path / name)


def test_values_that_python_lacks_are_named_by_their_column(tmp_path):
    ROW = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    pq.write_table(pa.table({**ROW, "ts": pa.array([2**62], pa.timestamp("us"))}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column ts: .*; remove the column or correct it"):
        examples(tmp_path / "a.parquet")


def test_texts_of_arrow_that_are_no_utf8_are_named(tmp_path):
    offsets, content = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok")
    table = pa.table({"prompt": pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as \w+ after example 0 \(.*UTF-?8"):
            examples(tmp_path / name)


def test_a_damaged_offset_of_arrow_is_no_address(tmp_path):
    """Read as it is, it ends the process."""
    table = pa.table({"prompt": ["ab", "cd"]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_batch(table.to_batches()[0])
    content, offsets = (tmp_path / "a.arrow").read_bytes(), b"\0\0\0\0\2\0\0\0\4\0\0\0"
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f"))
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read as arrow after example 0"):
        examples(tmp_path / "a.arrow")


def test_a_column_whose_name_is_no_utf8_is_named_by_its_file(tmp_path):
    """Found by scripts/fuzz."""
    table = pa.table({"promptxyz": ["a"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(b"promptxyz") == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(b"promptxyz", b"prom\xe3txyz"))
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read as arrow after example 0 \('utf-8' codec"):
        examples(tmp_path / "a.arrow")


def test_cells_of_a_table_are_numbers_and_lists_where_these_are_needed(tmp_path):
    """The Kaggle set of lmsys, labels, scores and messages, as pandas writes them to CSV."""
    lmsys = "prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
    votes = ("1,0,0", "0,1,0", "0,0,1", "True,False,False")
    lmsys += "".join(f'"[""q""]","[""a""]","[""b""]",{flags}\n' for flags in votes)
    found = comparisons(tmp_path, lmsys)
    assert [pair.responses[0]["content"] for pair in found] == ["a", "b", "a"]
    ranking = 'prompt,completions,scores,weight\nq,"[""a"", ""b""]","[1, 2]",0.5\n'
    assert comparisons(tmp_path, ranking) == [Comparison("q", ("b", "a"), 0.5, scores=(2.0, 1.0))]
    chats = 'prompt,chosen,rejected\n"[{""role"": ""user"", ""content"": ""q""}]",a,b\n'
    assert comparisons(tmp_path, chats)[0].prompt.messages == ({"role": "user", "content": "q"},)
    texts = "prompt,chosen,rejected\n[1],[2],null\n"
    assert comparisons(tmp_path, texts) == [Comparison("[1]", ("[2]", "null"))]


def comparisons(folder, text):
    (folder / "a.csv").write_text(text)
    found = load_comparisons("files", (str(folder / "a.csv"),), "train", 2)
    return [pair._replace(where="") for pair in found]
