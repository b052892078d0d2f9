"""Conversations as a template writes them: faults after rendering, several turns, prefills, texts rendered before."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.cache import cached_encode
from dpo_jax.data.chat import render_comparison
from dpo_jax.data.encode import encode
from dpo_jax.data.pack import build_batch, choose_layout
from dpo_jax.data.table import Table
from dpo_jax.data.template import Template, chat_template
from dpo_jax.errors import UserError
from dpo_jax.logprobs import batch_logps
from dpo_jax.models.huggingface.load import load_model
from dpo_jax.records import Chat, Comparison

OPTIONS = {"max_length": 512, "max_prompt_length": 256, "truncation": "refuse", "degenerate": "drop", "add_bos": None}
USER = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
TURNS = Template(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


@pytest.fixture(scope="module")
def tokenizers(shared):
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in ("gpt2", "qwen2.5")}


def talk(*answers, turns=(USER,)):
    return Comparison(Chat(tuple(turns)), answers, where="f:1")


# What the template wrote.


@pytest.mark.parametrize(
    ("pair", "counted"),
    [
        (talk(GOOD | {"id": "1"}, GOOD | {"id": "2"}), "identical_dropped"),
        (talk(GOOD | {"reasoning_content": "a"}, GOOD | {"reasoning_content": "b"}), "identical_dropped"),
        (talk(GOOD, {"role": "assistant", "content": " ", "id": "2"}), "empty_dropped"),
        (talk(CALL | {"content": ""}, BAD), "empty_dropped"),
        (talk(GOOD, BAD), ""),
    ],
)
def test_responses_are_compared_as_the_template_writes_them(tokenizers, pair, counted):
    table, report = encode([pair, talk(GOOD, BAD)], tokenizers["gpt2"], template=TURNS, **OPTIONS)
    assert (len(table), report.empty_dropped, report.identical_dropped) == (
        2 - bool(counted), counted == "empty_dropped", counted == "identical_dropped",
    )  # fmt: skip


def test_a_template_that_refuses_empty_answers_takes_calls_without_content(tokenizers):
    refuses = "{% if m.role == 'assistant' and not (m.content or m.tool_calls) %}{{ 1 / 0 }}{% endif %}"
    calls = "{{ m.content }}{% for t in m.tool_calls %}CALL {{ t.function.name }}{% endfor %}"
    template = Template(TURNS.source.replace("{{ m.content }}", refuses + calls))
    found = render_comparison(talk(CALL | {"content": ""}, BAD), tokenizers["gpt2"], template)
    assert (found.responses[0], found.emptied) == ("CALL f", False)


def test_a_short_response_that_occurs_in_the_frame_alone_is_empty(tokenizers):
    """The template drops an answer with a call, and writes the word a of it in a header."""
    framed = "{% if m.role == 'user' %}{{ m.content }}{% else %}"
    framed += "a header: {{ m.content if m.content != 'a' }}{% endif %}"
    template = Template(TURNS.source.replace("{{ m.content }}", framed))
    pairs = [talk({"role": "assistant", "content": "a"}, BAD), talk(GOOD, BAD)]
    assert encode(pairs, tokenizers["gpt2"], template=template, **OPTIONS)[1].empty_dropped == 1


def test_dates_in_template_arguments_are_texts_and_other_values_are_json():
    assert chat_template("", ("date_string=2024-07-26", "n=[1, x]")).options == (
        ("date_string", "2024-07-26"),
        ("n", [1, "x"]),
    )
    for value in ("!!set {a}", "!!binary aGk=", ".nan"):
        with pytest.raises(UserError, match=r"^data.chat_template_kwargs: x: .*; give text, numbers or lists of them"):
            chat_template("", (f"x={value}",))


def test_fields_that_a_template_writes_without_naming_them_are_written(tokenizers):
    whole = Template(TURNS.source.replace("{{ m.content }}", "{{ m | tojson }}"))
    assert encode([talk(GOOD | {"mood": "glad"}, BAD)], tokenizers["gpt2"], template=whole, **OPTIONS)[1].notes == {}


def test_reasoning_that_a_template_cuts_off_makes_responses_identical(tokenizers):
    cut = Template(TURNS.source.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"))
    pair = talk(*({"role": "assistant", "content": f"<think>{x}</think>same"} for x in "ab"))
    assert encode([pair, talk(GOOD, BAD)], tokenizers["gpt2"], template=cut, **OPTIONS)[1].identical_dropped == 1


def test_what_a_template_does_not_write_is_counted(tokenizers):
    chat = Chat((USER | {"name": "Ann"},), ({"type": "function"},), {"loud": True})
    _, report = encode([Comparison(chat, (GOOD | {"weight": 2}, BAD))], tokenizers["gpt2"], template=TURNS, **OPTIONS)
    assert report.notes == {
        "conversations with fields that the chat template does not write: name, weight": 1,
        "conversations with tools, which the chat template does not write": 1,
        "conversations with arguments that the chat template does not use: loud": 1,
    }
    _, report = encode([talk(CALL, BAD)], tokenizers["qwen2.5"], **OPTIONS)
    assert report.notes == {}


def test_a_call_without_content_is_written_as_a_call_alone(tokenizers):
    rendered = render_comparison(talk(CALL, BAD), tokenizers["qwen2.5"], Template())
    assert rendered.responses[0] == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_null_content_is_none_to_a_template_that_tests_for_it_and_absent_to_others(tokenizers):
    """DeepSeek-V3's template writes calls where content is none; a plain one would write the word None."""
    calls = "{% for t in m.tool_calls %}CALL {{ t.function.name }}{% endfor %}"
    tests = Template(TURNS.source.replace("{{ m.content }}", "{% if m.content is none %}" + calls + "{% endif %}"))
    for template, text in ((tests, "CALL f"), (TURNS, "")):
        assert render_comparison(talk(CALL, BAD), tokenizers["gpt2"], template).responses[0] == text


def test_responses_that_repeat_their_prompt_are_counted(tokenizers):
    pairs = [Comparison("Q: hi\nA:", ("Q: hi\nA: yes", "no")), Comparison("Q: hi\nA:", (" yes", " no"))]
    _, report = encode(pairs, tokenizers["gpt2"], **OPTIONS)
    assert report.notes == {"comparisons with a response that begins with the prompt; remove it from the response": 1}


def test_of_named_templates_the_one_for_tools_or_the_default_is_taken(tokenizers):
    tokenizer = tokenizers["gpt2"]
    try:
        tokenizer.chat_template = {"default": TURNS.source, "tool_use": "T" + TURNS.source, "rag": "R"}
        assert render_comparison(talk(GOOD), tokenizer, Template()).prompt.startswith("<user>")
        with_tools = Comparison(Chat((USER,), ({"type": "function"},)), (GOOD,))
        assert render_comparison(with_tools, tokenizer, Template()).prompt.startswith("T<user>")
        tokenizer.chat_template = {"rag": "R"}
        with pytest.raises(UserError, match="the tokenizer has no chat template"):
            render_comparison(talk(GOOD), tokenizer, Template())
    finally:
        tokenizer.chat_template = None


# Several turns, and turns that a response continues.

LONG = [GOOD, {"role": "user", "content": "more"}, {"role": "assistant", "content": "fine"}]


def test_only_turns_of_the_assistant_are_scored(tokenizers):
    """By hand: the scored tokens are each answer with its EOS; all tokens lie in the row."""
    tokenizer = tokenizers["gpt2"]
    table, report = encode([talk(LONG, BAD)], tokenizer, template=TURNS, **OPTIONS)
    tokens = table[0]
    assert tokenizer.decode(tokens.responses[0]) == (
        "good<|endoftext|>\n<user>more<|endoftext|>\n<assistant>fine<|endoftext|>"
    )
    assert tokenizer.decode(tokens.responses[0][tokens.scored[0]]) == "good<|endoftext|>fine<|endoftext|>"
    assert tokens.scored[1].all()
    assert report.scored == sum(int(mask.sum()) for mask in tokens.scored) == table.scored_lengths[0]
    assert report.tokens == len(table.ids)


def test_log_probs_of_several_turns_are_those_of_their_tokens(shared):
    """Against the model run on prompt + response alone, one token after another."""
    model, params, tokenizer = load_model(shared / "models/stories260k")
    table, _ = encode([talk(LONG, BAD), talk(GOOD, LONG), talk(BAD, GOOD)], tokenizer, template=TURNS, **OPTIONS)
    layout = choose_layout(table, max_length=512, batch_size=3)
    batch, _, places = build_batch(table, range(3), layout)
    lp = batch_logps(model, params, type(batch)(*(field[0] for field in batch if len(field))))
    flat = places[:, 1] * layout.segments + places[:, 2]
    assert (places[:, 0] == 0).all()
    for i, at in enumerate(flat):
        masks = table[i].scored or tuple(np.ones(len(r), bool) for r in table[i].responses)
        for p, response in enumerate(table[i].responses):
            ids = np.concatenate([table[i].prompt, response])[None]
            hidden = model.hidden(params, ids, np.arange(ids.shape[1])[None], np.ones_like(ids), np.zeros_like(ids))
            logits = np.asarray(jnp.einsum("rtd,vd->rtv", hidden, model.head(params)), np.float64)[0]
            each = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[len(table[i].prompt) - 1 : -1]
            expected = each[np.arange(len(response)), response][masks[p]].sum()
            np.testing.assert_allclose(lp.policy[at, p], expected, rtol=1e-5)
            assert lp.lengths[at, p] == masks[p].sum()


def test_masks_survive_the_cache_selection_and_truncation(tokenizers, tmp_path):
    items, tokenizer = [talk(BAD, GOOD), talk(LONG, BAD), talk(GOOD, LONG)], tokenizers["gpt2"]
    table, _ = cached_encode(items, tokenizer, tmp_path, template=TURNS, **OPTIONS)
    again, _ = cached_encode(items, tokenizer, tmp_path, template=TURNS, **OPTIONS)
    memory, _ = encode(items, tokenizer, template=TURNS, **OPTIONS)
    for i in range(3):
        for one, other in zip(memory[i].scored, again[i].scored, strict=True):
            np.testing.assert_array_equal(one, other)
    assert table.digest == memory.digest != Table.of(t._replace(scored=()) for t in memory_rows(memory)).digest
    assert table.take(np.array([2, 1])).scored_lengths.tolist() == memory.scored_lengths[[2, 1]].tolist()
    limits = OPTIONS | {"truncation": "keep_start", "max_length": len(memory[1].prompt) + 4}
    cut, _ = encode(items[1:2], tokenizer, template=TURNS, **limits)
    assert cut[0].scored[0].tolist() == memory[1].scored[0][:4].tolist()


def memory_rows(table):
    return [table[i] for i in range(len(table))]


def test_a_template_that_drops_earlier_turns_is_refused(tokenizers):
    kept = "{{ m.content if loop.last or m.role == 'user' else '' }}"
    last = Template(TURNS.source.replace("{{ m.content }}", kept))
    with pytest.raises(UserError, match=r"^f:1: turn 1 of a response cannot be found in what the chat template writes"):
        render_comparison(talk(LONG), tokenizers["gpt2"], last)


def test_turns_that_a_template_writes_otherwise_once_others_follow(tokenizers, shared):
    """Qwen 3 writes an empty block of reasoning in the last turn alone."""
    config = json.loads((shared / "tokenizers/qwen2.5/tokenizer_config_qwen3.json").read_text())
    template = Template(config["chat_template"])
    tool = {"role": "tool", "content": "<tool_call>"}
    loop = [CALL | {"content": "so"}, tool, CALL | {"content": ""}, tool, {"role": "assistant", "content": "Then"}]
    rendered = render_comparison(talk(loop), tokenizers["qwen2.5"], template)
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    last = "<think>\n\n</think>\n\nThen<|im_end|>"
    said = [(rendered.responses[0] + "<|im_end|>")[first:end] for first, end in rendered.spans[0]]
    assert said == [f"so\n{call}", call, last]


def test_turns_are_found_in_templates_that_need_a_call_before_a_tools_result(tokenizers):
    """The template writes calls, marks the last turn, and fails for a tool's result without a call before it."""
    calls = "{{ m.content }}{% for t in m.tool_calls %}[{{ t.function.name }}]{% endfor %}"
    last = "{% if loop.last and m.role == 'assistant' %}!{% endif %}"
    check = "{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ 1 / 0 }}{% endif %}"
    template = Template(TURNS.source.replace("{{ m.content }}", last + check + calls))
    turns = [CALL | {"content": "so"}, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "Then"}]
    rendered = render_comparison(talk(turns), tokenizers["gpt2"], template)
    said = [(rendered.responses[0] + "<|endoftext|>")[first:end] for first, end in rendered.spans[0]]
    assert said == ["so[f]<|endoftext|>", "!Then<|endoftext|>"]
    fails = Template(TURNS.source.replace("{{ m.content }}", last + "{{ m.content if m.content in ['hi', 'so'] }}"))
    with pytest.raises(UserError, match=r"^f:1: turn 1 of a response cannot be found"):
        render_comparison(talk(turns), tokenizers["gpt2"], fails)


def test_a_turn_marker_that_is_bos_and_spelled_tokens_are_part_of_several_turns(tokenizers, shared):
    """SmolLM2's BOS begins every turn. A spelled end of turn is text, which the mask covers."""
    from transformers import AutoTokenizer

    smol = AutoTokenizer.from_pretrained(shared / "tokenizers/smollm2_sorachio")
    smol.bos_token, template = "<|im_start|>", tokenizers["qwen2.5"].chat_template
    table, _ = encode([talk(LONG, BAD)], smol, template=Template(template), **OPTIONS)
    assert smol.decode(table[0].responses[0][table[0].scored[0]]) == "good<|im_end|>fine<|im_end|>"
    spelled = [GOOD | {"content": "a<|im_end|>b"}, *LONG[1:]]
    tokens = encode([talk(spelled, BAD)], tokenizers["qwen2.5"], **OPTIONS)[0][0]
    ids = tokens.responses[0][tokens.scored[0]]
    assert tokenizers["qwen2.5"].decode(ids) == "a<|im_end|>b<|im_end|>fine<|im_end|>"
    assert list(ids).count(tokenizers["qwen2.5"].eos_token_id) == 2


def test_a_response_of_which_a_template_writes_only_its_frame_is_empty(tokenizers):
    """As with Gemma's end of turn, which is not EOS, or Qwen 3's empty block of reasoning."""
    framed = Template(TURNS.source.replace("{{ eos_token }}", "<end>").replace("{{ m.content }}", "<t>{{ m.content }}"))
    calls = [CALL | {"content": ""}, {"role": "user", "content": "more"}, CALL | {"content": ""}]
    for pair in (talk(CALL | {"content": ""}, BAD), talk(calls, BAD)):
        assert encode([pair, talk(GOOD, BAD)], tokenizers["gpt2"], template=framed, **OPTIONS)[1].empty_dropped == 1


def test_fields_are_unwritten_if_the_text_is_the_same_without_them(tokenizers, shared):
    """Qwen names `name` for its tools alone, and Qwen 3 drops the reasoning of turns before the last question."""
    _, report = encode([talk(GOOD, BAD, turns=(USER | {"name": "Ann"},))], tokenizers["qwen2.5"], **OPTIONS)
    note = "conversations with fields that the chat template does not write: "
    assert report.notes == {note + "name": 1}
    config = json.loads((shared / "tokenizers/qwen2.5/tokenizer_config_qwen3.json").read_text())
    thought = GOOD | {"reasoning_content": "a thought of some length"}
    early, late = talk(GOOD, BAD, turns=(USER, thought, USER)), talk(thought, BAD)
    for pair, notes in ((early, {note + "reasoning_content": 1}), (late, {})):
        options = OPTIONS | {"template": Template(config["chat_template"])}
        assert encode([pair], tokenizers["qwen2.5"], **options)[1].notes == notes


def test_a_response_continues_a_turn_of_the_assistant(tokenizers):
    begun = {"role": "assistant", "content": "Step 1:"}
    pair = talk({"role": "assistant", "content": " add"}, {"role": "assistant", "content": " cut"}, turns=(USER, begun))
    rendered = render_comparison(pair, tokenizers["gpt2"], TURNS)
    assert (rendered.prompt, rendered.responses) == ("<user>hi<|endoftext|>\n<assistant>Step 1:", (" add", " cut"))
    rendered = render_comparison(pair, tokenizers["qwen2.5"], Template())
    assert rendered.prompt.endswith("<|im_start|>assistant\nStep 1:")
    assert rendered.responses == (" add", " cut")


def test_a_prompt_that_ends_in_a_call_lacks_the_tools_answer(tokenizers):
    with pytest.raises(UserError, match=r"^f:1: the prompt ends in a tool call; add the tool's answer to it"):
        render_comparison(talk(GOOD, BAD, turns=(USER, CALL)), tokenizers["qwen2.5"], Template())
    done = (USER, CALL, {"role": "tool", "content": "7"})
    assert render_comparison(talk(GOOD, BAD, turns=done), tokenizers["qwen2.5"], Template()).responses == (
        "good",
        "bad",
    )


# Texts to which a template was applied already.

CHATML = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|>\n"])
def test_texts_rendered_before_keep_their_eos_and_get_one(tokenizers, ending):
    tokenizer = tokenizers["qwen2.5"]
    table, report = encode([Comparison(CHATML, ("good" + ending, "bad" + ending))], tokenizer, **OPTIONS)
    assert tokenizer.decode(table[0].prompt) == CHATML
    assert [tokenizer.decode(ids) for ids in table[0].responses] == ["good<|im_end|>", "bad<|im_end|>"]
    assert report.notes == {
        "texts to which a chat template was applied already; they stay as they are, with one EOS at the end": 1
    }
    with pytest.raises(UserError, match="response 1 contains the EOS token"):
        encode([Comparison(CHATML, ("a<|im_end|>b", "bad"), where="f:1")], tokenizer, **OPTIONS)
    with pytest.raises(UserError, match="the prompt contains the EOS token"):
        encode([Comparison("hi<|im_end|>", ("a", "bad"), where="f:1")], tokenizer, **OPTIONS)


def test_bos_in_a_text_is_not_doubled(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    plain, _ = encode([Comparison("Once", ("a", "b"))], tokenizer, **OPTIONS)
    for add_bos in (None, True):
        options = OPTIONS | {"add_bos": add_bos}
        table, report = encode([Comparison("<s>Once", ("a", "b"))], tokenizer, **options)
        assert table[0].prompt.tolist().count(tokenizer.bos_token_id) == 1
        assert report.notes == {"prompts that begin with BOS already; no second one was added": 1}
    assert plain[0].prompt.tolist().count(tokenizer.bos_token_id) == 1


# Boundary and truncation.


def test_conversations_are_tokenized_jointly_and_texts_separately_by_default(tokenizers):
    tokenizer = tokenizers["gpt2"]
    open_space = Template("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
                          "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    for boundary, ids in (("auto", ["Ġgood"]), ("joint", ["Ġgood"]), ("separate", ["good"])):
        table, _ = encode([talk(GOOD, BAD)], tokenizer, template=open_space, boundary=boundary, **OPTIONS)
        assert tokenizer.convert_ids_to_tokens(table[0].responses[0][:-1]) == ids
    table, _ = encode([Comparison("Paris is ", ("lovely", "loud"))], tokenizer, boundary="auto", **OPTIONS)
    assert tokenizer.decode(table[0].prompt) == "Paris is "


def test_the_bos_of_a_template_survives_truncation(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    template = Template("{{ bos_token }}" + TURNS.source)
    options = OPTIONS | {"truncation": "paper_keep_end", "max_length": 14, "max_prompt_length": 6, "add_bos": False}
    asked = {"role": "user", "content": "Once upon a time there was a big red cat"}
    table, _ = encode([talk(GOOD, BAD, turns=(asked,))], tokenizer, template=template, **options)
    full, _ = encode([talk(GOOD, BAD, turns=(asked,))], tokenizer, template=template, **OPTIONS)
    assert table[0].prompt.tolist() == [tokenizer.bos_token_id, *full[0].prompt[-5:]]
    options["max_prompt_length"] = 1
    table, _ = encode([talk(GOOD, BAD, turns=(asked,))], tokenizer, template=template, **options)
    assert table[0].prompt.tolist() == [tokenizer.bos_token_id]
