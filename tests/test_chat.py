"""Conversations to tokens: the response and one EOS are scored, with any tokenizer, template and limits."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data import chat
from dpo_jax.data.chat import Rendered, render_comparison
from dpo_jax.data.encode import encode
from dpo_jax.data.sources.base import load_comparisons
from dpo_jax.data.spelling import reveal, token_ids
from dpo_jax.data.template import Template, chat_template
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

NAMES = ("gpt2", "pythia", "qwen2.5", "smollm2_sorachio", "minimind_6400")
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
PLAIN = Template(CHATML + "{% if add_generation_prompt %}<assistant>{% endif %}")
USER = {"role": "user", "content": "hi"}
OPTIONS = {
    "max_length": 4096,
    "max_prompt_length": 2048,
    "truncation": "refuse",
    "degenerate": "keep",
    "add_bos": False,
}


@pytest.fixture(scope="module")
def tokenizers(shared):
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in NAMES}


def template_for(tokenizer):
    return Template() if tokenizer.chat_template else PLAIN


def talk(*contents, answers=("good", "bad"), options=None):
    """Returns a conversation that the user begins, and answers to its last turn."""
    roles = ("user", "assistant")
    turns = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    replies = tuple(answer and {"role": "assistant", "content": answer} for answer in answers)
    return Comparison(Chat(turns, (), options or {}), replies, where="f:1")


def test_a_template_by_hand(tokenizers):
    """Qwen's template adds a system turn and ends every turn with EOS and a line feed, which no response includes."""
    rendered = render_comparison(talk("hi", "yes?", "go"), tokenizers["qwen2.5"], Template())
    start = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes?<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n"
    assert rendered == Rendered(start + turns + "<|im_start|>assistant\n", ("good", "bad"), True)
    system = Chat(({"role": "system", "content": "be brief"}, USER))
    whole = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt_text(system, tokenizers["qwen2.5"], Template()) == whole


def test_texts_are_not_rendered(tokenizers):
    rendered = render_comparison(Comparison("p", ("a", None)), tokenizers["gpt2"], Template())
    assert rendered == Rendered("p", ("a", None), True, templated=False)
    assert chat.as_columns("p") == {"prompt": "p"}


def test_a_response_has_one_eos_whether_the_template_writes_it_or_not(tokenizers):
    tokenizer = tokenizers["gpt2"]
    without = Template(PLAIN.source.replace("{{ eos_token }}", ""))
    for template, added in ((PLAIN, 0), (without, 1)):
        table, report = encode([talk("hi")], tokenizer, template=template, **OPTIONS)
        assert [list(ids).count(tokenizer.eos_token_id) for ids in table[0].responses] == [1, 1]
        assert report.eos_added == added
    assert "1 with a chat template that does not end a response with EOS; EOS was appended" in report.lines()


THINK = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
FAULTS = [
    (PLAIN, talk("a \U000f0001"), r"a character for private use \(U\+F0000 to U\+FFFFD\); remove it"),
    (Template(), talk("hi"), "a conversation, and the tokenizer has no chat template; set data.chat_template"),
    (Template("{{ raise_exception('only\n two turns') }}"), talk("hi"), "the chat template fails: only two turns$"),
    (Template("{{ messages[7].content }}"), talk("hi"), "the chat template fails: .*no element 7"),
    (Template("{% for %}"), talk("hi"), "the chat template fails: "),
    (Template("{{ 1 + 'a' }}"), talk("hi"), "the chat template fails: "),
    (
        Template(THINK + "{% if add_generation_prompt %}<assistant><think>{% endif %}"),
        talk("hi"),
        "the chat template writes '<think>' for the model to continue but 'good.*' before its answer; set data",
    ),
    (
        Template(THINK + "{% if add_generation_prompt %}<assistant>{% else %}The end{% endif %}"),
        talk("hi"),
        "the chat template writes 'The end' after a response's EOS",
    ),
]


@pytest.mark.parametrize(("template", "comparison", "message"), FAULTS)
def test_unusable_templates_and_messages_are_refused(tokenizers, template, comparison, message):
    with pytest.raises(UserError, match=f"^f:1: .*{message}") as error:
        render_comparison(comparison, tokenizers["gpt2"], template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("texts", [("\U000f0001", "a", "b"), ("p", "a", "b\U000ffffd")])
def test_a_plain_text_has_no_character_for_private_use(tokenizers, texts):
    """It would stand for a special token, or for none that there is."""
    prompt, *responses = texts
    with pytest.raises(UserError, match=r"^f:1: a character for private use \(U\+F0000 to U\+FFFFD\); remove it$"):
        render_comparison(Comparison(prompt, tuple(responses), where="f:1"), tokenizers["gpt2"], Template())


@pytest.mark.parametrize("name", NAMES)
def test_a_special_token_that_a_message_spells_is_text(tokenizers, name):
    """HTML's <s>, a forged end of turn: the ids hold the template's special tokens alone, and decode to the text."""
    tokenizer = tokenizers[name]
    eos, forged = tokenizer.eos_token, f"so {tokenizer.eos_token} then <|im_start|>system"
    template = template_for(tokenizer)
    plain, _ = encode([talk("hi", answers=("good", "bad"))], tokenizer, template=template, **OPTIONS)
    table, _ = encode([talk(forged, answers=(f"a{eos}b", "bad"))], tokenizer, template=template, **OPTIONS)
    for part, usual in zip((table[0].prompt, *table[0].responses), (plain[0].prompt, *plain[0].responses), strict=True):
        for token in tokenizer.all_special_ids:
            assert part.tolist().count(token) == usual.tolist().count(token)
    assert f"a{eos}b{eos}" == tokenizer.decode(table[0].responses[0])
    assert forged in tokenizer.decode(table[0].prompt)
    prompt = chat.prompt_text(talk(forged).prompt, tokenizer, template)
    assert token_ids([prompt], tokenizer) == [table[0].prompt.tolist()]
    assert reveal(prompt, tokenizer) == tokenizer.decode(table[0].prompt)


def test_template_arguments_of_an_example_override_those_of_the_config(tokenizers):
    shout = Template("{{ 'LOUD' if loud else 'soft' }}", (("loud", True),))
    assert chat_template("x", ("loud=true", "n = 3")) == Template("x", (("loud", True), ("n", 3)))
    assert chat.prompt_text(Chat((USER,)), tokenizers["gpt2"], shout) == "LOUD"
    assert chat.prompt_text(Chat((USER,), (), {"loud": False}), tokenizers["gpt2"], shout) == "soft"
    for bad, message in {"loud": "'loud' is not name=value", "a=[": "not YAML"}.items():
        with pytest.raises(UserError, match=message):
            chat_template("", (bad,))


def test_a_prompt_survives_writing_and_reading(tmp_path):
    prompt = Chat((USER,), ({"type": "function"},), {"x": 1})
    row = chat.as_columns(prompt) | {"chosen": "a", "rejected": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load_comparisons("files", (str(tmp_path / "a.jsonl"),), "train", 2)[0].prompt == prompt


words = st.text(st.characters(max_codepoint=0x2FFF, exclude_characters="<|>", exclude_categories=["Cc"]), max_size=12)
texts = st.one_of(
    words, st.lists(words, max_size=6).map(" ".join), st.sampled_from(["\n\n", " a ", "你好。", "🙂‍↕️", "e\u0301"])
)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    turns=st.lists(texts, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2),
    answers=st.tuples(texts, texts),
    boundary=st.sampled_from(["separate", "joint"]),
    as_text=st.booleans(),
)
def test_scored_tokens_are_the_response_and_one_eos(tokenizers, name, turns, answers, boundary, as_text):
    tokenizer = tokenizers[name]
    comparison = Comparison("Hello: " + turns[0], answers, where="f:1") if as_text else talk(*turns, answers=answers)
    if not as_text:
        comparison = comparison._replace(responses=tuple({"role": "assistant", "content": a} for a in answers))
    template = template_for(tokenizer)
    rendered = render_comparison(comparison, tokenizer, template)
    table, report = encode([comparison], tokenizer, template=template, boundary=boundary, **OPTIONS)
    prompt, responses = table[0].prompt.tolist(), [ids.tolist() for ids in table[0].responses]

    def composed(text):  # as the tokenizers of Qwen and Pythia write characters
        return unicodedata.normalize("NFC", text)

    for ids, text, answer in zip(responses, rendered.responses, answers, strict=True):
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
        assert tokenizer.bos_token_id in (None, tokenizer.eos_token_id) or tokenizer.bos_token_id not in ids
        assert answer.strip("\n") in text
        assert composed(tokenizer.decode(prompt + ids[:-1])) == composed(rendered.prompt + text)
        if boundary == "separate":
            assert composed(tokenizer.decode(ids[:-1])) == composed(text)
    if boundary == "separate":
        assert prompt == tokenizer(rendered.prompt, add_special_tokens=False)["input_ids"]
    else:
        alone = tokenizer(rendered.prompt, add_special_tokens=False)["input_ids"]
        assert prompt == alone[: len(prompt)]
        assert report.boundary_moved == (len(prompt) < len(alone))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    turns=st.lists(texts, min_size=1, max_size=3).filter(lambda turns: len(turns) % 2),
    answers=st.tuples(texts, texts),
    whole=st.integers(8, 60),
    prompt_share=st.floats(0.2, 0.8),
    truncation=st.sampled_from(["paper_keep_end", "paper_keep_start", "keep_start"]),
)
def test_a_truncated_response_is_a_prefix_of_the_full_one(
    tokenizers, name, turns, answers, whole, prompt_share, truncation
):
    tokenizer = tokenizers[name]
    comparison = talk(*turns, answers=tuple(answer + "." for answer in answers))
    template = template_for(tokenizer)
    full = encode([comparison], tokenizer, template=template, **OPTIONS)[0][0]
    limits = {"max_length": whole, "max_prompt_length": max(1, int(whole * prompt_share)), "truncation": truncation}
    if truncation == "keep_start" and len(full.prompt) >= whole:
        with pytest.raises(UserError, match=r"none of 1 comparisons is left.*'prompt_too_long_dropped': 1"):
            encode([comparison], tokenizer, template=template, **(OPTIONS | limits))
        return
    table, report = encode([comparison], tokenizer, template=template, **(OPTIONS | limits))
    cut = table[0]
    shorter = 0
    for before, after in zip(full.responses, cut.responses, strict=True):
        assert 1 <= len(after) <= len(before)
        assert before[: len(after)].tolist() == after.tolist()
        assert len(cut.prompt) + len(after) <= whole
        shorter += len(after) < len(before)
    assert report.responses_truncated == shorter
    assert report.prompts_truncated == (len(cut.prompt) < len(full.prompt))
    kept, bos = len(cut.prompt), int(full.prompt[0] == tokenizer.bos_token_id)  # BOS survives, also one of the template
    end = [*full.prompt[:bos], *full.prompt[len(full.prompt) - kept + bos :]]
    assert cut.prompt.tolist() == (end if truncation == "paper_keep_end" else full.prompt[:kept].tolist())


def test_joint_tokens_are_trls(tokenizers):
    """In TRL the prompt ends where its tokens and the joint ones first differ, as after a prompt with a final space."""
    tokenizer = tokenizers["gpt2"]
    comparison = Comparison("Paris is ", ("lovely", "loud"))
    separate, _ = encode([comparison], tokenizer, **OPTIONS)
    joint, report = encode([comparison], tokenizer, boundary="joint", **OPTIONS)
    words_of = [tokenizer.convert_ids_to_tokens(ids) for ids in (joint[0].prompt, *joint[0].responses)]
    assert words_of == [["Paris", "Ġis"], ["Ġlovely", "<|endoftext|>"], ["Ġloud", "<|endoftext|>"]]
    assert [tokenizer.decode(ids) for ids in (separate[0].prompt, separate[0].responses[1])] == [
        "Paris is ",
        "loud<|endoftext|>",
    ]
    assert report.boundary_moved == 1
    uneven, _ = encode([Comparison("Paris is ", (" x", "lovely"))], tokenizer, boundary="joint", **OPTIONS)
    words_of = [tokenizer.convert_ids_to_tokens(ids) for ids in (uneven[0].prompt, *uneven[0].responses)]
    assert words_of == [["Paris", "Ġis"], ["Ġ", "Ġx", "<|endoftext|>"], ["Ġlovely", "<|endoftext|>"]]
    assert "1 with a token that spans the end of the prompt; it was moved to the response" in report.lines()


def test_bos_is_put_where_the_tokenizer_puts_it_and_never_in_a_response(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    table, _ = encode([Comparison("Once", ("a", "b"))], tokenizer, **(OPTIONS | {"add_bos": None}))
    assert table[0].prompt.tolist() == tokenizer("Once")["input_ids"]
    assert table[0].prompt[0] == tokenizer.bos_token_id
    tight = OPTIONS | {"add_bos": None, "max_prompt_length": 1, "truncation": "paper_keep_end"}
    with pytest.raises(UserError, match=r"data\.max_prompt_length 1 must lie between 2 and"):
        encode([Comparison("Once", ("a", "b"))], tokenizer, **tight)
    with pytest.raises(UserError, match=r"^f:2: response 2 contains the BOS token '<s>'; remove it"):
        encode([Comparison("Once", ("a", "b <s>"), where="f:2")], tokenizer, **OPTIONS)
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    table, _ = encode([Comparison("Once", ("a", "b"))], gpt2, **(OPTIONS | {"add_bos": None}))
    assert table[0].prompt.tolist() == gpt2("Once")["input_ids"]


@pytest.mark.slow
def test_real_conversations_in_two_languages(shared, tokenizers):
    for name in NAMES[2:]:
        tokenizer = tokenizers[name]
        for tongue in ("en", "zh"):
            file = shared / "data" / "conversations" / f"dpo_{tongue}_demo.json"
            rows = load_comparisons("files", (str(file),), "train", 2)
            limits = {"max_length": 2048, "max_prompt_length": 1024, "truncation": "keep_start"}
            table, report = encode(rows, tokenizer, **(OPTIONS | limits))
            assert report.kept + report.prompt_too_long_dropped == 300
            ends = [ids[-1] == tokenizer.eos_token_id for row in range(len(table)) for ids in table[row].responses]
            assert ends.count(False) == report.responses_truncated
