"""Conversations in the forms of data sets: beside texts, of several turns, with nulls of Parquet."""

import json
from itertools import product

import pytest
from test_columns import BAD, GOOD, REPLY, SYSTEM, TALK, TEXT, USER, read

from dpo_jax.config.schema import DataConfig
from dpo_jax.data.prerendered import is_prerendered
from dpo_jax.data.sources.base import Note, only_comparisons, open_stream
from dpo_jax.data.sources.files import example_items, has_turns
from dpo_jax.data.sources.functions import open_source
from dpo_jax.data.sources.values import Cell
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison
from dpo_jax.training.tables import are_chats, comparison_streams, held_out_comparisons, with_prompts

PLAIN = Comparison("p", ("c", "r"), where="f:1")


def test_an_empty_column_of_conversations_is_absent():
    for name, empty in product(("system", "tools", "messages"), ("", "[]", [], None)):
        assert read(TEXT | {name: empty}) == [PLAIN], (name, empty)


ASKED = {"role": "user", "content": "p"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_text_prompts_are_turns_if_one_example_of_the_data_has_a_system_message(tmp_path):
    """Also the last one of many, and one of the held-out data."""
    plain, late = write(tmp_path / "a.jsonl", *[TEXT] * 1500), [TEXT] * 1500 + [TEXT | {"system": "be brief"}]
    with_system = write(tmp_path / "b.jsonl", *late, TEXT | {"tools": "[]"})
    chats = [(ASKED,)] * 1500 + [(SYSTEM, ASKED), (ASKED,)]
    for paths in ((plain, with_system), (with_system, plain)):
        options = DataConfig(path=paths[:1], eval_path=paths[1:])
        first, second = comparison_streams(options, 2)
        found = {path: [item.prompt for item in items] for path, items in zip(paths, (first, second), strict=True)}
        assert [prompt.messages for prompt in found[with_system]] == chats
        assert [prompt.messages for prompt in found[plain]] == chats[:1500]
        assert [item.prompt for item in held_out_comparisons(options, 2)] == found[paths[1]]
    assert [item.prompt for item in open_source("files", (plain,), "train", 2)] == ["p"] * 1500
    moved = DataConfig(path=("absent.jsonl",), eval_path=(plain,))  # an evaluation where the training data are absent
    assert next(iter(held_out_comparisons(moved, 2))).prompt == "p"


def test_conversations_before_a_system_message_do_not_hide_it():
    rows = [("f:1", {"prompt": [ASKED], "chosen": "c", "rejected": "r"}), ("f:2", TEXT | {"system": "be brief"})]
    assert has_turns(rows) is True
    assert has_turns([rows[0]] * 1024 + [rows[1]]) is None


def test_the_parts_of_mixtures_decide_with_those_of_the_same_source(tmp_path):
    plain, with_system = (
        write(tmp_path / f"{n}.jsonl", row) for n, row in (("a", TEXT), ("b", TEXT | {"system": "s"}))
    )
    options = DataConfig(name="mixture", path=(f"files:{plain}",), eval_path=(f"files:{with_system}",))
    (train,), (held_out,) = (list(items) for items in comparison_streams(options, 2))
    assert train.prompt.messages == (ASKED,)
    assert held_out.prompt.messages == ({"role": "system", "content": "s"}, ASKED)
    (text, note) = open_source("mixture", (f"files:{with_system}",), "train", 2, text_prompts="texts")
    assert text.prompt == "p"
    assert note.text.startswith("prompts that stay texts (data.text_prompts) beside system")


def test_a_run_keeps_how_its_prompts_were_read(tmp_path):
    plain, with_system = (
        write(tmp_path / f"{n}.jsonl", row) for n, row in (("a", TEXT), ("b", TEXT | {"system": "s"}))
    )
    for path, kind in ((plain, "texts"), (with_system, "turns")):
        options = DataConfig(path=(path,), eval_path=(plain,))
        chats = are_chats(comparison_streams(options, 2)[0])
        assert with_prompts(options, chats).text_prompts == kind
    hh = DataConfig(name="hh")
    assert with_prompts(hh, False) == hh
    assert not are_chats([])


def test_an_evaluation_needs_no_training_data_of_ones_own_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_reader.py").write_text(
        "import json\nfrom pathlib import Path\n"
        "def rows(path, split):\n    return map(json.loads, Path(path[0]).read_text().splitlines())\n"
    )
    options = DataConfig(name="own_reader:rows", path=("absent",), eval_path=(write(tmp_path / "a.jsonl", TEXT),))
    assert next(iter(held_out_comparisons(options, 2))).prompt == "p"


def test_mapped_columns_may_have_a_system_message():
    """Three texts under the usual names are no pair if a mapping names them otherwise."""
    columns = {"system": "prompt", "prompt": "chosen", "completion": "rejected"}
    rows = [{"prompt": "", "chosen": "U", "rejected": "A"}, {"prompt": "S", "chosen": "U2", "rejected": "A2"}]
    assert has_turns([(f"f:{i}", row) for i, row in enumerate(rows)], columns) is True


def test_text_prompts_are_what_the_config_says(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXT, TEXT | {"system": "be brief"})
    read_as = {kind: list(open_source("files", (path,), "train", 2, text_prompts=kind)) for kind in ("texts", "turns")}
    assert [item.prompt.messages for item in read_as["turns"]] == [(ASKED,), (SYSTEM, ASKED)]
    note = Note("prompts that stay texts (data.text_prompts) beside system, which are ignored")
    assert [getattr(item, "prompt", item) for item in read_as["texts"]] == ["p", "p", note]
    with pytest.raises(UserError, match=r"data.text_prompts: the source 'hh' knows its own columns"):
        open_source("hh", (), "train", 2, text_prompts="turns")


def test_columns_named_as_messages_that_hold_none_are_counted():
    for value in (5, "a text", {"a": 1}):
        assert read(TEXT | {"messages": value}) == [
            PLAIN,
            Note("text prompts beside messages without a list of messages; they are ignored"),
        ]


def test_turns_that_are_no_messages_are_an_error_of_their_example():
    row = {"prompt": "p", "chosen": [ASKED, "x"], "rejected": [ASKED, "y"]}
    with pytest.raises(UserError, match=r"^f:1: "):
        read(row)


def test_messages_in_a_csv_completion_are_turns():
    found = read({"prompt": Cell(json.dumps([ASKED])), "completion": Cell(json.dumps([GOOD]))}, 1)
    assert found[0].responses == (GOOD,)


def test_a_prompt_to_which_a_template_was_applied_stays_text_beside_other_columns():
    text = {"prompt": "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"}
    found = read(TEXT | text | {"system": "be brief", "messages": None})
    note = "prompts to which a chat template was applied already: their text holds system; they are ignored"
    assert found == [PLAIN._replace(prompt=text["prompt"]), Note(note)]


def test_a_prompt_that_mentions_a_mark_of_templates_is_a_turn_as_others_are():
    asked = {"role": "user", "content": "What does <|im_start|> mean?"}
    row = {"prompt": asked["content"], "chosen": "c", "rejected": "r"}
    assert read(row | {"system": "be brief"})[0].prompt.messages == (SYSTEM, asked)
    (pair,) = list(example_items([("f:1", row | {"system": None})], 2))
    assert pair.prompt == asked["content"]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    for text in (asked["content"], "<|im_start|>user\np"):
        assert read({"prompt": text} | answers)[0].prompt.messages == ({"role": "user", "content": text},)


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("<|endoftext|><|user|>\nhi\n<|assistant|>\n", True),
        ("<|startoftext|><|im_start|>user\nhi", True),
        ("[gMASK]<sop><|user|>\nhi<|assistant|>", True),
        ("[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]hi[/INST]", True),
        ("<|endoftext|>hi", False),
        ("Say <|user|>", False),
    ],
)
def test_prompts_that_begin_as_a_templates_turns_are_rendered_ones(text, rendered):
    assert is_prerendered(text) == rendered


def test_nulls_of_parquet_reach_no_template():
    tools = [{"name": "f", "parameters": {"x": {"type": "integer"}, "y": None}}, None]
    chat = read(TALK | {"tools": tools, "chat_template_kwargs": {"x": 1, "y": None}})[0].prompt
    assert chat.tools == ({"name": "f", "parameters": {"x": {"type": "integer"}}},)
    assert chat.options == {"x": 1}


def test_calls_and_tools_may_be_texts_of_json():
    call = {"role": "assistant", "tool_calls": json.dumps([{"name": "f", "arguments": "{}"}])}
    found = read(TALK | {"chosen": [call], "tools": [json.dumps({"name": "f"})]})[0]
    assert found.responses[0] == {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    assert found.prompt.tools == ({"name": "f"},)
    for row, message in (
        ({"tools": ["f"]}, "'tools' must hold objects, not text"),
        ({"chosen": [call | {"tool_calls": "f"}]}, "tool_calls that are text, not a list"),
    ):
        with pytest.raises(UserError, match=message):
            read(TALK | row)


def test_columns_of_conversations_beside_a_text_prompt_become_part_of_it():
    pair = ({"role": "assistant", "content": "c"}, {"role": "assistant", "content": "r"})
    asked = {"role": "user", "content": "p"}
    before = USER | {"content": "hi"}
    whole = {"chosen": [before, pair[0]], "rejected": [before, pair[1]]}
    for row, turns in (
        (TEXT | {"system": "be brief"}, (SYSTEM, asked)),
        (TEXT | {"messages": [USER, REPLY, asked]}, (USER, REPLY, asked)),
        (TEXT | {"messages": [USER, REPLY, asked, REPLY]}, (USER, REPLY, asked)),
        (TEXT | {"messages": [USER, REPLY]}, (USER, REPLY, asked)),
        (TEXT | {"messages": [SYSTEM]}, (SYSTEM, asked)),
        (TEXT | {"messages": [USER, REPLY], "system": "be brief"}, (SYSTEM, USER, REPLY, asked)),
        ({"prompt": "hi", "system": "be brief"} | whole, (SYSTEM, USER | {"content": "hi"})),
    ):
        assert read(row) == [Comparison(Chat(turns), pair, where="f:1")], row
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read(TEXT | {"tools": tools})[0].prompt == Chat((asked,), tuple(tools))
    assert read(TEXT | {"messages": [USER, REPLY], "completion": "c"}, 1)[0].prompt == Chat((USER, REPLY, asked))
    assert read({"prompt": "p", "system": "be brief"}, 0)[0].prompt == Chat((SYSTEM, asked))


def test_turns_of_input_and_output_are_two_messages():
    """Capybara's; beside whole conversations in chosen and rejected such a column repeats their beginning."""
    turns = [{"input": "hi", "output": "hello"}, {"input": "p", "output": "c"}]
    hi, hello = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    asked, good, bad = USER | {"content": "p"}, GOOD | {"content": "c"}, BAD | {"content": "r"}
    row = {
        "prompt": "p",
        "conversation": turns,
        "chosen": [hi, hello, asked, good],
        "rejected": [hi, hello, asked, bad],
    }
    assert read(row) == [Comparison(Chat((hi, hello, asked)), (good, bad), where="f:1")]
    assert read({"conversation": turns}, 1) == [Comparison(Chat((hi, hello, asked)), (good,), where="f:1")]


def test_a_response_may_have_several_turns_and_may_continue_one():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    written = call | {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}, "id": None}], "refusal": None}
    result = {"role": "tool", "content": "2"}
    row = TALK | {"chosen": [written, result, GOOD]}
    assert read(row)[0].responses == ([call, result, GOOD], BAD)
    assert read(TALK | {"prompt": [USER, REPLY]})[0].prompt == Chat((USER, REPLY))
    begun = {"chosen": [USER, GOOD, USER, REPLY], "rejected": [USER, BAD, USER, REPLY]}
    assert read(begun)[0].responses == ([GOOD, USER, REPLY], [BAD, USER, REPLY])


def test_nulls_in_messages_are_absent_fields_at_any_depth():
    tool_call = {"id": "1", "function": {"name": "f", "arguments": {"x": 1, "y": None}, "strict": None}, "type": None}
    found = read(TALK | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [tool_call]}]})[0].responses[0]
    assert found == {
        "role": "assistant", "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
    }  # fmt: skip
    empty = {"role": "assistant", "content": None, "tool_calls": None}
    assert read(TALK | {"chosen": [empty]})[0].responses[0] == {"role": "assistant", "content": ""}


def test_whether_prompts_are_turns_is_read_again_of_a_file_that_changes(tmp_path):
    """And once of one that does not: a run reads its data three times."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    (text,) = only_comparisons(open_stream("files", (str(path),), "train", 2))
    assert text.prompt == "p"
    more = {"prompt": "q", "chosen": "c", "rejected": "r", "system": "s"}
    path.write_text(path.read_text() + json.dumps(more) + "\n")
    turn, _ = only_comparisons(open_stream("files", (str(path),), "train", 2))
    assert isinstance(turn.prompt, Chat)
