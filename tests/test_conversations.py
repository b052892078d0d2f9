"""Conversations in the forms of data sets: beside texts, of several turns, with nulls of Parquet."""

import json
from itertools import product

import pytest
from test_columns import BAD, GOOD, REPLY, SYSTEM, TALK, TEXT, USER, read

from dpo_jax.data.sources.base import Note
from dpo_jax.data.sources.files import example_items
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

PLAIN = Comparison("p", ("c", "r"), where="f:1")


def test_an_empty_column_of_conversations_is_absent():
    for name, empty in product(("system", "tools", "messages"), ("", "[]", [], None)):
        assert read(TEXT | {name: empty}) == [PLAIN], (name, empty)


def test_text_prompts_are_turns_if_one_of_the_first_examples_has_a_system_message():
    rows = [TEXT | {"system": None}, TEXT, TEXT | {"system": "be brief"}, TEXT | {"tools": "[]"}]
    found = list(example_items([("f:1", row) for row in rows], 2))
    asked = {"role": "user", "content": "p"}
    assert [item.prompt.messages for item in found] == [(asked,), (asked,), (SYSTEM, asked), (asked,)]
    assert list(example_items([("f:1", row) for row in rows[:2]], 2)) == [PLAIN, PLAIN]


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
