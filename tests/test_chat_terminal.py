"""A conversation in the terminal: streams join to the batch's text, turns keep the history and compile once."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_chat_rewards import POLICY, user
from tiny import SHARED, folder_of, shared_model, tokens_of
from transformers import AutoTokenizer

from dpo_jax import cli
from dpo_jax.commands import sample as command
from dpo_jax.config.commands import SampleConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import load_folder, load_tokenizer
from dpo_jax.models.model import build_model
from dpo_jax.records import Chat
from dpo_jax.runs import sample as chats
from dpo_jax.sampling import generate, stream
from dpo_jax.sampling.stream import padded_length, stream_tokens
from dpo_jax.training.restore import asks_in_turns
from dpo_jax.training.tables import decode_texts, prompt_texts

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
STRICT = POLICY.replace("{% for", REFUSES + "{% for", 1)
DEAF = POLICY.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small Llama with a chat template, and with two that take no system turn."""
    folder = tmp_path_factory.mktemp("folders")
    for name, template in (("chat", POLICY), ("strict", STRICT), ("deaf", DEAF)):
        shutil.copytree(shared_model("stories260k"), folder / name)
        (folder / name).chmod(0o755)
        (folder / name / "chat_template.jinja").write_text(template)
    return folder


def settings_of(folder, *argv):
    return parse_config(SampleConfig, None, ["--model.path", str(folder), *argv])


@pytest.mark.parametrize(
    "how",
    [pytest.param({"temperature": 0}, marks=pytest.mark.slow), {"temperature": 0.8, "top_k": 40, "top_p": 0.9}],
    ids=str,
)
def test_a_stream_has_the_tokens_of_the_batch(tmp_path, how):
    """A length of its own for each prompt, an end within, and none: of a family with a capped head, too."""
    architecture, _, params = load_folder(folder_of("gemma2", tmp_path / "gemma2"))
    model, params = build_model(architecture), jax.device_put(params)
    prompts = [tokens_of(1, length, seed=length)[0] for length in (7, 20)]
    free = generate(model, params, prompts[:1], max_new_tokens=9, eos_id=(), **how)[0]
    ends = (int(free[5]),)
    for end in ((), ends):
        (batch,) = generate(model, params, prompts[:1], max_new_tokens=9, eos_id=end, **how)
        assert list(stream_tokens(model, params, prompts[0], max_new_tokens=9, eos_id=end, **how)) == batch.tolist()
    before = [f._cache_size() for f in (stream._begin, stream._go_on)]  # noqa: SLF001
    list(stream_tokens(model, params, prompts[1], max_new_tokens=9, eos_id=(), **how | {"seed": 8}))
    assert [f._cache_size() for f in (stream._begin, stream._go_on)] == before  # noqa: SLF001 (no program more)


def test_a_growing_conversation_is_padded_to_few_lengths():
    assert [padded_length(n) for n in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 1024]
    assert len({padded_length(n) for n in range(1, 4097)}) == 5


def test_what_cannot_be_streamed_is_refused_before_the_first_token(tmp_path):
    architecture, _, params = load_folder(folder_of("gpt2", tmp_path / "gpt2"))
    with pytest.raises(UserError, match="258 tokens, the model has 256 positions"):
        stream_tokens(build_model(architecture), params, tokens_of(1, 250)[0], max_new_tokens=8, eos_id=())


TEXTS = (
    'Once upon a time, there was a girl.\nShe said: "It\'s fine!"  Then  she left . ',
    "\u6f22\u5b57\u4eee\u540d\u4ea4\u3058\u308a\u6587\u3001\u7d75\u6587\u5b57 "
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 caf\u00e9 \u043f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f600\U0001f680 a\u0301 don 't do n't",
)


def tokenizers():
    return sorted(p.parent.relative_to(SHARED).as_posix() for p in SHARED.glob("*/*/tokenizer.json"))


WORDS = "\u6f22\u5b57\u4eee\u540d\u4ea4\u3058\u308a\u6587\u7d75"  # characters that are words of TEXTS


@pytest.mark.parametrize("name", tokenizers())
@pytest.mark.parametrize("text", TEXTS, ids=["words", "characters", "signs"])
def test_pieces_join_to_the_whole_and_never_hold_half_a_character(name, text):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for end in range(1, len(ids) + 1):
        pieces = list(chats.text_pieces(tokenizer, ids[:end], ()))
        assert "".join(pieces) == decode_texts(tokenizer, [ids[:end]])[0]
    whole = decode_texts(tokenizer, [ids])[0]
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)
    ends = np.cumsum([len(piece) for piece in pieces])[:-1]
    assert all(whole[end].isspace() or whole[end - 1] in ("\n", *WORDS) for end in ends)
    assert len(pieces) > 5 or text != TEXTS[0]


class Terminal(io.StringIO):
    """Standard input that a user types into, or a file."""

    typed = False

    def isatty(self):
        return self.typed


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs a conversation with the lines of a file as turns; returns what is shown, without the log."""

    def run(folder, text, *argv):
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        cli.run_command(["sample", str(folder), "--chat", "--temperature", "0", "--max_new_tokens", "6", *argv])
        return capsys.readouterr().out

    return run


def test_a_conversation_keeps_its_history_until_reset(folders, talk):
    said = talk(folders / "chat", "Hi\n\n/what\nAnd?\n/reset\nHi\n/exit\nnever\n", "--system", "Be kind.")
    shown = said.splitlines()
    assert "/reset begins anew, /exit or Ctrl-D ends" in shown[0]
    assert "unknown command /what; known: /reset, /exit" in shown
    assert "never" not in said
    turns = [i for i, line in enumerate(shown) if line.startswith("you: ") and not line.startswith("you: /")]
    assert [shown[i] for i in turns] == ["you: Hi", "you: And?", "you: Hi"]
    first, second, again = (
        "\n".join(part).partition("policy: ")[2].partition(" (cut at --max_new_tokens 6)")[0]
        for part in (shown[turns[0] :], shown[turns[1] :], shown[turns[2] :])
    )
    assert again == first
    tokenizer, settings = load_tokenizer(folders / "chat"), settings_of(folders / "chat")
    architecture, _, params = load_folder(folders / "chat")
    system, asked = {"role": "system", "content": "Be kind."}, [user("Hi"), {"role": "assistant", "content": first}]
    for wanted, messages in ((first, [system, asked[0]]), (second, [system, *asked, user("And?")])):
        (ids,) = chats.prompt_ids([Chat(tuple(messages))], tokenizer, settings.data)
        options = {"max_new_tokens": 6, "temperature": 0, "eos_id": tokenizer.eos_token_id}
        answer = generate(build_model(architecture), params, [np.asarray(ids)], **options)
        assert decode_texts(tokenizer, answer) == [wanted]


def test_the_reference_answers_the_same_history(folders, talk):
    said = talk(folders / "chat", "Hi\nAnd?\n", "--reference", "--reference.path", str(folders / "chat"))
    answers = {who: [line.partition(": ")[2] for line in said.splitlines() if line.startswith(who)]
               for who in ("policy", "reference")}  # fmt: skip
    assert len(answers["policy"]) == 2
    assert answers["reference"] == answers["policy"]
    with pytest.raises(UserError, match=r"--reference: .* has none; set --reference\.path"):
        talk(folders / "chat", "Hi\n", "--reference")


def test_only_the_policys_answer_goes_into_the_history(monkeypatch, capsys):
    heard = []

    def answer(chat, name, messages):
        heard.append((name, [m["content"] for m in messages]))
        if messages[-1]["content"] == "long":
            raise UserError("too long; shorten it")
        yield chats.Answer(f"{name} ")
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield chats.Answer("\x1b[2J")

    monkeypatch.setattr(command, "stream_answer", answer)
    monkeypatch.setattr(sys, "stdin", Terminal("a\nlong\nb\udcff\nstop\nc\n"))
    settings = SimpleNamespace(system="", samples=SimpleNamespace(max_new_tokens=3))
    command.converse(SimpleNamespace(settings=settings, params=["policy", "reference"]), "runs/x")
    said = capsys.readouterr().out
    assert r"policy: policy \x1b[2J" in said
    assert "too long; shorten it; or begin anew with /reset" in said
    assert "that line is not UTF-8" in said
    assert "policy: policy  (interrupted)" in said
    clear = "policy \x1b[2J"
    assert heard == [
        ("policy", ["a"]), ("reference", ["a"]),
        ("policy", ["a", clear, "long"]),
        ("policy", ["a", clear, "stop"]), ("reference", ["a", clear, "stop"]),
        ("policy", ["a", clear, "stop", "policy ", "c"]), ("reference", ["a", clear, "stop", "policy ", "c"]),
    ]  # fmt: skip


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_typed_turns_are_not_shown_again(end, monkeypatch, capsys):
    lines = iter(["Hi", " ", end])

    def typed(prompt):
        line = next(lines)
        if line is end:
            raise end
        return line

    monkeypatch.setattr(Terminal, "typed", True)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert list(command.user_turns()) == ["Hi"]
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("chat", ["--chat", "--prompt", "Hi"], "are read from standard input, as those of a user; remove --prompt"),
        ("chat", ["--chat", "--raw"], "remove --raw"),
        ("chat", [], "--prompt: give at least one text to complete, or --chat"),
        ("chat", ["--prompt", "Hi", "--reference"], "--chat and --reference: for a conversation in the terminal"),
        ("chat", ["--prompt", "Hi", "--raw", "--system", "S"], "system: no prompt becomes a turn of a user"),
        ("strict", ["--chat", "--system", "Be kind."], "system: the chat template takes no system turn"),
        ("deaf", ["--prompt", "Hi", "--system", "Be kind."], "system: the chat template takes no system turn"),
        ("../none", ["--chat"], "--chat: the tokenizer has no chat template; set data.chat_template"),
        ("chat", ["--chat", "no"], "chat: 'no' is not True or False; a flag may stand alone"),
        ("chat", ["--chat", "--reference", "x"], "unknown key 'reference'; it is a section; set reference.path"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(folders, name, argv, said):
    folder = shared_model("stories260k") if name == "../none" else folders / name
    with pytest.raises(UserError) as caught:
        cli.run_command(["sample", str(folder), *argv])
    assert said in str(caught.value)


@pytest.mark.parametrize(("kind", "turns"), [("conversations", True), ("texts", False)])
def test_a_run_records_whether_its_data_are_conversations(folders, tmp_path, kind, turns):
    """Its data may be gone: they are not read again."""
    (tmp_path / "config.yaml").write_text("data: {name: files, path: [gone.jsonl], eval_path: [gone.jsonl]}\n")
    (tmp_path / "inputs.json").write_text(json.dumps({"the kind of prompts": kind}))
    settings, tokenizer = settings_of(folders / "chat"), load_tokenizer(folders / "chat")
    assert asks_in_turns(str(tmp_path), tokenizer, settings) is turns


def test_a_system_message_stands_before_a_prompt(folders):
    settings, tokenizer = settings_of(folders / "chat", "--system", "Be kind."), load_tokenizer(folders / "chat")
    asked, _ = chats.prompts_as_turns(str(folders / "chat"), ["Hi"], tokenizer, settings)
    assert prompt_texts(asked, tokenizer, settings.data) == ["[system] Be kind.</s>[user] Hi</s>[assistant] "]
