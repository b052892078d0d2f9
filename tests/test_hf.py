"""Hugging Face folders: transformers loads what we write, and every fault is an error of one line."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import EOS, FAMILIES, folders_of, load_torch, logits_of, shared_model, tokens_of, torch_model

from dpo_jax.config.schema import ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import load_folder, load_tokenizer, open_folder, read_config, save_folder
from dpo_jax.models.huggingface.safetensors import weights_hash
from dpo_jax.models.model import build_model
from dpo_jax.training.load import load_policy

CASES = {
    **{name: (name, {}) for name in FAMILIES},
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by case, made when first asked for; not to be written to."""
    return folders_of(CASES, tmp_path_factory.mktemp)


def copy(folder, to):
    """Returns a copy of a model folder, its tensors and its config, to be damaged."""
    shutil.copytree(folder, to)
    return to, load_file(to / "model.safetensors"), json.loads((to / "config.json").read_text())


def write(tensors, folder):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def torch_logits(folder, tokens):
    import torch

    with torch.no_grad():
        return load_torch(folder)(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype == np.float32
        assert np.array_equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_gives_the_same_file_and_the_same_logits(folders, case, tmp_path):
    source, out, tokens = folders(case), tmp_path / "out", tokens_of(2, 12)
    _, config, params = load_folder(source)
    save_folder(out, jax.tree.map(jax.numpy.asarray, params), config)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(torch_logits(out, tokens), torch_logits(source, tokens))  # ours: test_models.py
    assert_same(load_folder(out)[2], params)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == EOS
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert written["architectures"] == json.loads((source / "config.json").read_text())["architectures"]


def test_a_trained_model_and_its_tokenizer_survive_a_round_trip(tmp_path):
    from transformers import AutoTokenizer

    source, out = shared_model("tinystories-656k"), tmp_path / "out"
    architecture, config, params = load_folder(source)
    tokenizer = load_tokenizer(source)
    save_folder(out, params, config, tokenizer)
    tokens = np.asarray([tokenizer.encode("Once upon a time there was a")], np.int32)
    np.testing.assert_allclose(torch_logits(out, tokens), torch_logits(source, tokens), atol=1e-5)
    logits = jax.jit(lambda p: logits_of(build_model(architecture), p, tokens))(params)
    np.testing.assert_allclose(logits, torch_logits(source, tokens), atol=1e-4)
    assert AutoTokenizer.from_pretrained(out).encode("a little dog") == tokenizer.encode("a little dog")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_tokenizers_eos_comes_before_the_configs(tmp_path):
    _, config, params = load_folder(shared_model("tinystories-656k"))
    tokenizer = load_tokenizer(shared_model("tinystories-656k"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    save_folder(tmp_path / "out", params, config, tokenizer)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [7, 2]


def test_dtype_generation_tokenizer_and_template_survive_a_round_trip(shared, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source, out = tmp_path / "in", tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2.5")
    theirs = torch_model("qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).to(torch.bfloat16)
    theirs.generation_config = GenerationConfig(temperature=0.7, top_p=0.8, do_sample=True, eos_token_id=[5, 9])
    theirs.save_pretrained(source)
    tokenizer.save_pretrained(source)
    loaded = load_policy(ModelConfig(path=str(source)), tokenizer, 0)
    loaded.save(loaded.params, out, load_tokenizer(source))
    ours = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16, name
        assert torch.equal(a, b), name
    one, two = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, out))
    assert {k: v for k, v in one.items() if k != "_name_or_path"} == {k: two[k] for k in one if k != "_name_or_path"}
    written = json.loads((out / "generation_config.json").read_text())
    assert written["temperature"] == 0.7
    assert written["top_p"] == 0.8
    assert written["eos_token_id"] == [tokenizer.eos_token_id, 5, 9]
    again = AutoTokenizer.from_pretrained(out)
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()


def test_shards_and_their_index(folders, tmp_path):
    _, config, params = load_folder(folders("llama"))
    save_folder(tmp_path / "out", params, config, max_shard_bytes=20_000)
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert_same(load_folder(tmp_path / "out")[2], params)
    tokens = tokens_of(1, 8)
    np.testing.assert_array_equal(torch_logits(tmp_path / "out", tokens), torch_logits(folders("llama"), tokens))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    (tmp_path / "out" / names[1]).unlink()
    with pytest.raises(UserError, match=names[1] + ": is missing, model.safetensors.index.json names it"):
        load_folder(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats_in_and_out(folders, dtype, tmp_path):
    _, config, params = load_folder(folders("gpt2"))
    save_folder(tmp_path / "out", params, config, dtype=dtype)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(kind)}
    assert_same(load_folder(tmp_path / "out")[2], jax.tree.map(lambda x: x.astype(kind).astype(np.float32), params))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert open_folder(tmp_path / "out")[1]["dtype"] == dtype
    load_torch(tmp_path / "out")


def test_names_without_the_prefix_and_buffers_are_understood(folders, tmp_path):
    folder, tensors, _ = copy(folders("gpt2"), tmp_path / "m")
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
    bare["h.1.attn.masked_bias"] = np.float32(-1e4)
    bare["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    write(bare, folder)
    assert_same(load_folder(folder)[2], load_folder(folders("gpt2"))[2])


def test_a_tied_head_may_stand_for_the_embedding_but_not_differ_from_it(folders, tmp_path):
    folder, tensors, _ = copy(folders("llama-tied"), tmp_path / "m")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding + 1
    write(tensors, folder)
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding.*tie_word_embeddings to false"):
        load_folder(folder)
    del tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding
    write(tensors, folder)
    assert_same(load_folder(folder)[2], load_folder(folders("llama-tied"))[2])
    tensors["lm_head.weight"] = embedding[:-1]
    write(tensors, folder)
    with pytest.raises(UserError, match=r"lm_head.weight has shape \(127, 32\)"):
        load_folder(folder)


def drop(tensors, _):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def cut(tensors, _):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:, :-1]


def drop_several(tensors, _):
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        del tensors[name]


def drop_head(tensors, _):
    del tensors["lm_head.weight"]


def add(tensors, _):
    tensors["model.layers.0.mlp.experts.weight"] = np.zeros(3, np.float32)


def integers(tensors, _):
    name = "model.norm.weight"
    tensors[name] = tensors[name].astype(np.int8)


def quantized(_, config):
    config["quantization_config"] = {"bits": 4}


def unknown(_, config):
    config["model_type"] = "llama4x"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"tensor model.layers.1.mlp.up_proj.weight is missing; the file does not fit config.json"),
        (drop_several, r"tensors model.norm.weight, model.layers.0.mlp.up_proj.weight are missing"),
        (
            drop_head,
            r"tensor lm_head.weight is missing; if the embedding is its head too, set tie_word_embeddings to true",
        ),
        (cut, r"layers.1.mlp.up_proj.weight has shape \(48, 31\), but by config.json it should be \(48, 32\)"),
        (add, r"tensor model.layers.0.mlp.experts.weight is not part of a LlamaForCausalLM"),
        (integers, "tensor model.norm.weight is I8; only F32"),
        (quantized, "quantization_config is not supported"),
        (unknown, r"config.json: model_type 'llama4x' is not known; known: bloom, cohere2, "),
    ],
)
def test_a_mismatch_is_named_in_one_line(folders, tmp_path, damage, message):
    folder, tensors, config = copy(folders("llama"), tmp_path / "m")
    damage(tensors, config)
    write(tensors, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        load_folder(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_model_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="absent: there is no such model folder"):
        load_folder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config.json is missing"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: is not valid JSON"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json: model_type is missing"):
        load_folder(tmp_path)
    shutil.copy(folders("llama") / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"there are no weights; model.safetensors or"):
        load_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(
        UserError, match=r"only as a pickle, which is never read; convert it with transformers: .*safe_"
    ):
        load_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(UserError, match=r"model.safetensors: is damaged or no safetensors file"):
        load_folder(tmp_path)


def test_read_config_takes_the_file_or_its_folder(folders):
    folder = folders("gpt_neox")
    assert read_config(folder) == read_config(folder / "config.json")
    assert read_config(folder)["model_type"] == "gpt_neox"


def test_an_export_is_replaced_completely_and_other_folders_are_kept(folders, tmp_path):
    _, config, params = load_folder(folders("llama"))
    out = tmp_path / "out"
    save_folder(out, params, config, max_shard_bytes=20_000)
    save_folder(out, params, config)
    files = ["config.json", "dpo_jax.json", "generation_config.json", "model.safetensors"]
    assert sorted(f.name for f in out.iterdir()) == files
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    (out / "more").mkdir()
    for name in ("notes.txt", "thesis.model", "api_tokens.json", "more/vocab.json"):
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=rf"out: holds {name}, which no export wrote; choose another folder"):
            save_folder(out, params, config)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    save_folder(out, params, config)
    with pytest.raises(UserError, match=r"dtype 'int8' is not known; choose one of float32"):
        save_folder(tmp_path / "other", params, config, dtype="int8")


def test_a_model_that_no_export_wrote_is_never_replaced(folders, tmp_path):
    folder, config, params = tmp_path / "runs/a/model", *load_folder(folders("llama"))[1:]
    shutil.copytree(folders("llama"), folder)
    weights = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds config.json, which no export wrote; choose another folder"):
        save_folder(folder, params, config)
    assert (folder / "model.safetensors").read_bytes() == weights
    (tmp_path / "runs/a/config.yaml").write_text("seed: 0")  # the model of a run, written before there were lists
    save_folder(folder, params, config)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt, which no export wrote"):
        save_folder(folder, params, config)


def test_a_save_that_fails_leaves_the_old_export(folders, tmp_path):
    _, config, params = load_folder(folders("llama"))
    save_folder(tmp_path / "out", params, config)
    with pytest.raises(KeyError):
        save_folder(tmp_path / "out", {"embedding": params["embedding"]}, config)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert_same(load_folder(tmp_path / "out")[2], params)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "llama"])
def test_the_hash_of_a_model_depends_on_every_bit(folders, kind):
    architecture, _, params = load_folder(folders(kind))
    name = weights_hash(params, architecture)
    assert len(name) == 32
    on_device = jax.tree.map(jax.numpy.asarray, dict(reversed(params.items())))
    assert weights_hash(on_device, architecture) == name
    bits = params["layers"]["down"]["kernel"].view(np.uint32)
    bits[-1, -1, -1] ^= 1
    assert weights_hash(params, architecture) != name
    bits[-1, -1, -1] ^= 1
    assert weights_hash(params, architecture) == name
    other = type(architecture)(**{**vars(architecture), "eps": 1e-3})
    assert weights_hash(params, other) != name


def test_code_in_a_folder_is_not_run_and_a_warning_says_so(folders, tmp_path, caplog):
    folder, _, hf_config = copy(folders("llama"), tmp_path / "m")
    (folder / "modeling_own.py").write_text("raise SystemExit(9)")
    own = {**hf_config, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(own))
    load_folder(folder)
    assert "auto_map names code, which is never run; it is read as the LlamaForCausalLM" in caplog.text


def test_rows_beyond_the_tokenizer_are_kept():
    folder = shared_model("tinystories-656k")
    assert load_folder(folder)[2]["embedding"].shape[0] == 2048 >= len(load_tokenizer(folder))


@pytest.mark.parametrize("name", ["./no-such", "../no/such", "/no/such", "some/no/such"])
def test_a_tokenizer_folder_that_is_not_there(name):
    with pytest.raises(UserError, match=f"^{name}: there is no such folder to read a tokenizer from$"):
        load_tokenizer(name)


def test_a_tokenizer_that_cannot_be_used(folders, tmp_path):
    with pytest.raises(UserError, match="no tokenizer could be read from this folder: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no tokenizer could be read from the Hugging Face hub"):
        load_tokenizer("no-such-owner/no-such-model")
    source = shared_model("tinystories-656k")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    shutil.copy(source / "tokenizer.json", tmp_path)
    settings = {k: v for k, v in settings.items() if "eos" not in k} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"the tokenizer has no eos_token; set it in tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_file_is_read_as_it_is(shared, tmp_path):
    """The class of this folder's tokenizer would put a prefix before every text, which the model never saw."""
    file = shared / "models/tinystories-656k/tokenizer_noprefix.json"
    tokenizer = load_tokenizer(file)
    ids = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "On"
    assert tokenizer.eos_token == "<|end_story|>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("Once upon a time", add_special_tokens=False)["input_ids"] == ids
