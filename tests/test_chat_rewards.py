"""Chats after training: reward models score conversations by their own template; `sample` asks as a user does."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import shared_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dpo_jax
from dpo_jax import cli
from dpo_jax.config.commands import EvalConfig, SampleConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import load_tokenizer
from dpo_jax.records import Chat
from dpo_jax.runs import evaluate as runs
from dpo_jax.runs import sample as samples
from dpo_jax.training.metrics_file import read_metrics

# Two templates: the policy's and the reward model's.
POLICY = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
POLICY += "{% if add_generation_prompt %}[assistant] {% endif %}"
JUDGE = POLICY.replace("[", "(").replace("]", ")").replace("{% for", "{{ tone }}{% for", 1)


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


ROWS = [
    {"prompt": [user(f"Where is {x}?")], "chosen": [answer(f"In {x}.")], "rejected": [answer("No.")]}
    for x in ("Rome", "Lima", "Oslo", "Bonn")
]
OPTIONS = {"batch_size": 4, "samples": {"prompts": 0, "max_new_tokens": 6}}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A policy with a chat template, pairs of conversations, and a reward model trained on them with another one."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, template in (("policy", POLICY), ("judge", JUDGE)):
        shutil.copytree(shared_model("stories260k"), folder / name)
        (folder / name).chmod(0o755)
        (folder / name / "chat_template.jinja").write_text(template)
    data = {
        "path": [str(folder / "d.jsonl")],
        "eval_path": [str(folder / "d.jsonl")],
        "max_length": 96,
        "max_prompt_length": 64,
    }
    how = {"loss": "bradley_terry", "optim": {"learning_rate": 1e-3, "warmup_steps": 0}, "epochs": 2}
    data["chat_template_kwargs"] = ["tone=very terse"]
    dpo_jax.train(model=folder / "judge", data=data, run=str(folder / "rm"), **how, **OPTIONS)
    return folder


def test_a_run_on_conversations_says_so(chats):
    assert json.loads((chats / "rm/inputs.json").read_text())["the kind of prompts"] == "conversations"


def rewards(folder, prompt, answers):
    """Returns transformers' rewards of answers to a conversation."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm/model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "rm/model")
    found = []
    for text in answers:
        how = {"tokenize": True, "return_tensors": "pt", "tone": "very terse"}
        ids = tokenizer.apply_chat_template([*prompt, answer(text)], **how)
        with torch.no_grad():
            found.append(model(getattr(ids, "input_ids", ids)).logits[0, 0].item())
    return found


@pytest.mark.slow
def test_pairs_are_scored_as_the_conversations_of_training(chats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = ["--reward", f"model:{chats / 'rm'}", "--label", "ranked", "--data.path", str(chats / "d.jsonl")]
    cli.run_command(["pairs", str(chats / "policy"), "out.jsonl", *reward, "--max-new-tokens", "6"])
    found = read_metrics(tmp_path / "out.jsonl")
    assert len(found) >= 4
    for row in found:
        texts = [row[side] for side in ("chosen", "rejected")]
        wanted = rewards(chats, row["prompt"], texts)
        np.testing.assert_allclose(row["provenance"]["scores"], wanted, atol=1e-4)


@pytest.mark.slow
def test_eval_and_winrate_score_them_so_too(chats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"path": ["absent.jsonl"], "eval_path": [str(chats / "d.jsonl")], "max_length": 96, "max_prompt_length": 64}
    keys = {"reward": f"model:{chats / 'rm'}", "prompts": 2, "samples": {"max_new_tokens": 6, "temperature": 0.0}}
    keys |= {
        "show": 2,
        "data": data,
        "model": {"path": str(chats / "policy")},
        "reference": {"path": str(chats / "policy")},
    }
    found = runs.evaluate_path(str(chats / "policy"), parse_config(EvalConfig, None, keys, prog="x"))
    prompts = [row["prompt"] for row in ROWS[:2]]

    def mean(answers):
        return np.mean([rewards(chats, prompt, [text])[0] for prompt, text in zip(prompts, answers, strict=True)])

    wanted = mean([policy for _, policy, _ in found.completions])
    assert found.metrics["true reward of the policy"]["mean"] == pytest.approx(wanted, abs=1e-4)
    said = dpo_jax.sample(chats / "policy", prompts, samples=keys["samples"])["policy"]
    options = ["--judge", "happy", "--best-by", f"model:{chats / 'rm'}", "--temperatures", "0", "--prompts", "2"]
    options += ["--data.path", "absent.jsonl", "--data.eval-path", str(chats / "d.jsonl"), "--out", "w"]
    cli.run_command(["winrate", str(chats / "policy"), *options, "--samples.max-new-tokens", "6"])
    (row,) = json.loads((tmp_path / "w/winrate.json").read_text())
    assert row["reward"][0] == pytest.approx(float(mean(said)), abs=1e-4)


def turns(folder, prompts, *options):
    """Returns what prompts become, and the line that says so; no weights are needed."""
    settings = parse_config(SampleConfig, None, ["--model.path", str(folder), *options], prog="x")
    return samples.prompts_as_turns(str(folder), prompts, load_tokenizer(folder), settings)


def test_a_bare_prompt_is_a_turn_of_the_user(chats):
    asked = Chat((user("Where?"),))
    found, how = turns(chats / "policy", ["Where?"])
    assert found == [asked]
    assert how == "each prompt: a turn of a user, by the chat template; --raw leaves the text as it is"
    assert turns(chats / "policy", ["Where?"], "--raw") == (["Where?"], "each prompt: text as it is (raw)")
    written = "[user] Where?</s>[assistant] "
    found, how = turns(chats / "policy", [written, asked, "Where?"])
    assert found == [written, asked, asked]
    assert how.endswith("; 1 with special tokens as they are")
    plain = shared_model("stories260k")
    how = "each prompt: text as it is: the tokenizer has no chat template"
    assert turns(plain, ["Where?"]) == (["Where?"], how)
    assert turns(plain, ["Where?"], "--raw", "False")[0] == [asked]


def test_a_run_on_texts_is_asked_by_texts(chats, tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join([json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"})] * 4))
    for file, wanted in (("t.jsonl", "Where?"), ("absent.jsonl", Chat((user("Where?"),)))):
        run = tmp_path / file.partition(".")[0]
        run.mkdir()
        (run / "config.yaml").write_text("")
        path = ["--data.path", str(tmp_path / file), "--data.eval-path", str(tmp_path / file)]
        settings = parse_config(SampleConfig, None, path, prog="x")
        found, how = samples.prompts_as_turns(str(run), ["Where?"], load_tokenizer(chats / "policy"), settings)
        assert found == [wanted]
        assert ("as in the data of the run; --raw False" in how) == (wanted == "Where?")


def test_texts_and_conversations_have_one_rule_in_the_command_and_in_python(chats, capsys):
    options = {"max_new_tokens": 4, "temperature": 0}
    texts = dpo_jax.sample(chats / "policy", ["Where?", [user("Where?")]], **options)["policy"]
    assert texts[0] == texts[1]
    (raw,) = dpo_jax.sample(chats / "policy", ["Where?"], raw=True, **options)["policy"]
    assert raw != texts[0]
    capsys.readouterr()
    for flags, wanted in (([], texts[0]), (["--raw"], raw)):
        argv = ["--prompt", "Where?", "--max_new_tokens", "4", "--temperature", "0", *flags]
        cli.run_command(["sample", str(chats / "policy"), *argv])
        said = capsys.readouterr().out
        assert said.count("each prompt: ") == 1
        assert wanted.split()[0] in said
    with pytest.raises(UserError, match=r"the tokenizer has no chat template; set data\.chat_template"):
        cli.run_command(["sample", str(shared_model("stories260k")), "--prompt", "A", "--raw", "False"])
