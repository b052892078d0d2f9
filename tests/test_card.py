"""What others read of an exported folder: its card and license, older keys of config.json, and llama.cpp's names."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

import dpo_jax
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data.sources import synthetic
from dpo_jax.data.sources.names import data_names
from dpo_jax.errors import UserError
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.huggingface.card import CardSource, card_source, model_card
from dpo_jax.models.huggingface.folder import open_folder, save_folder
from dpo_jax.models.huggingface.older import with_older_keys
from dpo_jax.models.huggingface.tokenizer_files import save_tokenizer
from dpo_jax.training.export import citations, export_run, loss_section
from dpo_jax.training.load import load_policy, load_run_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
# A family, its rope_parameters, and the older keys that say the same.
OLDER = {
    "llama": ("llama", {"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "qwen3": ("qwen3", {"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e6}),
    "gpt_neox": (
        "gpt_neox",
        {"rope_theta": 5e3, "rope_type": "default", "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5e3, "rotary_pct": 0.5},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "full_attention": {"rope_theta": 5e5, **LINEAR},
            "sliding_attention": {"rope_theta": 5e3, "rope_type": "default"},
        },
        {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": LINEAR},
    ),
    "phi3": (
        "phi3",
        {"rope_theta": 5e3, "rope_type": "longrope", "partial_rotary_factor": 1.0, **LONG},
        {"rope_theta": 5e3, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "longrope", **LONG}},
    ),
    "gpt2": ("gpt2", None, {}),
}


@pytest.mark.parametrize("case", OLDER)
def test_config_has_the_keys_of_transformers_4_beside_those_of_5(case):
    """Ours reads each form alone, and both; transformers reads both as the newer one."""
    family, rope, older = OLDER[case]
    given = {} if rope is None else {"rope_parameters": rope}
    known = {k: v for k, v in tiny._ARGUMENTS[family].items() if k != "rotary_pct"}  # noqa: SLF001
    known |= {"original_max_position_embeddings": 128, "dtype": "bfloat16"}
    new = {"model_type": family, "vocab_size": 128, **known, **given}
    both = with_older_keys(new)
    assert both == {**new, **older, "torch_dtype": "bfloat16"}
    only_older = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert architecture_of(both) == architecture_of(new) == architecture_of(only_older)
    ours, theirs = (AutoConfig.for_model(**{k: v for k, v in c.items()}).to_dict() for c in (both, new))  # noqa: C416
    for config in (ours, theirs):
        (config.get("rope_parameters") or {}).pop("type", None)
    if rope is not None:
        assert ours["rope_parameters"] == theirs["rope_parameters"]


def test_older_keys_that_are_there_are_kept_and_null_is_not_there():
    rope = {"rope_theta": 5e5, **LLAMA3}
    config = {"model_type": "llama", "dtype": "float32", "rope_parameters": rope}
    assert with_older_keys(config | {"rope_theta": 7.0, "rope_scaling": None})["rope_theta"] == 7.0
    assert with_older_keys(config | {"rope_theta": 7.0, "rope_scaling": None})["rope_scaling"] == LLAMA3


FAMILIES = {  # ours -> llama.cpp's, for those that its converter knows
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "olmo2": "OLMO2",
    "gpt_neox": "GPTNEOX",
    "gpt2": "GPT2",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns family -> the folder of an export, made when it is first asked for."""
    made, parent = {}, tmp_path_factory.mktemp("families")

    def get(family):
        if family not in made:
            _, config, params = open_folder(tiny.folder_of(family, parent / "from" / family))
            save_folder(made.setdefault(family, parent / family), params, config)
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_maps_every_tensor(family, exported):
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[FAMILIES[family]], 3)
    with safe_open(exported(family) / "model.safetensors", "np") as file:
        found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in file.keys()}  # noqa: SIM118
    assert [name for name, mapped in found.items() if mapped is None] == []
    assert len(set(found.values())) == len(found)


def test_a_tokenizer_made_in_memory_names_a_class_that_transformers_4_has(tmp_path):
    save_tokenizer(tmp_path, synthetic.synthetic_tokenizer())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("I saw the film").input_ids == synthetic.synthetic_tokenizer()("I saw the film").input_ids


@pytest.fixture
def base(shared, tmp_path):
    """A model folder without card and license."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in (shared / "models/stories260k").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def saved(base, out, **options):
    model, params, tokenizer = dpo_jax.load_model(base)
    return dpo_jax.save_model(out, model, params, tokenizer, **options)


def test_save_model_writes_a_card_with_what_it_knows(base, tmp_path):
    (base / "README.md").write_text("---\nlicense: llama3.2\nlicense_link: LICENSE.txt\n---\nA base.\n")
    (base / "LICENSE.txt").write_text("terms")
    (base / "NOTICE").write_text("notice")
    out = saved(base, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.license_link) == ("llama3.2", "LICENSE.txt")
    assert card.data.model_name == "out"
    assert "made from `base`" in card.text
    assert ((out / "LICENSE.txt").read_text(), (out / "NOTICE").read_text()) == ("terms", "notice")
    again = ModelCard.load(saved(out, tmp_path / "again") / "README.md")  # carried on
    assert (again.data.license, again.data.license_link) == ("llama3.2", "LICENSE.txt")
    saved(base, out)  # replaces it, card and license included


def test_without_a_license_none_is_claimed(base, tmp_path):
    card = ModelCard.load(saved(base, tmp_path / "out") / "README.md")
    assert card.data.license is None
    assert "No license of `base` was found when this folder was written" in card.text


def test_a_license_file_alone_is_another_license(base, tmp_path):
    (base / "LICENSE").write_text("terms")
    card = ModelCard.load(saved(base, tmp_path / "out") / "README.md")
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE")


@pytest.mark.parametrize("text", ["---\n- a\n- b\n---\n", "---\na: [\n---\n", "---\nlicense: {a: 1}\n---\n", "\xff"])
def test_a_damaged_card_of_the_base_is_left_out(base, tmp_path, text, caplog):
    (base / "README.md").write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "dpo_jax"):
        card = ModelCard.load(saved(base, tmp_path / "out") / "README.md")
    assert card.data.license is None
    assert ("its front matter cannot be read" in caplog.text) == ("{a: 1}" not in text)


def test_the_base_of_an_export_is_that_of_its_card(base, tmp_path):
    out = saved(base, tmp_path / "out")
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text.replace("library_name", "base_model: owner/name\nlibrary_name"))
    assert card_source(str(out)).hub == "owner/name"
    (out / "dpo_jax.json").unlink()  # a folder of others: its base is not ours
    assert card_source(str(out)).hub == ""
    assert ModelCard.load(saved(base, out.with_name("next")) / "README.md").data.base_model is None


def test_texts_of_others_are_no_markup():
    source = card_source("")._replace(name="a`|<b>\n# c")
    text = model_card('x"\n# y: [z](u) <script>', source, {"model_type": "llama"}, datasets=["o/d"])
    card = ModelCard(text)
    assert card.data.model_name == 'x" # y: [z](u) <script>'
    assert card.data.datasets == ["o/d"]
    assert r"# x" in card.text
    assert r"\[z\](u) \<script\>" in card.text
    assert "made from `a'\\|<b> # c`." in card.text
    assert sum(line.startswith("# ") for line in card.text.splitlines()) == 1


def test_a_reward_model_is_a_classifier_that_is_not_served():
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "r"}}
    card = ModelCard(model_card("r", card_source(""), config))
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in card.text
    assert "vllm" not in card.text


def test_a_value_that_float16_cannot_hold_is_refused(base, tmp_path):
    model, params, tokenizer = dpo_jax.load_model(base)
    params["final_norm"] = jax_tree_scaled(params["final_norm"], 1e6)
    with pytest.raises(UserError, match=r"model\.norm\.weight: has values beyond float16's 65,504; choose bfloat16 or"):
        dpo_jax.save_model(tmp_path / "out", model, params, tokenizer, dtype="float16")
    assert not (tmp_path / "out").exists()
    dpo_jax.save_model(tmp_path / "out", model, params, tokenizer, dtype="bfloat16")


def jax_tree_scaled(tree, factor):
    import jax

    return jax.tree.map(lambda x: np.asarray(x) * factor, tree)


@pytest.mark.parametrize(
    ("name", "path", "hubs", "shown"),
    [
        ("files", ("/data/a.jsonl", "o/d:config@v1"), ["o/d"], ["a.jsonl", "o/d:config@v1"]),
        ("hh", (), ["Anthropic/hh-rlhf"], ["hh: Anthropic/hh-rlhf"]),
        ("tldr", (), ["openai/summarize_from_feedback"], ["tldr: openai/summarize_from_feedback:comparisons"]),
        ("capybara", (), ["argilla/distilabel-capybara-dpo-7k-binarized"],
         ["capybara: argilla/distilabel-capybara-dpo-7k-binarized"]),
        ("memory", ("0",), [], ["examples given in Python"]),
        ("synthetic", (), [], ["synthetic"]),
        ("mixture", ("0.5*hh", "files:b.jsonl"), ["Anthropic/hh-rlhf"], ["hh: Anthropic/hh-rlhf", "b.jsonl"]),
        ("mine:rows", (), [], ["mine:rows"]),
    ],
)  # fmt: skip
def test_names_of_data(name, path, hubs, shown):
    assert data_names(name, path) == (hubs, shown)


def test_equations_and_citations_come_from_the_docstrings():
    text = loss_section({"name": "ipo", "beta": 0.3})
    assert text.startswith("`ipo`: Identity preference optimization of means over tokens, as in TRL (Azar et al. 2023")
    assert ", [arXiv 2310.12036](https://arxiv.org/abs/2310.12036), eq. 17)" in text
    assert "```\nloss = (c / L_c - r / L_r - 1 / (2 beta))^2\n```" in text
    assert "Options: `beta 0.3`." in text
    cited = citations(["dpo", "ipo", "ipo_sum", "sft"])
    assert cited.count("@") == 2
    assert "author = {Azar and others},\n  year = {2023},\n  eprint = {2310.12036}" in cited
    assert "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" in cited


def test_files_of_the_card_are_listed_so_that_they_can_be_replaced(base, tmp_path):
    out = saved(base, tmp_path / "out")
    assert "README.md" in json.loads((out / "dpo_jax.json").read_text())["files"]
    assert Path(out / "README.md").read_text().startswith("---\n")


def test_adapters_have_a_card_a_license_and_the_config_as_the_model_has(base, tmp_path):
    (base / "LICENSE").write_text("terms")
    fixed = ["--model.path", str(base), "--lora.rank", "2", "--data.path", "o/d", "--run", str(tmp_path / "run")]
    config = parse_config(Config, None, fixed, prog="x")
    tokenizer = load_run_tokenizer(config.model)
    loaded = load_policy(config.model, tokenizer, 0, config.lora)
    model, adapter = tmp_path / "run/model", tmp_path / "run/adapter"
    export_run(loaded, tokenizer, "", config, loaded.adapters, model, 3)
    merged, card = (ModelCard.load(folder / "README.md") for folder in (model, adapter))
    assert (card.data.library_name, merged.data.library_name) == ("peft", "transformers")
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE")
    assert card.data.model_name == "run (adapters)"
    assert card.data.tags == ["dpo_jax", "lora", "dpo"]
    assert card.data.datasets == merged.data.datasets == ["o/d"]
    assert "those of step 3, in float32" in card.text
    assert 'PeftModel.from_pretrained(model, "path/to/this/folder")' in card.text
    assert "vllm" not in card.text
    for name in ("LICENSE", "training_config.yaml"):
        assert (adapter / name).read_text() == (model / name).read_text()


def test_the_base_of_adapters_is_the_model_that_they_were_trained_on():
    """An export made from a model of the hub has other weights than that model."""
    config = {"model_type": "llama"}
    hub, export = CardSource("o/n@v1", "o/n"), CardSource("sft", "o/n")
    bases = [ModelCard(model_card("a", one, config, adapters=True)) for one in (hub, export, CardSource())]
    assert [card.data.base_model for card in bases] == ["o/n", None, None]
    assert ModelCard(model_card("a", export, config)).data.base_model == "o/n"
    assert 'AutoModelForCausalLM.from_pretrained("o/n", dtype="auto")' in bases[0].text
    assert 'AutoTokenizer.from_pretrained("path/to/the/base")' in bases[1].text
