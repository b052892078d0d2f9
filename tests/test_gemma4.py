"""Gemma 4: what only some layers have, how long its program is, and the files of its released models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_models import KNOWN
from safetensors.numpy import load_file, save_file
from tiny import _ARGUMENTS, VOCAB, folder_of

from dpo_jax.data.pack import Layout
from dpo_jax.errors import UserError
from dpo_jax.models import groups
from dpo_jax.models.architecture import HeadSizes, Rope
from dpo_jax.models.attention import packed_attention
from dpo_jax.models.families.registry import architecture_of, family
from dpo_jax.models.huggingface.folder import load_folder, save_folder
from dpo_jax.models.model import build_model
from dpo_jax.models.vocabulary import grow_vocabulary, size_settings
from dpo_jax.training.attention_check import kernel_mismatch
from dpo_jax.training.roofline import Passes, embedding_numbers, matmul_weights, mixed_numbers, score_dims, step_work

# With transformers' defaults for all other settings.
CONFIG = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 8}
CONFIG |= {"intermediate_size": 48, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB}
SCALED = {"rope_type": "ntk", "factor": 2.0}
TINY = {"vocab_size": VOCAB, "model_type": "gemma4_text", **_ARGUMENTS["gemma4_text"]}
EQUAL = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}


def shapes_of(a):
    return jax.eval_shape(build_model(a).init, jax.eval_shape(jax.random.key, 0))


@pytest.mark.parametrize("name", ["gemma-4-E2B", "gemma-4-26B-A4B"])
def test_the_work_of_a_step_counts_every_weight_of_a_matmul(name):
    a = architecture_of(KNOWN[f"{name}, its language model"][0])
    leaves = jax.tree_util.tree_leaves_with_path(shapes_of(a))
    weights = sum(math.prod(x.shape) for path, x in leaves if path[-1].key in ("kernel", "weight"))
    assert matmul_weights(a, a.mixture and a.mixture.experts) == weights


def test_the_numbers_of_attention_are_those_of_each_kind_of_layer():
    """By hand: of 6 layers three have heads of 16, and four have keys and values, two for 4 heads."""
    a = architecture_of(TINY)
    assert mixed_numbers(a) == 3 * 2 * 4 * (16 + 24) + 2 * 2 * 2 * (16 + 24)
    assert score_dims(a) == [32, 48] * 3


def test_the_traffic_of_a_step_has_the_matmuls_of_embeddings_of_layers():
    """In each of 6 layers a matmul of 32 numbers to 8, one of 8 to 32, and 8 numbers of a projection of all layers."""
    a = architecture_of(TINY)
    assert embedding_numbers(a) == 6 * ((32 + 8) + (8 + 32) + 8)
    assert embedding_numbers(dataclasses.replace(a, layer_embedding=None)) == 0
    sizes = {"state": 0, "gradients": 0, "itemsize": 2, "devices": 1, "split": 1}
    found = [
        step_work(dataclasses.replace(a, layer_embedding=p), Layout(1, 2, 64, 0, 2), Passes(True, "none", 0), **sizes)
        for p in (8, 16)
    ]
    weights = 2 * 2 * 3 * 6 * 32 * 8  # two passes read those of three matmuls
    assert found[1].traffic - found[0].traffic == weights + 2 * 2 * 128 * 6 * 3 * 8


def test_layers_that_read_others_keep_nothing_in_the_cache():
    model, row = build_model(architecture_of(TINY)), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    shapes = shapes_of(model.architecture)
    assert {"k", "v", "global_k", "global_v"} <= shapes["layers"].keys()
    assert shapes["layers"]["k"]["kernel"].shape == (2, 32, 2, 16)
    assert shapes["layers"]["global_q"]["kernel"].shape == (3, 32, 4, 24)
    _, cache = jax.eval_shape(lambda p, x: model.prefill(p, x, x, x, 3, 5), shapes, row)
    assert [[x.shape for x in layer] for layer in cache] == [
        *[[(2, 2, 8, dim)] * 2 + [(6, 2, 5, dim)] * 2 for dim in (16, 24, 16, 24)],
        [],
        [],
    ]


@pytest.mark.slow
def test_the_program_holds_one_group_of_layers_with_keys_and_one_of_readers(monkeypatch):
    """That of 36 layers is as long as that of 12; unrolled it is over twice as long."""

    def length(groups_of_two):
        layers = 2 * groups_of_two
        more = {"num_hidden_layers": layers, "layer_types": TINY["layer_types"][:2] * groups_of_two}
        a = architecture_of(TINY | more | {"num_kv_shared_layers": layers // 3 // 2 * 2})
        model, row = build_model(a, remat="dots"), jax.ShapeDtypeStruct((2, 256), jnp.int32)
        lowered = jax.jit(jax.grad(lambda p, *rows: model.hidden(p, *rows).sum())).lower(shapes_of(a), *[row] * 4)
        return lowered.as_text().count("\n")

    one = length(6)
    assert length(18) == one
    monkeypatch.setattr(groups, "period", len)
    assert length(6) > 2 * one


def test_released_files_have_keys_that_no_layer_uses(tmp_path, caplog):
    """They are left out, and the log says so; the others are read."""
    caplog.set_level("INFO", "dpo_jax")
    folder = folder_of("gemma4_text", tmp_path / "in")
    tensors, (_, config, params) = load_file(folder / "model.safetensors"), load_folder(folder)
    named = {f"model.layers.{i}.self_attn.{name}": i for i in (4, 5) for name in ("k_proj", "v_proj", "k_norm")}
    unread = {f"{name}.weight": np.ones((2, 2), np.float32) for name in named}
    assert not unread.keys() & tensors.keys()
    save_file({**tensors, **unread}, folder / "model.safetensors", {"format": "pt"})
    found = load_folder(folder)[2]
    assert "6 tensors that no layer uses are neither read nor exported" in caplog.text
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
    save_folder(tmp_path / "out", found, config)
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()


def test_added_tokens_have_an_embedding_in_every_layer():
    a = architecture_of(TINY)
    params = {"embedding": np.ones((VOCAB, 32)), "layer_embedding": np.arange(VOCAB)[:, None] * np.ones((VOCAB, 48))}
    grown, more = grow_vocabulary(a, params, VOCAB + 3)
    assert {name: x.shape for name, x in more.items()} == {"embedding": (192, 32), "layer_embedding": (192, 48)}
    assert (more["layer_embedding"][VOCAB:] == (VOCAB - 1) / 2).all()
    assert size_settings(grown) == {"vocab_size": 192, "vocab_size_per_layer_input": 192}
    assert architecture_of(TINY | size_settings(grown)) == grown
    assert size_settings(architecture_of(TINY | {"hidden_size_per_layer_input": 0})) == {"vocab_size": VOCAB}


def test_a_kernel_is_tried_with_all_heads_of_a_model():
    a = architecture_of(TINY | EQUAL)
    assert [(heads.kv_heads, heads.head_dim) for heads in a.all_heads] == [(2, 16), (1, 24)]
    assert not kernel_mismatch(packed_attention, a, "float32")

    def small_only(q, k, v, mask, scoring):
        return packed_attention(q, k, v, mask, scoring) * (1.0 if q.shape[-1] == 16 else 2.0)

    assert "differs from chunks" in kernel_mismatch(small_only, a, "float32")


def test_no_optimizer_moves_the_constant_of_a_layer():
    from dpo_jax.optim.optimizers import without_untrained

    updates = {"layers": {"layer_constant": {"constant": np.ones((2, 1))}, "q": {"kernel": np.ones(2)}}}
    found = without_untrained(updates)["layers"]
    assert not found["layer_constant"]["constant"].any()
    assert found["q"]["kernel"].all()


def test_names_of_one_tensor_in_layers_of_two_kinds_differ_in_the_table_only():
    table, kinds = family("gemma4_text").tensors(architecture_of(TINY)), ("", ":global")
    q = [table[f"model.layers.{{i{kind}}}.self_attn.q_proj.weight"] for kind in kinds]
    k = [table[f"model.layers.{{i{kind}}}.self_attn.k_proj.weight"] for kind in kinds]
    assert [t.layers for t in q + k] == [(0, 2, 4), (1, 3, 5), (0, 2), (1, 3)]
    assert [t.shape for t in q + k] == [(64, 32), (96, 32), (32, 32), (48, 32)]
    assert table["model.layers.{i:reader}.mlp.up_proj.weight"].shape == (96, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True}, "num_kv_shared_layers = 2 with enable_moe_block is not supported"),
        (
            {"enable_moe_block": True, "num_kv_shared_layers": 0},
            "top_k_experts is missing; give the mod",
        ),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all' is not supported"),
        ({"vocab_size_per_layer_input": 64}, "vocab_size_per_layer_input = 64 is not supported, only 1"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers = 3 of 8 layers: no layer of some type has"),
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers = 8 of 8 layers: no layer of some type has"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers = -1 of 8 layers: no layer of some type"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 8 layers"),
        ({"layer_types": ["mamba"] * 8}, "num_kv_shared_layers = 2 of 8 layers: no layer of some type"),
        ({"layer_types": ["mamba", *["full_attention"] * 7]}, "layer_types has 'mamba', which is not"),
        ({"per_layer_config": {"7": {"head_dim": 8}}}, "per_layer_config must have head_dim and num"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config must have head_dim and num"),
        ({"per_layer_config": {"5": {"n": 8}, "7": {"n": 8}}}, "per_layer_config must have head_dim"),
        (
            {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
            "num_key_value_heads = 3 does not divide the 4 query heads",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.001}}},
            "partial_rotary_factor = 0.001: 0 of 256 pairs would be rotated",
        ),
        ({"rope_parameters": {"full_attention": SCALED}}, "rope_type = 'ntk' is not"),
    ],
)
def test_unsupported_settings_are_refused_by_key(change, message):
    family("gemma4_text").architecture(CONFIG)
    with pytest.raises(UserError, match=r"^config\.json: .*" + message):
        family("gemma4_text").architecture({**CONFIG, **change})


@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling", "partial_rotary_factor", "mlp_bias"])
def test_keys_of_other_models_are_refused(key):
    architecture_of({**CONFIG, "model_type": "gemma4_text"})
    with pytest.raises(UserError, match=f"{key} = .* is no setting of a gemma4_text"):
        architecture_of({**CONFIG, "model_type": "gemma4_text", key: 0.5})


def test_the_keys_of_released_gemma_4_files_and_those_of_transformers_mean_the_same():
    """Heads of full attention by `global_head_dim`, or layer by layer; fewer keys only where they are values."""
    architecture, config = family("gemma4_text").architecture, CONFIG
    own = {"head_dim": 64, "num_key_value_heads": 2}
    given = {"global_head_dim": 64, "num_global_key_value_heads": 2}
    equal = architecture({**config, **given, "attention_k_eq_v": True})
    layers = {"per_layer_config": {"5": own, "7": own}, "attention_k_eq_v": True}
    assert architecture({**config, **layers}) == equal
    assert equal.global_heads == HeadSizes(2, 64, keys_as_values=True)
    assert architecture({**config, **given}).global_heads == HeadSizes(4, 64)
    assert architecture(config).global_heads == HeadSizes(4, 512)
    assert architecture({**config, **given, "per_layer_config": None}).global_heads == HeadSizes(4, 256)
    every = {str(i): {"head_dim": 256, "num_key_value_heads": 4} for i in range(8)}
    assert architecture({**layers, **config, "per_layer_config": every | layers["per_layer_config"]}) == equal
    assert equal.kinds == ("attention",) * 5 + ("global", "reader", "global_reader")
    assert equal.windows == (512,) * 5 + (0, 512, 0)
    assert (equal.rope, equal.window_rope) == (Rope(64, 1e6, turned=8), Rope(256, 1e4))
    assert architecture({**config, "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 3}).kinds[-2:] == (
        "global_reader",
        "global_reader",
    )


def test_the_last_layer_of_gemma_4_has_full_attention_whatever_the_file_says():
    config = {**CONFIG, "num_hidden_layers": 2, "num_kv_shared_layers": 0}
    found = family("gemma4_text").architecture({**config, "layer_types": ["sliding_attention"] * 2})
    assert found.kinds == ("attention", "global")
