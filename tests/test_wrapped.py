"""Folders of models that read images too: their language model is read, and written back among the other tensors."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import load_torch, logits_of, tokens_of

from dpo_jax.errors import UserError
from dpo_jax.models import lora
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import load_folder, read_config, save_folder
from dpo_jax.models.huggingface.whole import WHOLE, whole_model
from dpo_jax.models.model import build_model

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
KINDS = [*["sliding_attention"] * 2, "full_attention"]
GEMMA3 = {"text_config": {**TEXT, "sliding_window": 8, "layer_types": KINDS}, "mm_tokens_per_image": 4}
GEMMA3 |= {"boi_token_index": 125, "eoi_token_index": 126}
MINISTRAL = {"model_type": "ministral3", "tie_word_embeddings": False}
MODELS = {"Gemma3": GEMMA3, "Mistral3": {"text_config": TEXT | MINISTRAL, "tie_word_embeddings": False}}
QWEN35 = {"text_config": TEXT | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "full_attention_interval": 3}}
QWEN35["text_config"] |= {"linear_key_head_dim": 16, "linear_value_head_dim": 24}
QWEN35["vision_config"] = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "patch_size": 14}
QWEN35["vision_config"] |= {"out_hidden_size": 32, "num_position_embeddings": 16}
MODELS["Qwen3_5"] = QWEN35
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS |= {"shared_expert_intermediate_size": 20}
MODELS["Qwen3_5Moe"] = QWEN35 | {"text_config": QWEN35["text_config"] | EXPERTS}
GEMMA4 = {"global_head_dim": 24, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
MODELS["Gemma4"] = {"text_config": {**TEXT, **GEMMA4, "sliding_window": 8, "layer_types": KINDS}}
MODELS["Gemma4"]["vision_config"] = VISION | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
# Names in released files, which transformers writes too -> those in memory, with which some files are saved.
NAMES = {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"}
NAMES |= {"vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."}


def make_whole(folder, name, renamed=False):
    """Saves a random torch model that reads images too, and returns it."""
    import torch
    import transformers

    settings = {"vision_config": VISION, **MODELS[name], "image_token_index": 127, "eos_token_id": [1, 106]}
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = "eager"  # noqa: SLF001 (the only way before the model is made)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "P"}')
    tensors = load_file(folder / "model.safetensors")
    for old, new in NAMES.items() if renamed else ():
        tensors = {k.replace(old, new, 1) if k.startswith(old) else k: v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens).long()).logits.numpy()


def load_whole(folder):
    import torch
    from transformers import AutoModelForImageTextToText

    found = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found[0].eval()


@pytest.mark.parametrize("renamed", [False, True], ids=["as released", "as in memory"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_images_is_written_back_whole(tmp_path, caplog, name, renamed):
    caplog.set_level("INFO", "dpo_jax")
    theirs, tokens = make_whole(tmp_path / "in", name, renamed), tokens_of(2, 20, vocab=120)
    architecture, hf_config, params = load_folder(tmp_path / "in")
    kind, whole = hf_config["model_type"], json.loads((tmp_path / "in/config.json").read_text())["model_type"]
    assert f"a {whole}, which reads images; its language model, a {kind}, is used" in caplog.text
    logits = jax.jit(lambda p: logits_of(build_model(architecture), p, tokens))
    np.testing.assert_allclose(logits(params), torch_logits(theirs, tokens), atol=1e-4)
    trained = {**params, "final_norm": {"scale": params["final_norm"]["scale"] + 0.5}}
    save_folder(tmp_path / "out", trained, hf_config, max_shard_bytes=20_000)
    np.testing.assert_allclose(torch_logits(load_whole(tmp_path / "out"), tokens), logits(trained), atol=1e-4)
    before, files = load_file(tmp_path / "in/model.safetensors"), sorted((tmp_path / "out").glob("*.safetensors"))
    after = {key: x for file in files for key, x in load_file(file).items()}
    assert len(files) > 1
    assert before.keys() == after.keys()
    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    assert [key.rpartition("model.")[2] for key in changed] == ["norm.weight"]
    assert (tmp_path / "out/processor_config.json").read_text() == '{"processor_class": "P"}'
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out"))
    assert {key for key in old if old[key] != new.get(key)} == {"text_config", "transformers_version"}
    assert all(new["text_config"][key] == value for key, value in old["text_config"].items())
    # Of the exported folder the same model is read; without the mark of its whole it is written alone.
    _, again, same = load_folder(tmp_path / "out")
    np.testing.assert_array_equal(logits(same), logits(trained))
    save_folder(tmp_path / "alone", same, {key: value for key, value in again.items() if key != WHOLE})
    np.testing.assert_allclose(torch_logits(load_torch(tmp_path / "alone"), tokens), logits(trained), atol=1e-4)
    written = json.loads((tmp_path / "alone/config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == (kind, [1, 106])


def test_fused_experts_of_a_model_with_images_are_read_and_written_one_by_one(tmp_path):
    """The released form: a tensor for all experts of a layer, with the prefix of the language model."""
    theirs, tokens = make_whole(tmp_path / "in", "Qwen3_5Moe"), tokens_of(2, 20, vocab=120)
    tensors = load_file(tmp_path / "in/model.safetensors")
    apart = {key for key in tensors if ".mlp.experts." in key}
    fused = {key: x.detach().numpy() for key, x in theirs.state_dict().items() if ".mlp.experts." in key}
    assert (len(apart), len(fused)) == (3 * 3 * 4, 3 * 2)
    others = {key: x for key, x in tensors.items() if key not in apart}
    save_file({**others, **fused}, tmp_path / "in/model.safetensors", {"format": "pt"})
    architecture, hf_config, params = load_folder(tmp_path / "in")
    logits = jax.jit(lambda p: logits_of(build_model(architecture), p, tokens))(params)
    np.testing.assert_allclose(logits, torch_logits(theirs, tokens), atol=1e-4)
    save_folder(tmp_path / "out", params, hf_config)
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(np.array_equal(after[key], tensors[key]) for key in tensors)
    np.testing.assert_allclose(torch_logits(load_whole(tmp_path / "out"), tokens), logits, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_a_language_model_within_a_model_are_peft_s(tmp_path):
    from peft import PeftModel

    model, tokens = make_whole(tmp_path / "in", "Gemma3"), tokens_of(2, 20, vocab=120)
    architecture, _, params = load_folder(tmp_path / "in")
    kind = lora.Lora(2, 4.0, ("all-linear",))
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init_adapters(architecture, kind, 0))
    peft_folder.save_adapters(tmp_path / "adapter", adapters, kind, architecture, str(tmp_path / "in"), within=True)
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not [name for name, _ in peft.named_parameters() if "lora_" in name and "language_model" not in name]
    ours = logits_of(build_model(architecture), lora.attach_adapters(architecture, params, adapters, kind), tokens)
    np.testing.assert_allclose(torch_logits(peft, tokens), ours, atol=1e-4)
    read, _ = peft_folder.load_adapters(tmp_path / "adapter", architecture)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma3"}, "text_config is missing; a gemma3 has its language model there"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "llama"}},
            "text_config of a gemma3 has model_type 'llama'",
        ),
    ],
)
def test_a_model_with_images_and_without_a_language_model_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_a_whole_model_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone: is gone, and has the tensors for images; put it back, or export"):
        whole_model({WHOLE: str(tmp_path / "gone")}, "model.")
