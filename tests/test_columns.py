"""The usual columns in all their forms, and the errors of bad examples."""

import json

import pytest

from dpo_jax.data.sources.base import Note, load_comparisons, open_stream
from dpo_jax.data.sources.columns import comparisons_from_columns
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

SYSTEM, USER, REPLY = (
    {"role": r, "content": c} for r, c in (("system", "be brief"), ("user", "hi"), ("assistant", "a"))
)
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
ASK = Chat((USER,))
PAIR = Comparison(ASK, (GOOD, BAD), where="f:1")


def read(row, responses=2):
    return comparisons_from_columns("f:1", row, responses)


CONVERSATIONS = {
    "prompt and turns": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt and one message": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "prompt and texts": {"prompt": [USER], "chosen": "good", "rejected": "bad"},
    "whole conversations": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "no prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a prompt that is their first turn": {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "messages and responses": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "empty fields, as columns have them": {
        "chosen": [USER | {"tool_calls": None}, GOOD],
        "rejected": [USER | {"name": None}, BAD],
    },
    "parts of text": {
        "chosen": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, GOOD],
        "rejected": [USER, BAD],
    },
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_a_conversation_is_the_same_in_every_form(form):
    assert read(CONVERSATIONS[form]) == [PAIR]
    assert read(CONVERSATIONS[form], 1) == [PAIR._replace(responses=(GOOD,))]
    assert read(CONVERSATIONS[form], 0) == [PAIR._replace(responses=())]


def test_the_prompt_is_common_messages_and_never_part_of_one():
    """Responses that begin with the same word keep it, and the last message of either is always a response."""
    sky, blue = ({"role": "assistant", "content": text} for text in ("The sky", "The sky is blue"))
    assert read({"chosen": [USER, sky], "rejected": [USER, blue]})[0].responses == (sky, blue)
    assert read({"chosen": [USER, sky], "rejected": [USER, sky]})[0].responses == (sky, sky)
    longer = [USER, REPLY, USER, GOOD]
    assert read({"chosen": longer, "rejected": [USER, REPLY, USER, BAD]})[0].prompt == Chat((USER, REPLY, USER))


def test_a_text_beside_messages_is_the_users_turn():
    """Before an answer it is the prompt; in a full conversation it is one of the turns, or a note counts it."""
    sides = {"chosen": [GOOD], "rejected": [BAD]}
    for responses, expected in ((2, PAIR), (1, PAIR._replace(responses=(GOOD,))), (0, PAIR._replace(responses=()))):
        assert read({"prompt": "hi", **sides}, responses) == [expected]
    whole = CONVERSATIONS["no prompt"]
    told = Note("examples whose messages lack the text in column 'prompt'; it is ignored")
    assert read({"prompt": "hello", **whole}) == [PAIR, told]
    assert read({"prompt": "hi ", **whole}) == [PAIR]


def test_conversations_and_texts_do_not_share_a_file(tmp_path):
    """The template renders conversations only, so that a model would see two formats."""
    rows = [TEXT, TALK, TEXT, TALK]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    for name, kinds, words in (
        ("a", [Comparison, UserError, Comparison, UserError], "a conversation, but the examples before it are texts"),
        ("b", [Comparison, UserError, Comparison], "a text, but the examples before it are conversations"),
    ):
        items = list(open_stream("files", (str(tmp_path / f"{name}.jsonl"),), "train", 2))
        assert [type(item) for item in items] == kinds
        assert f"{name}.jsonl:2: {words}; give each kind its own file, as parts of a mixture" in str(items[1])
    (tmp_path / "c.jsonl").write_text(json.dumps(TEXT))
    (tmp_path / "d.jsonl").write_text(json.dumps(TALK))
    parts = tuple(f"files:{tmp_path / name}.jsonl" for name in "cd")
    assert [type(c.prompt) for c in load_comparisons("mixture", parts, "train", 2)] == [str, Chat]


def test_unused_columns_are_counted(tmp_path):
    """Otherwise a misspelt column would be ignored silently."""
    rows = [TEXT | {"wieght": 2, "id": 1}, TEXT | {"weight": 2, "prompt": "q", "provenance": {}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = list(open_stream("files", (str(tmp_path / "a.jsonl"),), "train", 2))
    assert items[2:] == [Note("unused columns: id, wieght", 2)]


def test_a_message_is_short_however_long_the_value():
    many = {f"column {i} {'x' * 10**5}": 1 for i in range(50)}
    for row in (
        {"prompt": "p", "completion": "c", "label": "x" * 10**6},
        TALK | {"chosen": [{"role": "x" * 10**6, "content": "a"}]},
        TEXT | {"weight": 10**4000},
        many,
    ):
        with pytest.raises(UserError) as error:
            read(row)
        assert len(str(error.value)) < 2000
    with pytest.raises(UserError, match=r"and 30 more; set data.columns to theirs"):
        read(many)


def test_pairs_of_equal_scores_are_counted_out():
    assert read(TEXT | {"scores": [1, 1]}) == [Note("pairs of equal scores left out")]
    assert read(TEXT | {"score_chosen": 5.0, "score_rejected": 5.0}) == [Note("pairs of equal scores left out")]
    assert read(TEXT | {"scores": [1, 1], "preference": 0.5})[0].scores == (1.0, 1.0)


def test_a_score_of_one_response_says_nothing():
    found = read(TEXT | {"chosen_score": 9.0})
    assert found == [
        Comparison("p", ("c", "r"), where="f:1"),
        Note("examples with the score of one response only; it is ignored"),
    ]


@pytest.mark.parametrize(
    "name", ["weight", "preference", "scores", "score_chosen", "label", "messages", "tools", "completions"]
)
def test_a_null_counts_as_an_absent_column(name):
    assert read(TEXT | {name: None}) == read(TEXT)
    assert read(TALK | {name: None}) == read(TALK)


def test_labels_may_be_floats():
    row = {"prompt": "p", "completion": "c"}
    assert [read(row | {"label": value})[0].responses for value in (1.0, 0.0)] == [("c", None), (None, "c")]


def test_system_tools_and_template_arguments_belong_to_the_prompt():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [USER], "chosen": "a", "rejected": "b", "system": "be brief", "chat_template_kwargs": {"x": 1}}
    expected = Chat((SYSTEM, USER), tuple(tools), {"x": 1})
    assert read(row | {"tools": tools})[0].prompt == expected
    assert read(row | {"tools": json.dumps(tools)})[0].prompt == expected
    assert read(row | {"system": "", "tools": "", "chat_template_kwargs": None})[0].prompt == ASK


def test_the_last_turn_of_a_conversation_is_an_example():
    assert read({"messages": [USER, REPLY, USER, GOOD]}, 1) == [
        Comparison(Chat((USER, REPLY, USER)), (GOOD,), where="f:1")
    ]
    assert read({"messages": [USER, GOOD]}, 0)[0].prompt == read({"messages": [USER]}, 0)[0].prompt == ASK


def test_the_label_decides_the_place_of_an_unpaired_response():
    row = {"prompt": "p", "completion": "c", "weight": 2}
    expected = Comparison("p", ("c", None), 2.0, "f:1")
    assert read(row | {"label": True}) == read(row | {"label": 1}) == [expected]
    assert read(row | {"label": False}) == [expected._replace(responses=(None, "c"))]
    assert read(row | {"label": True}, 1) == [expected._replace(responses=("c",))]
    assert read(row | {"label": False}, 1) == [Note("unwanted responses left out")]
    assert read({"messages": [USER, GOOD], "label": False})[0].responses == (None, GOOD)


def test_scores_preference_and_weight():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    scored = Comparison("p", ("c", "r"), where="f:1", scores=(2.0, -1.0))
    assert read(row | {"score_chosen": 2, "score_rejected": -1.0}) == [scored]
    assert read(row | {"scores": [2, -1]}) == [scored]
    soft = scored._replace(preference=0.25, scores=(1.0, 1.0), weight=0.5)
    assert read(row | {"preference": 0.25, "scores": [1, 1], "weight": 0.5}) == [soft]


def test_a_ranking_is_ordered_by_its_scores():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2], "weight": 2}
    ranked = Comparison("p", ("b", "c", "a"), 2.0, "f:1", scores=(3.0, 2.0, 1.0))
    assert read(row, 3) == [ranked]
    assert [c[1] for c in read(row)] == [("b", "c"), ("b", "a"), ("c", "a")]
    assert [c.scores for c in read(row)] == [(3.0, 2.0), (3.0, 1.0), (2.0, 1.0)]
    assert read(row, 1) == [ranked._replace(responses=("b",), scores=(3.0,))]
    tied = read(row | {"scores": [1, 3, 3]})
    assert [c.responses for c in tied if isinstance(c, Comparison)] == [("b", "a"), ("c", "a")]
    assert tied.count(Note("pairs of equal scores left out")) == 1
    turns = {"prompt": [USER], "responses": [[GOOD], "bad"], "scores": [1, 0]}
    assert read(turns) == [PAIR._replace(scores=(1.0, 0.0))]


TEXT = {"prompt": "p", "chosen": "c", "rejected": "r"}
TALK = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
RANK = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 2, 3]}
WRONG = [
    (TEXT | {"preference": 1.5}, 2, "'preference' must be from 0 to 1, not 1.5"),
    (TEXT | {"preference": float("nan")}, 2, "'preference' must be from 0 to 1, not nan"),
    (TEXT | {"preference": "x"}, 2, "'preference' must be a number, not text"),
    (TEXT | {"scores": [1, float("nan")]}, 2, "'scores' must be finite, not nan"),
    (TEXT | {"scores": [1]}, 2, "'scores' must be a list of two numbers"),
    (TEXT | {"scores": [1, 2]}, 2, "scores 1 .* 2 .*: the chosen one must have the higher score"),
    (TEXT | {"chosen": [GOOD]}, 2, "'chosen' must be text, not a list"),
    ({"prompt": "p", "completion": "c", "label": 2}, 2, "'label' must be true or false, not 2"),
    ({"prompt": "p", "completion": "c", "label": "yes"}, 2, "'label' must be true or false, not 'yes'"),
    ({"prompt": "p", "completion": "c", "label": 0.5}, 2, "'label' must be true or false, not 0.5"),
    ({"prompt": "p", "completion": "c", "label": None}, 2, "columns are: completion, prompt; null: label"),
    (TALK | {"prompt": [SYSTEM]}, 2, "the prompt has no user turn"),
    (TALK | {"prompt": [SYSTEM, USER], "system": "x"}, 2, "a system message both in the conversation and"),
    (TALK | {"prompt": []}, 2, "'prompt' has no messages"),
    (TALK | {"chosen": [USER]}, 2, "'chosen' does not end with an assistant turn"),
    (TALK | {"chosen": [SYSTEM, GOOD]}, 2, "'chosen' does not begin with an assistant turn after the prompt"),
    (TALK | {"chosen": [{"role": "wizard", "content": "x"}]}, 2, "'chosen' has a message of role 'wizard'; known: sys"),
    (TALK | {"chosen": [{"content": "x"}]}, 2, "'chosen' has a message of role None"),
    (TALK | {"chosen": [{"role": "assistant", "content": 3}]}, 2, "'chosen' has a message whose content is a number"),
    (TALK | {"chosen": [3]}, 2, "'chosen' must hold messages with role and content, not a number"),
    (
        TALK | {"chosen": ["x"]},
        2,
        "'chosen' is a list of texts, not of messages; several responses to a p",
    ),
    (
        {"question": "q", "chosen": "c", "rejected": "r"},
        2,
        "the columns are: chosen, question, rejected; set data.columns: {prompt: question}",
    ),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, 2, "set data.name to hh"),
    (
        {"prompt": "p", "response_A": "a", "response_B": "b", "label": "A>B"},
        2,
        "the loss needs pairs",
    ),
    (
        {"prompt": "p", "messages": [USER], "chosen": "c", "rejected": "r"},
        2,
        "are both the user's and differ",
    ),
    (TALK | {"chosen": [{"role": "assistant", "content": "\ud800"}]}, 2, "half of a surrogate pair"),
    (TALK | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, 2, "content that is not text"),
    (TALK | {"tools": "{"}, 2, "'tools' is not JSON"),
    (TALK | {"tools": {"a": 1}}, 2, "'tools' must be a list, not an object"),
    (TALK | {"chat_template_kwargs": [1]}, 2, "'chat_template_kwargs' must be an object, not a list"),
    ({"chosen": [USER, GOOD], "rejected": [REPLY, BAD]}, 2, "begin with different messages, so they have no prompt"),
    ({"chosen": [GOOD], "rejected": [BAD]}, 2, "begin with different messages, so they have no prompt"),
    ({"messages": [USER]}, 1, "the prompt|does not end with an assistant turn|no messages"),
    (RANK | {"scores": [1, 2]}, 3, "'scores' must be a list of numbers, one for each of 'completions'"),
    (RANK | {"scores": [1, 2, 2]}, 3, "two responses have the same score, a tie"),
    (RANK, 4, "3 responses, and the loss needs 4"),
    (TEXT, 3, "the loss needs 3 ranked responses: columns prompt, completions, scores; the columns are: chosen, promp"),
]


@pytest.mark.parametrize(("row", "responses", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else None)
def test_an_error_is_one_line_that_names_the_example(row, responses, message):
    with pytest.raises(UserError, match=f"^f:1: .*({message})") as error:
        read(row, responses)
    assert "\n" not in str(error.value)


def test_bad_examples_are_items_in_their_place(tmp_path):
    rows = [TEXT, "{", TEXT | {"weight": -1}, [1], TEXT | {"prompt": "q"}]
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode() + b"\n\xff\n")
    items = list(open_stream("files", (str(tmp_path / "a.jsonl"),), "train", 2))
    assert [type(item) for item in items] == [Comparison, UserError, UserError, UserError, Comparison, UserError]
    expected = ["2: not valid JSON", "3: 'weight' must be", "4: an example must be an object", "6: not UTF-8"]
    errors = [str(item) for item in items if isinstance(item, UserError)]
    assert [message in error for message, error in zip(expected, errors, strict=True)] == [True] * 4
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON"):
        load_comparisons("files", (str(tmp_path / "a.jsonl"),), "train", 2)


def test_an_empty_file_and_an_endless_line(tmp_path, monkeypatch):
    from dpo_jax.data.sources import formats
    from dpo_jax.data.sources.base import load_comparisons
    from dpo_jax.errors import UserError

    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="has no comparisons in split 'train'"):
        load_comparisons("files", (str(tmp_path / "empty.jsonl"),), "train", 2)
    long = json.dumps(TEXT | {"chosen": "x" * 10_000_000})
    (tmp_path / "long.jsonl").write_text(long)
    assert len(load_comparisons("files", (str(tmp_path / "long.jsonl"),), "train", 2)[0].responses[0]) == 10_000_000
    monkeypatch.setattr(formats, "LINE_LIMIT", 2**20)
    with pytest.raises(UserError, match=r"long\.jsonl:1: a line of more than 1 MiB; is this JSON lines\?"):
        load_comparisons("files", (str(tmp_path / "long.jsonl"),), "train", 2)


def test_compressed_and_columnar_files_give_the_same_comparisons(tmp_path):
    import bz2
    import gzip
    import lzma

    import pyarrow
    import pyarrow.parquet

    rows = [TALK | {"weight": 1.0}, CONVERSATIONS["whole conversations"] | {"weight": 0.5}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for suffix, packer in {"gz": gzip, "bz2": bz2, "xz": lzma}.items():
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(packer.compress(lines))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(lines)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, writer in {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}.items():
        with writer(str(tmp_path / f"{name}.arrow"), table.schema) as sink:
            sink.write_table(table)
    expected = [PAIR._replace(where=""), PAIR._replace(where="", weight=0.5)]
    found = {
        path.name: [c._replace(where="") for c in load_comparisons("files", (str(path),), "x", 2)]
        for path in tmp_path.iterdir()
    }
    assert len(found) == 7
    assert {name for name, comparisons_ in found.items() if comparisons_ != expected} == set()
    for name, content in {
        "cut.jsonl.xz": lzma.compress(lines)[:-9],
        "no.jsonl.bz2": b"no",
        "no.arrow": b"no" * 9,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*cannot be read"):
            load_comparisons("files", (str(tmp_path / name),), "x", 2)


def test_a_data_set_saved_by_datasets_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list([TALK] * 3).save_to_disk(tmp_path / "saved")
    assert [c[:2] for c in load_comparisons("files", (str(tmp_path / "saved"),), "train", 2)] == [PAIR[:2]] * 3


def test_real_conversations(shared):
    folder = shared / "data" / "conversations"
    pairs = [
        load_comparisons("files", (str(folder / f"dpo_{tongue}_demo.json"),), "train", 2) for tongue in ("en", "zh")
    ]
    assert [len(rows) for rows in pairs] == [300, 300]
    turns = [len(row.prompt.messages) for rows in pairs for row in rows if isinstance(row.prompt, Chat)]
    assert (len(turns), max(turns)) == (600, 13)
    assert all(turn["role"] == "assistant" for rows in pairs for row in rows for turn in row.responses)
    rows = load_comparisons("files", (str(folder / "kto_en_demo.json"),), "train", 2)
    assert len(rows) == 300
    wanted = sum(row.responses[0] is not None for row in rows)
    labels = json.loads((folder / "kto_en_demo.json").read_text())
    assert wanted == sum(row["label"] for row in labels)
    assert [row.responses[not row_["label"]]["content"] for row, row_ in zip(rows, labels, strict=True)] == [
        row["messages"][-1]["content"] for row in labels
    ]
