"""config.json of each family: defaults, older and newer spellings, refused settings."""

from copy import deepcopy

import jax
import pytest
from known_models import KNOWN, OPT_350M, WHOLE
from tiny import FAMILIES, VOCAB

from dpo_jax import cli
from dpo_jax.errors import UserError
from dpo_jax.models.families.registry import architecture_of, families, family
from dpo_jax.models.families.wrappers import language_model_config
from dpo_jax.models.model import build_model
from dpo_jax.training.abstract import count_parameters


def test_an_unknown_family_is_answered_with_the_closest():
    assert families() == FAMILIES
    with pytest.raises(
        UserError, match=r"'Llama' is not known; did you mean 'llama'\? known: bloom, cohere2, deepseek_v3"
    ):
        family("Llama")
    with pytest.raises(UserError, match=r"'hf_olmo' is not known; known: bloom, cohere2"):
        family("hf_olmo")
    for other in ("gemma3", "mistral3", "qwen3_vl", "mamba"):
        with pytest.raises(UserError, match=f"model_type '{other}' is a family that is not supported; known: bloom"):
            family(other)
    with pytest.raises(UserError, match=r"'zebra' is not known; known: .*; for one of your own set model.family"):
        family("zebra")


LLAMA = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA |= {"intermediate_size": 48}
GROUPED = {**LLAMA, "num_key_value_heads": 2}  # the default does not divide the 4 heads
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_layer": 2}
GPTJ = {**GPT2, "rotary_dim": 4}
NEO = {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 4, "num_layers": 24}
OPT = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 48}
NEOX = LLAMA
FOUR = {**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 4}
CONFIGS = {
    **{"gemma": GROUPED, "gemma2": LLAMA, "gemma3_text": {**LLAMA, "num_hidden_layers": 8}, "gpt2": GPT2},
    **{"gpt_neo": NEO, "gpt_neox": NEOX, "gptj": GPTJ, "llama": LLAMA, "mistral": GROUPED, "olmo2": LLAMA, "opt": OPT},
    **{"phi3": LLAMA, "qwen2": {**GROUPED, "num_hidden_layers": 30}, "qwen3": GROUPED, "granite": GROUPED},
    **{"exaone4": FOUR | {"num_hidden_layers": 8}, "glm4": LLAMA, "ministral3": GROUPED, "olmo3": FOUR},
    **{"smollm3": FOUR, "cohere2": FOUR | {"num_hidden_layers": 6}, "phi": LLAMA, "seed_oss": GROUPED},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {k: v for k, v in LLAMA.items() if k != "intermediate_size"},
    **{"stablelm": FOUR, "starcoder2": LLAMA, "internlm3": LLAMA},
    **{"mixtral": GROUPED, "olmoe": LLAMA, "qwen3_moe": GROUPED, "gpt_oss": GROUPED, "granitemoe": LLAMA},
    **{"qwen3_5_moe_text": FOUR, "qwen3_5_text": FOUR, "qwen3_next": FOUR, "glm4_moe": FOUR},
    "deepseek_v3": FOUR,
    "gemma4_text": {**LLAMA, "num_hidden_layers": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB},
}
SCALED = {"rope_type": "ntk", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
OLMO3 = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' is not supported; known are silu"),
        (
            "llama",
            {"rope_scaling": SCALED},
            "rope_type = 'ntk' is not supported; known are default, linear, dynamic, llama3, yarn",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type = 'longrope' is not supported"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling has rope_type = 'linear', rope_parameters 'default'; keep one",
        ),
        (
            "llama",
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 7.0}},
            "rope_scaling has factor = 2.0, rope_parameters None; keep one",
        ),
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"type": "default"}}, "rope_type = 'linear', rope_par"),
        ("llama", {"rope_parameters": {"full_attention": LINEAR}}, "rope_parameters must be an object of plain values"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling must be an object of plain values, got 'linear'"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": -1}}, "yarn: rope_theta must be above 1, beta_fast,"),
        ("gemma3_text", {"rope_parameters": LINEAR}, "rope_parameters must have full_attention and sliding_attention"),
        (
            "gemma3_text",
            {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": {**LINEAR, "factor": 3.0}}},
            "rope_scaling has factor = 2.0, rope_parameters 3.0; keep one",
        ),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0: it must be at least 1"),
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0, but rotary_pct"),
        ("gpt_neox", {"rope_theta": 77}, "rope_theta = 77, but rotary_emb_base is 10000.0; remove rope_theta, or make"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide the 4"),
        ("llama", {"hidden_size": 30}, "30 is not a multiple of the 4 heads"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False is not supported, only True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt_neox", {"rotary_pct": 0.1}, "0 rotary dimensions"),
        ("gpt_neox", {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ("gpt_neo", {"num_layers": 2}, "attention_types names 24 layers, num_layers is 2"),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 12]]}, "layer_types has 'sparse', which is not"),
        ("gptj", {"rotary_dim": None}, "rotary_dim is missing"),
        ("gptj", {"rotary_dim": 10}, "rotary_dim = 10 is more than a head's 8 dimensions"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False is not supported"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 is not supported, only 32 is"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not supported, only False"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types = .* is not supported"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: it must be at least 1"),
        ("qwen2", {"attention_bias": False}, "attention_bias = False is not supported, only True"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "rope_type = 'mrope' is not supported"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 30, "sliding_window": 5},
            "layer_types has sliding_attention, but use_sliding_window is false; set it to true, or",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 30 layers"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen3", {"layer_types": ["linear_attention"] * 2}, "layer_types has 'linear_attention', which is not"),
        ("phi3", {"rope_scaling": SCALED}, "rope_type = 'ntk' is not supported"),
        ("phi3", {"rope_scaling": {**YARN, "type": "yarn"}}, "rope_type = 'yarn' is not supported in phi3"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor is missing"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 3}},
            "short_factor has 3 numbers; the 8 rotary",
        ),
        ("phi3", {"attention_bias": True}, "attention_bias = True"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"hidden_activation": "xielu"}, "hidden_activation = 'xielu' is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("gemma3_text", {"rope_parameters": {"full_attention": SCALED}}, "rope_type = 'ntk' is not"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": SCALED}}, "rope_type = 'ntk' is not"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias = True"),
        ("olmo3", {"rope_parameters": LINEAR}, "rope_parameters must have full_attention and sliding_attention"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern = 'LLLG' is no number above 0; give"),
        ("exaone4", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("glm4", {"mlp_bias": True}, "mlp_bias = True"),
        ("glm4_moe", {"mlp_bias": True}, "mlp_bias = True is not supported, only False is"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "first_k_dense_replace = 4 of 4 layers; leave one with experts"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts = 0 is not supported, only 1 or more is"),
        ("glm4_moe", {"n_group": 3}, "n_group = 3 of 128 experts; set a divisor, of two or more"),
        ("glm4_moe", {"n_group": 128}, "n_group = 128 of 128 experts; set a divisor, of two or more"),
        ("glm4_moe", {"n_group": 32}, "topk_group = 1 of 32 groups, of which 8 experts are chosen; correct one"),
        ("glm4_moe", {"topk_group": 2}, "topk_group = 2 of 1 groups, of which 8 experts are chosen; correct one"),
        ("glm4_moe", {"num_experts_per_tok": 129}, "num_experts_per_tok = 129 of 128 experts; correct one"),
        (
            "glm4_moe",
            {"n_routed_experts": 8, "num_local_experts": 16},
            "n_routed_experts = 8, but num_local_experts = 16; keep one of them",
        ),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False is not supported, only True is"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported, only 4 is"),
        ("deepseek_v3", {"head_dim": 128}, "head_dim = 128 is not supported, only 64 is"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported, only 'sigmoid' is"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported, only 'sigmoid' is"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported, only 'noaux_tc' is"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported, only 1 is"),
        ("falcon", {"alibi": True}, "alibi = True with 1 key-value heads for 4 heads is not supported"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact = True is not supported, only False"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm = True is not supported, only"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2, parallel_attn = True, new_decoder_"),
        ("internlm3", {"qkv_bias": True}, "qkv_bias and bias differ, which is not supported"),
        ("phi3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' is not supported in"),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm = True is not supported"),
        ("cohere2", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0: it must be at least 1"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("starcoder2", {"mlp_bias": False}, "mlp_bias = False is not supported, only True"),
        ("granitemoe", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 of 8 experts; correct one"),
        ("granitemoe", {"mlp_bias": True}, "mlp_bias = True is not supported, only False is"),
        ("granite", {"rope_scaling": SCALED}, "rope_type = 'ntk' is not supported"),
        ("ministral3", {"attention_bias": True}, "attention_bias = True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0: it must be at least 1"),
        (
            "smollm3",
            {"layer_types": ["sliding_attention"] * 4, "sliding_window": 5},
            "layer_types has sliding_attention, but use_sliding_window is false; set it to true, or",
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported, only 0.0 is"),
        ("mixtral", {"num_experts": 4, "num_local_experts": 8}, "num_experts = 4, but num_local_experts = 8; keep one"),
        ("olmoe", {"num_experts_per_tok": 65}, "num_experts_per_tok = 65 of 64 experts; correct one"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported, only 1 is"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit = 6.0 is not supported, only 7.0 is"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0 is not supported, only 1.702 is"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu' is"),
        ("gpt_oss", {"num_experts_per_tok": 129}, "num_experts_per_tok = 129 of 128 experts; correct one"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = .* is not supported"),
        ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers = .* is not supported"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias = True is not supported, only False is"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu' is"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval = 0: it must be at least 1"),
        ("qwen3_next", {"full_attention_interval": 5}, "layer_types has no full_attention, which is not supported; m"),
        ("qwen3_next", {"layer_types": ["mamba"] * 4}, "layer_types has 'mamba', which is not supported; known: full_"),
        ("qwen3_next", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ("qwen3_5_text", {"linear_num_key_heads": 3}, "linear_num_key_heads = 3 does not divide linear_num_value_hea"),
        ("qwen3_5_text", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim = 1: it must be at least 2"),
    ],
)
def test_unsupported_settings_are_refused_by_key(kind, change, message):
    module, base = family(kind), CONFIGS[kind]
    module.architecture(base)
    with pytest.raises(UserError, match=r"^config\.json: .*" + message):
        module.architecture({**base, **change})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("olmo2", {"layer_types": OLMO3, "sliding_window": 4096}),
        ("llama", {"sliding_window": 5, "max_position_embeddings": 256}),
        ("llama", {"embedding_multiplier": 12.0}),
        ("llama", {"no_rope_layers": [1, 0]}),
        ("llama", {"num_local_experts": 8}),
        ("llama", {"qkv_bias": True}),
        ("mistral", {"use_qk_norm": True}),
        ("gemma", {"final_logit_softcapping": 30.0}),
        ("gpt2", {"rope_theta": 10000.0}),
        ("opt", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_settings_of_other_families_are_refused(kind, change):
    key, value = next(iter(change.items()))
    with pytest.raises(UserError) as refused:
        architecture_of({"model_type": kind, **CONFIGS[kind], **change})
    assert str(refused.value).startswith(f"config.json: {key} = {value!r} is no setting of a {kind}, and changes")


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1]},
        {"sliding_window": 2048, "max_position_embeddings": 2048},
        {"sliding_window": 5, "use_sliding_window": False},
        {"residual_multiplier": 1.0, "num_experts": 0, "use_qk_norm": False, "clip_qkv": None},
    ],
)
def test_settings_of_other_families_that_change_nothing_are_read_over(change):
    plain = {"model_type": "llama", **CONFIGS["llama"], "max_position_embeddings": 2048}
    assert architecture_of({**plain, **change}) == architecture_of(plain)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_transformers_writes_is_never_foreign(kind):
    from transformers import AutoConfig

    full = AutoConfig.for_model(kind, **CONFIGS[kind]).to_dict()
    assert architecture_of(full) == family(kind).architecture(CONFIGS[kind])


def test_yarn_has_the_positions_that_it_stretches_to():
    for positions in (64, 128, 1024):
        config = {**LLAMA, "rope_scaling": YARN, "max_position_embeddings": positions}
        assert family("llama").architecture(config).max_positions == max(256, positions)
    without = {key: value for key, value in YARN.items() if key[0] != "o"}
    found = family("llama").architecture({**LLAMA, "rope_scaling": without, "max_position_embeddings": 64})
    assert found.rope == family("llama").architecture({**LLAMA, "rope_scaling": YARN}).rope


@pytest.mark.parametrize("kind", FAMILIES)
def test_missing_settings_have_transformers_defaults(kind):
    from transformers import AutoConfig

    config = CONFIGS[kind]
    full = AutoConfig.for_model(kind, **config).to_dict()
    assert family(kind).architecture(config) == family(kind).architecture(full)
    # transformers writes null for a setting without a value; a setting with a default here must read null as missing.
    nulls = {key: None for key, value in full.items() if value is None}
    assert family(kind).architecture({**config, **nulls}) == family(kind).architecture(config)


NOTHING = {"_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder"}
NOTHING |= {"label2id", "model_type", "output_attentions", "output_hidden_states", "problem_type", "return_dict"}
NOTHING |= {"transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
# These repeat another key, or concern other heads, other precisions and pretraining.
NOTHING |= {"attention_layers", "initializer_range", "is_decoder", "pretraining_tp"}
NOTHING |= {"_sliding_window_pattern", "original_max_position_embeddings", "reorder_and_upcast_attn"}
NOTHING |= {"num_kv_heads"}  # of a Falcon with multi_query, which has one
NOTHING |= {"use_sliding_window", "sliding_window", "sliding_window_pattern", "max_window_layers"}  # see layer_types
NOTHING |= {"output_router_logits", "router_aux_loss_coef"}  # of training: `model.router_loss`
NOTHING |= {"num_nextn_predict_layers"}  # heads for further tokens, which are not read
# That of dense layers, of which they have none.
UNUSED = {key: {"intermediate_size"} for key in ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text")}
UNUSED["bloom"] = {"slow_but_exact"}  # unless pretraining_tp is above 1
UNUSED["gemma4_text"] = {"num_experts", "top_k_experts", "moe_intermediate_size"}  # of mixtures


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_setting_of_transformers_is_ignored(kind):
    """Each one changes the architecture, is refused, or is in `NOTHING`."""
    from transformers import AutoConfig

    full, module = AutoConfig.for_model(kind, **CONFIGS[kind]).to_dict(), family(kind)
    architecture = module.architecture(full)

    def seen(key, value):
        try:
            return module.architecture({**full, key: value}) != architecture
        except (UserError, TypeError, ValueError, AttributeError):
            return True

    others = ("other", 12345, 0.125, True, False, [7], {"rope_type": "other"})
    ignored = {key for key, value in full.items() if not any(seen(key, other) for other in others if other != value)}
    assert {k for k in ignored if "drop" not in k and not k.startswith("summary")} <= NOTHING | UNUSED.get(kind, set())


@pytest.mark.parametrize("name", KNOWN)
def test_well_known_models_are_read_as_transformers_reads_them(name):
    from transformers import AutoConfig

    config, count = deepcopy(KNOWN[name])  # transformers modifies it
    architecture = architecture_of(config)
    assert architecture == architecture_of(AutoConfig.for_model(**config).to_dict())
    shapes = jax.eval_shape(build_model(architecture).init, jax.eval_shape(jax.random.key, 0))
    assert count_parameters(shapes) == count


@pytest.mark.parametrize("name", WHOLE)
def test_well_known_models_that_read_images_have_the_language_model_of_transformers(name):
    from transformers import AutoConfig

    config, count = deepcopy(WHOLE[name])
    architecture = architecture_of(language_model_config(config))
    assert architecture == architecture_of(language_model_config(AutoConfig.for_model(**config).to_dict()))
    shapes = jax.eval_shape(build_model(architecture).init, jax.eval_shape(jax.random.key, 0))
    assert count_parameters(shapes) == count


def test_opt_350m_is_refused_by_its_key():
    with pytest.raises(UserError, match="do_layer_norm_before = False is not supported, only True"):
        architecture_of(OPT_350M)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_of_the_upper_layers_are_transformers(kind):
    from transformers import AutoConfig

    config = {**CONFIGS[kind], "num_hidden_layers": 5, "use_sliding_window": True, "max_window_layers": 2}
    architecture = family(kind).architecture({**config, "sliding_window": 7})
    full = AutoConfig.for_model(kind, **config, sliding_window=7).to_dict()
    assert architecture == family(kind).architecture(full)
    assert architecture.windows == (0, 0, 7, 7, 7)


def test_both_spellings_of_rotary_settings_mean_the_same():
    old = family("gpt_neox").architecture({**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 500})
    new = family("gpt_neox").architecture(
        {**NEOX, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 500.0}}
    )
    assert old == new
    assert old.rope.dims == 4
    scaling = {"factor": 2.0}
    old = family("llama").architecture({**LLAMA, "rope_theta": 7.0, "rope_scaling": {**scaling, "type": "linear"}})
    new = family("llama").architecture(
        {**LLAMA, "rope_parameters": {**scaling, "rope_type": "linear", "rope_theta": 7.0}}
    )
    assert old == new
    assert (old.rope.theta, old.rope.factor) == (7.0, 2.0)


def test_the_older_form_of_gemma_3_and_the_newer_mean_the_same():
    new = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7.0}}
    new["sliding_attention"] = {"rope_type": "default", "rope_theta": 5.0}
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 7.0, "rope_local_base_freq": 5.0}
    architecture = family("gemma3_text").architecture
    config = CONFIGS["gemma3_text"]
    assert architecture({**config, **old}) == architecture({**config, "rope_parameters": new})
    assert architecture(config).windows == (4096,) * 5 + (0,) + (4096,) * 2


def test_the_command_names_every_family(capsys):
    cli.run_command(["models"])
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in FAMILIES)
    assert "model.family: my_file:architecture names" in out
    with pytest.raises(UserError, match="dpo-jax models takes"):
        cli.run_command(["models", "llama"])
