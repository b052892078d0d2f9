"""Every family against transformers' torch model: logits and gradients; layouts, recomputation and dtypes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    COMPOSED,
    FAMILIES,
    GEMMA4_MIXTURE,
    MILESTONE,
    VOCAB,
    WINDOW,
    folders_of,
    largest_difference,
    load_torch,
    logits_of,
    shared_model,
    tokens_of,
    unpacked_rows,
)

from dpo_jax.errors import UserError
from dpo_jax.models.families.registry import describe_families, family
from dpo_jax.models.families.tensor_map import in_layer, is_layered, unpack_tensor
from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.model import build_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "dpo_jax/models/README.md"
TABLE = "| `model_type` | which |"  # start of the table in PAGE
HEADS = {"lm_head.weight"}  # a tied one is no parameter of its own

# Settings of each case beyond its family's defaults.
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0, "original_max_position_embeddings": 64}
MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 5.0, 8.0]}
BIASES = {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu", "rope_parameters": LINEAR}
SLIDING = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
NEAR = {"rope_type": "default", "rope_theta": 300.0}
CASES = {
    **{name: (name, {}) for name in FAMILIES},
    "llama 3, tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "qwen3, yarn with all its settings": ("qwen3", {"rope_parameters": MSCALE}),
    "gemma3_text without windows": ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
    "gemma3_text with windows only": ("gemma3_text", {"layer_types": ["sliding_attention"] * 3}),
    "llama with biases": ("llama", BIASES),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"}),
    "gpt_neox serial": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 1.0},
    ),
    "gptj tied, whole heads rotated": ("gptj", {"tie_word_embeddings": True, "rotary_dim": 16, "n_inner": 40}),
    "gpt_neo untied": ("gpt_neo", {"tie_word_embeddings": False, "intermediate_size": 40, "window_size": 3}),
    "opt without biases": ("opt", {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 16, "num_key_value_heads": 4}),
    "qwen2 with windows": ("qwen2", SLIDING),
    "qwen3 with windows and biases": (
        "qwen3",
        {"layer_types": ["sliding_attention", "full_attention"], **SLIDING, "attention_bias": True},
    ),
    "phi3, part of a head": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": None, "num_key_value_heads": 1}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 128}),
    "gemma with biases": ("gemma", {"attention_bias": True, "hidden_act": "gelu", "num_key_value_heads": 1}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text with scaling": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": NEAR},
            "final_logit_softcapping": 3.0,
            "layer_types": None,
            "sliding_window_pattern": 2,
            "attention_bias": True,
        },
    ),
    "exaone4 without windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "olmo3, yarn in full attention": (
        "olmo3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": NEAR}, "attention_bias": True},
    ),
    "smollm3 with windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 20, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "cohere2 with biases": (
        "cohere2",
        {"attention_bias": True, "tie_word_embeddings": False, "layer_types": ["full_attention"] * 2},
    ),
    "phi, whole heads rotated": ("phi", {"partial_rotary_factor": 1.0, "hidden_act": "gelu"}),
    "internlm3 with biases": ("internlm3", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss with all biases": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True, "attention_bias": False}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False, "sliding_window": None}),
    "falcon, one key and one norm": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None}),
    "falcon, serial, all heads, biases": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True}
        | {"num_kv_heads": None, "tie_word_embeddings": False},
    ),
    "falcon rw": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True}
        | {"num_kv_heads": None, "alibi": True},
    ),
    "falcon 2": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "glm4 without biases": ("glm4", {"attention_bias": False, "partial_rotary_factor": 1.0}),
    "mixtral with windows, one expert": ("mixtral", {"sliding_window": WINDOW, "num_experts_per_tok": 1}),
    "qwen3_moe with all experts": ("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": False}),
    "gpt_oss, clamped": ("gpt_oss", {"initializer_range": 0.3, "layer_types": ["full_attention"] * 2, "head_dim": 8}),
    "gpt_oss without biases in attention": ("gpt_oss", {"attention_bias": False, "tie_word_embeddings": True}),
    "glm4_moe without dense layers, groups and norms": (
        "glm4_moe",
        {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "use_qk_norm": False, "norm_topk_prob": False}
        | {"attention_bias": False, "num_hidden_layers": 2, "tie_word_embeddings": True},
    ),
    "deepseek_v3, queries of the residual, biases": (
        "deepseek_v3",
        {"q_lora_rank": None, "v_head_dim": 24, "attention_bias": True, "rope_parameters": NEAR, "rms_norm_eps": 1e-3},
    ),
    "gemma4_text, keys as values": (
        "gemma4_text",
        {"num_kv_shared_layers": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"hidden_size_per_layer_input": 0, "final_logit_softcapping": None},
    ),
    "gemma4_text, a mixture beside the MLP": ("gemma4_text", GEMMA4_MIXTURE | {"attention_bias": True}),
    "olmo2 tied, with biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
}


# Families whose attention is that of another one; packing and the cache are tested for them at milestones only.
ALIKE = ("gemma", "gemma3_text", "gpt_neox", "mistral", "mixtral", "olmo2", "olmoe", "phi3", "qwen2", "qwen3")
MARKS = dict.fromkeys(ALIKE, MILESTONE) | COMPOSED | {"deepseek_v3": (pytest.mark.slow,)}
ATTENTION = [pytest.param(name, marks=MARKS.get(name, ())) for name in FAMILIES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by case, made when first asked for."""
    return folders_of(CASES, tmp_path_factory.mktemp)


def torch_logits_and_gradients(folder, architecture, tokens, weights):
    """Returns transformers' logits and the gradient of their weighted sum, in our layout."""
    import torch

    model = load_torch(folder)
    logits = model(torch.tensor(tokens, dtype=torch.long)).logits
    (logits * torch.tensor(weights)).sum().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    # Buffers are saved and not trained: our gradient is 0.
    grads |= {name: np.zeros(model.get_buffer(name).shape) for name in model.state_dict().keys() - grads.keys() - HEADS}
    return logits.detach().numpy(), torch_gradients(architecture, grads)


def torch_gradients(architecture, grads):
    """Returns gradients by transformers' names of parameters in our layout."""
    if "lm_head.weight" in grads:  # transformers' name in memory, which is not always the one in the file
        grads[family(architecture.family).HEAD] = grads["lm_head.weight"]
    ours, module = {}, family(architecture.family)
    for pattern, tensor in getattr(module, "fused_tensors", module.tensors)(architecture).items():
        layers = tensor.layers_of(architecture) if is_layered(pattern) else (0,)
        parts = [unpack_tensor(tensor, grads[in_layer(pattern, i)]) for i in layers]
        for part, *layers in zip(tensor.parts, *parts, strict=True):
            ours["/".join(part.path)] = np.stack(layers) if is_layered(pattern) else layers[0]
    return ours


def by_name(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def differences_from_torch(folder, length):
    """Returns the largest difference from transformers: of the logits, and of each gradient relative to its maximum."""
    architecture, _, params = load_folder(folder)
    model = build_model(architecture)
    tokens = tokens_of(2, length, architecture.vocab)
    weights = np.random.default_rng(1).normal(size=(2, length, architecture.vocab)).astype(np.float32)
    weights /= length
    theirs, their_grads = torch_logits_and_gradients(folder, architecture, tokens, weights)

    def loss(p):
        logits = logits_of(model, p, tokens)
        return (logits * weights).sum(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    grads = by_name(grads)
    assert grads.keys() == their_grads.keys()
    # A floor, because some gradients are rounding noise: without rotary positions a bias of the keys changes nothing.
    least = 1e-2 * max(np.abs(theirs).max() for theirs in their_grads.values())
    relative = {name: np.abs(grads[name] - x).max() / max(np.abs(x).max(), least) for name, x in their_grads.items()}
    return largest_difference(logits, theirs), relative


def assert_equals_torch(folder, length):
    logits, gradients = differences_from_torch(folder, length)
    # torch's powers in float32, and so its rotary frequencies, differ in the last bit between processors. An angle is a
    # frequency times a position.
    largest = 1e-5 + length * 2**-23
    assert logits < largest
    assert max(gradients.values()) < largest, max(gradients, key=gradients.get)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(folders, case):
    assert_equals_torch(folders(case), 140 if case == "llama" else 70)  # two chunks; beyond llama 3's 64


def test_the_table_of_families_is_up_to_date():
    """`scripts/families` writes it, with differences within the limit of the test above."""
    rows = PAGE.read_text().partition(TABLE)[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(name, what) for name, what, *_ in cells] == [
        (f"`{name}`", line.partition(":")[0]) for name, _, line in describe_families()
    ]
    assert all(0 < float(number) < 1e-5 for _, _, *numbers in cells for number in numbers)


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260k"])
def test_real_models_equal_transformers(name):
    assert_equals_torch(shared_model(name), 40)


def comparison(seed):
    """A prompt and three responses."""
    lengths = (11, 7, 5, 9)
    ids = tokens_of(1, sum(lengths), seed=seed)[0]
    return np.split(ids, np.cumsum(lengths)[:-1])


def packed(comparisons):
    """Returns one row [1, T] of several comparisons with padding at its end, as the data is packed."""
    row = []
    for place, (prompt, *responses) in enumerate(comparisons):
        row += [(t, i, place + 1, 0) for i, t in enumerate(prompt)]
        for p, response in enumerate(responses):
            row += [(t, len(prompt) + i, place + 1, p + 1) for i, t in enumerate(response)]
    row += [(0, 0, 0, 0)] * 6
    return tuple(jnp.asarray(column)[None] for column in zip(*row, strict=True))


@pytest.mark.parametrize("kind", ATTENTION)
def test_packed_rows_with_shared_prompts_equal_separate_sequences(folders, kind):
    architecture, _, params = load_folder(folders(kind))
    model = build_model(architecture)
    comparisons = [comparison(0), comparison(1)]
    probe = jnp.asarray(np.random.default_rng(0).normal(size=architecture.width), jnp.float32)

    def of_packed(p):
        hidden = model.hidden(p, *packed(comparisons))[0, :, : architecture.width]
        parts, at = [], 0
        for prompt, *responses in comparisons:
            shared, at = hidden[at : at + len(prompt)], at + len(prompt)
            for response in responses:
                parts.append(jnp.concatenate([shared, hidden[at : at + len(response)]]))
                at += len(response)
        return jnp.concatenate(parts)

    sequences = [np.concatenate([prompt, r]) for prompt, *responses in comparisons for r in responses]
    padded = [np.stack([np.pad(column, (0, 24 - len(column))) for column in columns]) for columns in (
        sequences, [np.arange(len(x)) for x in sequences], [np.ones_like(x) for x in sequences],
    )]  # fmt: skip

    def of_separate(p):
        hidden = model.hidden(p, *map(jnp.asarray, padded), jnp.zeros((len(sequences), 24), jnp.int32))
        return jnp.concatenate([row[: len(x), : architecture.width] for row, x in zip(hidden, sequences, strict=True)])

    def both(function):
        def loss(p):
            hidden = function(p)
            return jnp.tanh(hidden @ probe).sum(), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (grads, hidden), (separate_grads, separate) = both(of_packed), both(of_separate)
    np.testing.assert_allclose(hidden, separate, atol=1e-5)
    assert largest_difference(grads, separate_grads) < 1e-5


# Tied and not, learned positions and rotary, grouped queries.
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.slow
def test_bfloat16_is_near_float32_with_float32_gradients(folders, kind):
    architecture, _, params = load_folder(folders(kind))
    tokens = tokens_of(2, 40)

    def run(compute):
        model = build_model(architecture, compute=compute, remat="dots")

        def loss(p):
            logits = logits_of(model, p, tokens)
            return jnp.tanh(logits).mean(), logits

        grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        return jax.eval_shape(model.hidden, params, *unpacked_rows(tokens)), logits, grads

    (_, logits, grads), (hidden, near, near_grads) = run("float32"), run("bfloat16")
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(near_grads)} == {jnp.dtype("float32")}
    assert jnp.abs(near - logits).max() < 0.05 * jnp.abs(logits).max()
    least = 1e-2 * max(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(grads))
    for name, theirs in by_name(grads).items():
        error = jnp.linalg.norm(by_name(near_grads)[name] - theirs) / max(jnp.linalg.norm(theirs), least)
        assert error < 0.1, name


@pytest.mark.parametrize("kind", [*ATTENTION, "gpt2 scaled by layer"])
def test_decoding_from_the_cache_equals_the_full_sequence(folders, kind):
    architecture, _, params = load_folder(folders(kind))
    model = build_model(architecture)
    tokens = tokens_of(2, 24)
    full_hidden = jax.jit(model.hidden)(params, *unpacked_rows(tokens))
    # The second row starts 4 places later: left padding.
    padded = jnp.asarray(np.stack([tokens[0, :16], np.pad(tokens[1, :12], (4, 0))]))
    mask = jnp.asarray([[1] * 16, [0] * 4 + [1] * 12])
    positions = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
    hidden, cache = jax.jit(model.prefill, static_argnums=(4, 5))(params, padded, positions, mask, 1, 8)
    np.testing.assert_allclose(hidden[0], full_hidden[0, :16], atol=1e-5)
    np.testing.assert_allclose(hidden[1, 4:], full_hidden[1, :12], atol=1e-5)
    decode, params = jax.jit(model.decode), jax.jit(model.unstack)(params)
    for index in range(16, 24):
        position = jnp.asarray([index, index - 4])
        token = jnp.asarray([tokens[0, index], tokens[1, index - 4]])
        hidden, cache = decode(params, token, position, cache, mask > 0, index - 16)
        np.testing.assert_allclose(hidden[0], full_hidden[0, index], atol=1e-5)
        np.testing.assert_allclose(hidden[1], full_hidden[1, index - 4], atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "gptj", "olmo2", "opt", "qwen3_moe"])
def test_new_parameters_are_initialized_as_in_hugging_face(folders, kind):
    architecture, _, loaded = load_folder(folders(kind))
    params = jax.jit(build_model(architecture).init)(jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, loaded)
    flat = by_name(params)
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("float32")}
    for name, leaf in flat.items():
        if name.endswith(("scale", "bias")):
            one = 0.0 if kind.startswith("gemma") else 1.0  # the scale minus 1
            assert (leaf == (one if name.endswith("scale") else 0.0)).all(), name
            continue
        residual = kind == "gpt2" and name.split("/")[1:2] in (["o"], ["down"])
        assert leaf.std() == pytest.approx(0.2 * (0.5 if residual else 1.0), rel=0.1), name
    assert not jnp.array_equal(*flat["layers/q/kernel"][:2])  # layers differ


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_axis_has_a_name(folders, kind):
    architecture, _, params = load_folder(folders(kind))
    axes = build_model(architecture).axes
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(np.ndim, params)
    assert axes["embedding"] == ("vocab", "embed")
    latent = architecture.latent is not None
    assert axes["layers"]["q"]["kernel"] == ("layers", "latent" if latent else "embed", "heads", "head_dim")
    assert axes["layers"]["k"]["kernel"][2] == ("heads" if latent else "kv_heads")
    if latent:
        assert axes["layers"]["kv_down"]["kernel"] == ("layers", "embed", "latent")
    assert axes["layers"]["o"]["kernel"] == ("layers", "heads", "head_dim", "embed")
    if architecture.mixture is None:
        assert axes["layers"]["down"]["kernel"] == ("layers", "mlp", "embed")
    else:
        assert axes["layers"]["expert_down"]["kernel"] == ("layers", "experts", "mlp", "embed")
        assert axes["layers"]["router"]["weight"] == ("layers", "routes", "embed")


OUTSIDE = [("llama", 0), ("gpt2", 0), ("gpt2", 1), ("phi3, longrope", 1), ("internlm3", 1)]


@pytest.mark.parametrize(("kind", "field"), OUTSIDE)
def test_an_id_or_position_beyond_the_table_gives_nan(folders, kind, field):
    architecture, _, params = load_folder(folders(kind))
    rows = list(unpacked_rows(tokens_of(1, 8)))
    rows[field] = rows[field].at[0, 5].set(256)
    hidden = jax.jit(build_model(architecture).hidden)(params, *rows)
    assert jnp.isnan(hidden[0, 5]).all()


LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(("key", "value"), [("compute", "float16"), ("remat", "some")])
def test_unknown_settings_are_refused_with_the_known_ones(key, value):
    with pytest.raises(UserError, match=rf"model\.{key}: '{value}' is not known; choose one of"):
        build_model(family("llama").architecture(LLAMA), **{key: value})
