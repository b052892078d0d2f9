"""The tokenizer of an exported folder: the source's files byte for byte, or what was changed; the chat template."""

import json
import shutil

import pytest
from tiny import shared_model
from transformers import AutoTokenizer

import dpo_jax
from dpo_jax import cli
from dpo_jax.data.sources import synthetic
from dpo_jax.models.huggingface.folder import load_tokenizer
from dpo_jax.models.huggingface.tokenizer_files import CONFIG, FILES, TEMPLATE, TEMPLATES, save_tokenizer

MINE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
MINE += "{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(params=["qwen2.5", "stories"])
def source(request, shared, tmp_path):
    """A folder with a tokenizer's files as they are on the hub, without weights."""
    folder = tmp_path / "source"
    if request.param == "stories":
        shutil.copytree(shared_model("stories260k"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        shutil.copytree(shared / "tokenizers/qwen2.5", folder)
    folder.chmod(0o755)
    return folder


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name in FILES}


def test_a_tokenizer_is_copied_byte_for_byte(source, tmp_path):
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(source)
    tokenizer(["a long text", "a"], padding=tokenizer.pad_token is not None, truncation=True, max_length=2)
    save_tokenizer(tmp_path / "out", tokenizer)
    assert files_of(tmp_path / "out") == files_of(source)
    assert CONFIG in files_of(source)


def test_templates_beside_the_main_one_are_copied(source, tmp_path):
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "tool_use.jinja").write_text(MINE)
    (source / TEMPLATE).write_text(MINE)
    (tmp_path / "out").mkdir()
    save_tokenizer(tmp_path / "out", load_tokenizer(source))
    assert (tmp_path / "out" / TEMPLATES / "tool_use.jinja").read_text() == MINE


def test_another_template_replaces_all(source, tmp_path):
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "tool_use.jinja").write_text("other")
    (source / TEMPLATE).write_text("other too")
    (tmp_path / "out").mkdir()
    save_tokenizer(tmp_path / "out", load_tokenizer(source), MINE)
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (source, tmp_path / "out"))
    assert after == {**before, "chat_template": MINE}
    assert not (tmp_path / "out" / TEMPLATES).exists()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == MINE
    assert again.get_vocab() == load_tokenizer(source).get_vocab()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_tokens(["<new>"]),
        lambda t: setattr(t, "eos_token", t.convert_ids_to_tokens(7)),
        lambda t: setattr(t, "chat_template", MINE),
    ],
    ids=["token", "eos", "template"],
)
def test_a_changed_tokenizer_is_written_as_it_is_now(source, tmp_path, change):
    tokenizer = load_tokenizer(source)
    change(tokenizer)
    (tmp_path / "out").mkdir()
    save_tokenizer(tmp_path / "out", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token, again.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)


def test_a_tokenizer_made_in_memory_is_written(tmp_path):
    save_tokenizer(tmp_path, synthetic.synthetic_tokenizer())
    assert load_tokenizer(tmp_path).get_vocab() == synthetic.synthetic_tokenizer().get_vocab()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's use of transformers
def test_a_run_exports_its_template_and_a_base_that_peft_loads(tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text(MINE)
    user = {"role": "user", "content": "Once upon a time"}
    sides = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "A cat."), ("rejected", "No"))
    }
    (tmp_path / "d.jsonl").write_text("\n".join([json.dumps({"prompt": [user], **sides})] * 4))
    data = {"path": ["d.jsonl"], "eval_path": ["d.jsonl"], "chat_template": "mine.jinja", "max_length": 96}
    data["max_prompt_length"] = 64
    options = {"data": data, "batch_size": 4, "max_steps": 1, "samples": {"prompts": 0}}
    dpo_jax.train(model=shared_model("stories260k"), run="first", **options)
    dpo_jax.train(model="first", lora={"rank": 2}, run="second", **options)
    cli.run_command(["export", "second", "out"])
    for folder in ("first/model", "second/model", "out"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == MINE
        generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert generation["dpo_jax_version"] == dpo_jax.__version__
    settings = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "first/model")
    AutoPeftModelForCausalLM.from_pretrained("second/adapter")
