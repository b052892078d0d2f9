"""config.json of well-known models as released, from memory, without dropout and ids, and their parameter counts."""

_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}
_LLAMA = {"hidden_act": "silu", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
_LLAMA_2 = _LLAMA | {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
_LLAMA_2 |= {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_scaling": None}
_LLAMA_2 |= {"max_position_embeddings": 4096}
_LLAMA_31 = _LLAMA_2 | {"attention_bias": False, "mlp_bias": False, "intermediate_size": 14336, "vocab_size": 128256}
_LLAMA_31 |= {"num_key_value_heads": 8, "rope_theta": 500000.0, "rope_scaling": _LLAMA3 | {"factor": 8.0}}
_LLAMA_31 |= {"max_position_embeddings": 131072}
_LLAMA_32 = _LLAMA_31 | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
_LLAMA_32 |= {"rope_scaling": _LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True}
_SMOL = _LLAMA_2 | {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30}
_SMOL |= {"num_key_value_heads": 3, "rope_interleaved": False, "rope_theta": 100000, "vocab_size": 49152}
_SMOL |= {"is_llama_config": True, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_MISTRAL_1 = {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336}
_MISTRAL_1 |= {
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
_MISTRAL_1 |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096}
_MISTRAL_3 = _MISTRAL_1 | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
_QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "use_sliding_window": False}
_QWEN |= {"rope_theta": 1000000, "vocab_size": 151936}
_QWEN_25 = _QWEN | {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
_QWEN_25 |= {"num_hidden_layers": 24, "num_key_value_heads": 2, "max_position_embeddings": 32768, "use_mrope": False}
_QWEN_25 |= {"max_window_layers": 24, "sliding_window": 32768}
_QWEN_3 = _QWEN | {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960}
_QWEN_3 |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28}
_QWEN_3 |= {"num_key_value_heads": 8, "max_window_layers": 28, "rope_scaling": None, "sliding_window": None}
_QWEN_3_4B = _QWEN_3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32}
_QWEN_3_4B |= {"max_window_layers": 36, "num_hidden_layers": 36}
_PHI = {"model_type": "phi3", "attention_bias": False, "hidden_act": "silu", "hidden_size": 3072, "rms_norm_eps": 1e-05}
_PHI |= {"intermediate_size": 8192, "num_hidden_layers": 32, "original_max_position_embeddings": 4096}
_PHI_3 = _PHI | {"num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 10000.0, "vocab_size": 32064}
_PHI_3 |= {"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047, "tie_word_embeddings": False}
# The factors of these two are made up; their number is right.
_LONG = {"type": "longrope", "short_factor": [1 + i / 50 for i in range(48)], "long_factor": [1 + i for i in range(48)]}
_PHI_3_LONG = _PHI_3 | {"max_position_embeddings": 131072, "rope_scaling": _LONG, "sliding_window": 262144}
_PHI_4 = _PHI_3_LONG | {"num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75}
_PHI_4 |= {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "vocab_size": 200064}
_PHI_4 |= {"tie_word_embeddings": True}
_GEMMA = {"attention_bias": False, "head_dim": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0}
_GEMMA_1 = _GEMMA | {"model_type": "gemma", "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16384}
_GEMMA_1 |= {"max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18, "vocab_size": 256000}
_GEMMA_1 |= {"num_key_value_heads": 1, "rope_scaling": None}
_GEMMA_2 = _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA_2 |= {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
_GEMMA_2 |= {"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216}
_GEMMA_2 |= {"max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26, "vocab_size": 256000}
_GEMMA_2 |= {"num_key_value_heads": 4, "sliding_window": 4096}
_GEMMA_2_27B = _GEMMA_2 | {"head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32}
_GEMMA_2_27B |= {"num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144}
_GEMMA_3 = _GEMMA_2 | {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None}
_GEMMA_3 |= {"hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "vocab_size": 262144}
_GEMMA_3 |= {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 1000000, "rope_local_base_freq": 10000}
_GEMMA_3 |= {"rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6}
_GEMMA_3_4B = _GEMMA_3 | {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8}
_GEMMA_3_4B |= {
    "num_hidden_layers": 34,
    "num_key_value_heads": 4,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
_GEMMA_3_4B |= {"max_position_embeddings": 131072, "sliding_window": 1024, "vocab_size": 262208}
_OLMO = {
    "model_type": "olmo2",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "rope_scaling": None,
}
_OLMO |= {"intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16, "vocab_size": 100352}
_OLMO |= {"num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 500000}
_OLMO |= {"tie_word_embeddings": False}
_OPT = {"model_type": "opt", "_remove_final_layer_norm": False, "activation_function": "relu", "ffn_dim": 3072}
_OPT |= {"do_layer_norm_before": True, "hidden_size": 768, "init_std": 0.02, "max_position_embeddings": 2048}
_OPT |= {"num_attention_heads": 12, "num_hidden_layers": 12, "prefix": "</s>", "vocab_size": 50272}
_OPT |= {"word_embed_proj_dim": 768}
OPT_350M = _OPT | {"do_layer_norm_before": False, "hidden_size": 1024, "ffn_dim": 4096, "word_embed_proj_dim": 512}
OPT_350M |= {"num_attention_heads": 16, "num_hidden_layers": 24}
_PYTHIA = {"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 2560, "intermediate_size": 10240}
_PYTHIA |= {"layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32, "vocab_size": 50304}
_PYTHIA |= {"num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False}
_PYTHIA |= {"use_parallel_residual": True}
_GPT = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "summary_use_proj": True}
_GPT_2 = _GPT | {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36, "n_positions": 1024}
_GPT_2 |= {"vocab_size": 50257}
_GPT_J = _GPT | {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "rotary": True}
_GPT_J |= {"n_positions": 2048, "rotary_dim": 64, "scale_attn_weights": True, "tie_word_embeddings": False}
_GPT_J |= {"vocab_size": 50400}
_GPT_NEO = _GPT | {"model_type": "gpt_neo", "attention_layers": ["global", "local"] * 6, "hidden_size": 768}
_GPT_NEO |= {"attention_types": [[["global", "local"], 6]], "intermediate_size": None, "window_size": 256}
_GPT_NEO |= {"max_position_embeddings": 2048, "num_heads": 12, "num_layers": 12, "vocab_size": 50257}
_GRANITE = {"model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625, "hidden_size": 2048}
_GRANITE |= {"embedding_multiplier": 12.0, "hidden_act": "silu", "intermediate_size": 8192, "logits_scaling": 8.0}
_GRANITE |= {"max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40}
_GRANITE |= {"num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_theta": 5000000.0}
_GRANITE |= {"rope_scaling": None, "tie_word_embeddings": True, "vocab_size": 49155}
_GRANITE_MOE = {key: value for key, value in _GRANITE.items() if key != "mlp_bias"} | {"model_type": "granitemoe"}
_GRANITE_MOE |= {"hidden_size": 1536, "intermediate_size": 512, "logits_scaling": 6.0, "num_attention_heads": 24}
_GRANITE_MOE |= {"num_experts_per_tok": 8, "num_hidden_layers": 32, "num_local_experts": 40, "rope_theta": 1e7}
_GRANITE_MOE |= {"output_router_logits": False, "router_aux_loss_coef": 0.0, "rms_norm_eps": 1e-06}
_SMOL_3 = {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16}
_SMOL_3 |= {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "no_rope_layer_interval": 4}
_SMOL_3 |= {"no_rope_layers": [1, 1, 1, 0] * 9, "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2}
_SMOL_3 |= {"max_position_embeddings": 65536, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0}
_SMOL_3 |= {"sliding_window": None, "use_sliding_window": False, "vocab_size": 128256, "attention_bias": False}
_SMOL_3 |= {"hidden_act": "silu", "mlp_bias": False}
_MIXED = [*["sliding_attention"] * 3, "full_attention"]
_OLMO_3 = {"model_type": "olmo3", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096}
_OLMO_3 |= {"intermediate_size": 11008, "layer_types": _MIXED * 8, "max_position_embeddings": 65536}
_OLMO_3 |= {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06}
_OLMO_3 |= {"rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 100278}
_OLMO_3["rope_scaling"] = {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0}
_OLMO_3["rope_scaling"] |= {"original_max_position_embeddings": 8192, "rope_type": "yarn"}
_GLM_4 = {"model_type": "glm4", "attention_bias": True, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096}
_GLM_4 |= {"intermediate_size": 13696, "max_position_embeddings": 32768, "num_attention_heads": 32}
_GLM_4 |= {"num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05}
_GLM_4 |= {"rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 151552}
_EXAONE = {"model_type": "exaone4", "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "vocab_size": 102400}
_EXAONE |= {"intermediate_size": 4096, "layer_types": ["full_attention"] * 30, "max_position_embeddings": 65536}
_EXAONE |= {"num_attention_heads": 32, "num_hidden_layers": 30, "num_key_value_heads": 8, "rms_norm_eps": 1e-05}
_EXAONE |= {"rope_scaling": _LLAMA3 | {"factor": 16.0}, "rope_theta": 1000000, "sliding_window": None}
_EXAONE |= {"sliding_window_pattern": None, "tie_word_embeddings": True}
_EXAONE_32B = _EXAONE | {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 27392, "layer_types": _MIXED * 16}
_EXAONE_32B |= {"num_attention_heads": 40, "num_hidden_layers": 64, "sliding_window": 4096}
_EXAONE_32B |= {"sliding_window_pattern": "LLLG", "max_position_embeddings": 131072, "tie_word_embeddings": False}
_PHI_2 = {"model_type": "phi", "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240}
_PHI_2 |= {"layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32, "vocab_size": 51200}
_PHI_2 |= {"num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": False}
_PHI_2 |= {"rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False}
_STAR = {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "norm_epsilon": 1e-05}
_STAR |= {"intermediate_size": 12288, "max_position_embeddings": 16384, "num_attention_heads": 24, "use_bias": True}
_STAR |= {"num_hidden_layers": 30, "num_key_value_heads": 2, "rope_theta": 999999.4420358813, "sliding_window": 4096}
_STAR |= {"vocab_size": 49152, "mlp_type": "default", "norm_type": "layer_norm"}
_STABLE = {"model_type": "stablelm", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632}
_STABLE |= {"layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "num_attention_heads": 32, "rope_theta": 10000}
_STABLE |= {"num_hidden_layers": 24, "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "use_qkv_bias": True}
_STABLE |= {"qk_layernorm": False, "rope_scaling": None, "tie_word_embeddings": False, "use_parallel_residual": False}
_STABLE |= {"vocab_size": 100352}
_SEED = {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False, "head_dim": 128}
_SEED |= {"hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 27648, "max_position_embeddings": 524288}
_SEED |= {"mlp_bias": False, "num_attention_heads": 80, "num_hidden_layers": 64, "num_key_value_heads": 8}
_SEED |= {"rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0}
_SEED |= {"tie_word_embeddings": False, "vocab_size": 155136}
_COHERE = {"model_type": "cohere2", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096}
_COHERE |= {"intermediate_size": 14336, "layer_norm_eps": 1e-05, "logit_scale": 0.25, "num_attention_heads": 32}
_COHERE |= {"max_position_embeddings": 8192, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 50000}
_COHERE |= {"rope_scaling": None, "sliding_window": 4096, "sliding_window_pattern": 4, "use_qk_norm": False}
_COHERE |= {"rotary_pct": 1.0, "use_embedding_sharing": True, "use_parallel_block": True, "vocab_size": 256000}
_COHERE |= {"head_dim": 128, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"}
_INTERN = {"model_type": "internlm3", "bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096}
_INTERN |= {"intermediate_size": 10240, "max_position_embeddings": 32768, "num_attention_heads": 32, "qkv_bias": False}
_INTERN |= {"num_hidden_layers": 48, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 50000000}
_INTERN |= {"rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "tie_word_embeddings": False, "vocab_size": 128512}
_FALCON = {"model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False}
_FALCON |= {"hidden_size": 4544, "layer_norm_epsilon": 1e-05, "multi_query": True, "new_decoder_architecture": False}
_FALCON |= {"num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True, "vocab_size": 65024}
_FALCON_40B = _FALCON | {"hidden_size": 8192, "new_decoder_architecture": True, "num_attention_heads": 128}
_FALCON_40B |= {"num_hidden_layers": 60, "num_kv_heads": 8}
_FALCON_RW = _FALCON | {"alibi": True, "bias": True, "hidden_size": 2048, "multi_query": False, "parallel_attn": False}
_FALCON_RW |= {"num_attention_heads": 32, "num_hidden_layers": 24, "vocab_size": 50304}
_BLOOM = {"model_type": "bloom", "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True}
_BLOOM |= {"bias_dropout_fusion": True, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_embed": 1024}
_BLOOM |= {"n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1}
_BLOOM |= {"seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False}
_BLOOM |= {"vocab_size": 250880}
_GEMMA_3_WHOLE = {"model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000}
_GEMMA_3_WHOLE |= {"eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256}
_GEMMA_3_WHOLE["vision_config"] = {}
_GEMMA_3_WHOLE["text_config"] = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text"}
_GEMMA_3_WHOLE["text_config"] |= {"num_hidden_layers": 34, "sliding_window": 1024}
_GEMMA_3_WHOLE["text_config"] |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
_GEMMA_3_27B = _GEMMA_3_WHOLE["text_config"] | {"hidden_size": 5376, "intermediate_size": 21504, "head_dim": 128}
_GEMMA_3_27B |= {"num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16}
_GEMMA_3_27B |= {"query_pre_attn_scalar": 168}
_MISTRAL_SMALL = {"model_type": "mistral", "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120}
_MISTRAL_SMALL |= {"intermediate_size": 32768, "max_position_embeddings": 131072, "num_attention_heads": 32}
_MISTRAL_SMALL |= {"num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 131072}
_MISTRAL_SMALL |= {"rope_theta": 1000000000.0, "sliding_window": None}
_MINISTRAL = _MISTRAL_SMALL | {"model_type": "ministral3", "hidden_size": 3072, "intermediate_size": 9216}
_MINISTRAL |= {"max_position_embeddings": 262144, "num_hidden_layers": 26, "tie_word_embeddings": True}
_MINISTRAL["rope_parameters"] = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1}
_MINISTRAL["rope_parameters"] |= {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384}
_MINISTRAL["rope_parameters"] |= {"rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"}
del _MINISTRAL["rope_theta"]
_MISTRAL_3_WHOLE = {"model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": False}
_MISTRAL_3_WHOLE |= {"projector_hidden_act": "gelu", "spatial_merge_size": 2, "vision_feature_layer": -1}
_QWEN_3_MOE = _QWEN_3 | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144}
_QWEN_3_MOE |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True}
_QWEN_3_MOE |= {"num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48}
_QWEN_3_MOE |= {"num_key_value_heads": 4, "max_window_layers": 48, "tie_word_embeddings": False}
_QWEN_3_MOE |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_MIXTRAL = _MISTRAL_1 | {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8}
_MIXTRAL |= {"rope_theta": 1000000.0, "sliding_window": None, "output_router_logits": False}
_MIXTRAL |= {"router_aux_loss_coef": 0.02, "tie_word_embeddings": False}
_OLMOE = _OLMO | {"model_type": "olmoe", "clip_qkv": None, "intermediate_size": 1024, "num_experts": 64}
_OLMOE |= {"norm_topk_prob": False, "num_experts_per_tok": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
_OLMOE |= {"output_router_logits": False, "router_aux_loss_coef": 0.01, "vocab_size": 50304}
_GPT_OSS = {"model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64}
_GPT_OSS |= {"hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880}
_GPT_OSS |= {"layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072}
_GPT_OSS |= {"num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8}
_GPT_OSS |= {"num_local_experts": 32, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 150000}
_GPT_OSS |= {"router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False}
_GPT_OSS |= {"vocab_size": 201088, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0}}
_GPT_OSS["rope_scaling"] |= {"original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}

_QWEN_3_NEXT = {"model_type": "qwen3_next", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 256}
_QWEN_3_NEXT |= {"full_attention_interval": 4, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120}
_QWEN_3_NEXT |= {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16}
_QWEN_3_NEXT |= {"linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144}
_QWEN_3_NEXT |= {"mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": True, "vocab_size": 151936}
_QWEN_3_NEXT |= {"num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48}
_QWEN_3_NEXT |= {"num_key_value_heads": 2, "output_router_logits": False, "partial_rotary_factor": 0.25}
_QWEN_3_NEXT |= {"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.001}
_QWEN_3_NEXT |= {"shared_expert_intermediate_size": 512, "tie_word_embeddings": False, "use_sliding_window": False}
_QWEN_35 = {"model_type": "qwen3_5_text", "attention_bias": False, "attn_output_gate": True, "head_dim": 256}
_QWEN_35 |= {"full_attention_interval": 4, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 17408}
_QWEN_35 |= {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 16, "linear_conv_kernel_dim": 4}
_QWEN_35 |= {"linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 48}
_QWEN_35 |= {"linear_value_head_dim": 128, "max_position_embeddings": 262144, "mtp_num_hidden_layers": 1}
_QWEN_35 |= {"num_attention_heads": 24, "num_hidden_layers": 64, "num_key_value_heads": 4, "rms_norm_eps": 1e-06}
_QWEN_35 |= {"tie_word_embeddings": False, "vocab_size": 248320}
_QWEN_35["rope_parameters"] = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
_QWEN_35["rope_parameters"] |= {"rope_theta": 10000000, "rope_type": "default"}
_QWEN_35_MOE = _QWEN_35 | {"model_type": "qwen3_5_moe_text", "hidden_size": 2048, "linear_num_value_heads": 32}
_QWEN_35_MOE |= {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 10, "moe_intermediate_size": 512}
_QWEN_35_MOE |= {"num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40}
_QWEN_35_MOE |= {"num_key_value_heads": 2, "shared_expert_intermediate_size": 512, "router_aux_loss_coef": 0.001}
del _QWEN_35_MOE["intermediate_size"]
_QWEN_35_WHOLE = {"model_type": "qwen3_5", "image_token_id": 248056, "text_config": _QWEN_35, "vision_config": {}}
_QWEN_35_WHOLE |= {"tie_word_embeddings": False}

_GLM_45_AIR = {"model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128}
_GLM_45_AIR |= {"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944, "n_group": 1, "topk_group": 1}
_GLM_45_AIR |= {"max_position_embeddings": 131072, "moe_intermediate_size": 1408, "n_routed_experts": 128}
_GLM_45_AIR |= {"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8}
_GLM_45_AIR |= {"num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1}
_GLM_45_AIR |= {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000}
_GLM_45_AIR |= {"routed_scaling_factor": 1.0, "tie_word_embeddings": False, "use_qk_norm": False, "vocab_size": 151552}
_GLM_45 = _GLM_45_AIR | {"first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288}
_GLM_45 |= {"moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 92, "use_qk_norm": True}
_GLM_45 |= {"routed_scaling_factor": 2.5}
_DEEPSEEK = {"model_type": "deepseek_v3", "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3}
_DEEPSEEK |= {"hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512}
_DEEPSEEK |= {"max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8}
_DEEPSEEK |= {"n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128}
_DEEPSEEK |= {"num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536}
_DEEPSEEK |= {"num_nextn_predict_layers": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06}
_DEEPSEEK |= {"rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4}
_DEEPSEEK |= {"tie_word_embeddings": False, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280}
_DEEPSEEK["rope_scaling"] = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
_DEEPSEEK["rope_scaling"] |= {"original_max_position_embeddings": 4096, "type": "yarn"}
_MOONLIGHT = _DEEPSEEK | {"first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264, "n_group": 1}
_MOONLIGHT |= {"max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_routed_experts": 64}
_MOONLIGHT |= {"n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27}
_MOONLIGHT |= {"num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None, "rms_norm_eps": 1e-05}
_MOONLIGHT |= {"rope_scaling": None, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "topk_group": 1}
_MOONLIGHT |= {"aux_loss_alpha": 0.001, "seq_aux": True, "vocab_size": 163840}

_GEMMA_4 = {"model_type": "gemma4_text", "attention_bias": False, "attention_k_eq_v": False, "enable_moe_block": False}
_GEMMA_4 |= {"final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256, "hidden_size": 1536}
_GEMMA_4 |= {"hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 256, "intermediate_size": 6144}
_GEMMA_4 |= {"layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7, "max_position_embeddings": 131072}
_GEMMA_4 |= {"moe_intermediate_size": None, "num_attention_heads": 8, "num_experts": None, "num_hidden_layers": 35}
_GEMMA_4 |= {"num_global_key_value_heads": None, "num_key_value_heads": 1, "num_kv_shared_layers": 20}
_GEMMA_4 |= {"rms_norm_eps": 1e-06, "sliding_window": 512, "tie_word_embeddings": True, "top_k_experts": None}
_GEMMA_4 |= {"use_bidirectional_attention": None, "use_double_wide_mlp": True, "vocab_size": 262144}
_GEMMA_4 |= {"vocab_size_per_layer_input": 262144}
_GEMMA_4["rope_parameters"] = {"sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}
_GEMMA_4["rope_parameters"]["full_attention"] = {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
_GEMMA_4["rope_parameters"]["full_attention"] |= {"rope_type": "proportional"}
_GEMMA_4_E4B = _GEMMA_4 | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42}
_GEMMA_4_E4B |= {"num_key_value_heads": 2, "num_kv_shared_layers": 18, "use_double_wide_mlp": False}
_GEMMA_4_E4B |= {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 7}
_GEMMA_4_31B = _GEMMA_4_E4B | {"attention_k_eq_v": True, "hidden_size": 5376, "hidden_size_per_layer_input": 0}
_GEMMA_4_31B |= {"intermediate_size": 21504, "max_position_embeddings": 262144, "num_attention_heads": 32}
_GEMMA_4_31B |= {"num_global_key_value_heads": 4, "num_hidden_layers": 60, "num_key_value_heads": 16}
_GEMMA_4_31B |= {"num_kv_shared_layers": 0, "sliding_window": 1024, "use_bidirectional_attention": "vision"}
_GEMMA_4_31B |= {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 10}
_GEMMA_4_MOE = _GEMMA_4_31B | {"enable_moe_block": True, "hidden_size": 2816, "intermediate_size": 2112}
_GEMMA_4_MOE |= {"moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128, "num_hidden_layers": 30}
_GEMMA_4_MOE |= {"num_global_key_value_heads": 2, "num_key_value_heads": 8, "top_k_experts": 8}
_GEMMA_4_MOE |= {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 5}
_GEMMA_4_WHOLE = {"model_type": "gemma4", "image_token_id": 258880, "tie_word_embeddings": True, "vision_config": {}}

# A tied head counts once. Qwen3's files also hold the tied head, so that the hub shows more.
KNOWN = {
    "Llama-2-7b": (_LLAMA_2, 6_738_415_616),
    "Llama-3.1-8B": (_LLAMA_31, 8_030_261_248),
    "Llama-3.2-1B": (_LLAMA_32, 1_235_814_400),
    "SmolLM2-135M": (_SMOL, 134_515_008),
    "Mistral-7B-v0.1": (_MISTRAL_1, 7_241_732_096),
    "Mistral-7B-v0.3": (_MISTRAL_3, 7_248_023_552),
    "Qwen2.5-0.5B": (_QWEN_25, 494_032_768),
    "Qwen3-0.6B": (_QWEN_3, 596_049_920),
    "Qwen3-4B": (_QWEN_3_4B, 4_022_468_096),
    "Qwen3-30B-A3B": (_QWEN_3_MOE, 30_532_122_624),
    "Qwen3-Next-80B-A3B": (_QWEN_3_NEXT, 79_674_391_296),
    "Qwen3.5-35B-A3B, its language model": (_QWEN_35_MOE, 34_660_610_688),
    "Mixtral-8x7B-v0.1": (_MIXTRAL, 46_702_792_704),
    "OLMoE-1B-7B-0924": (_OLMOE, 6_919_161_856),
    "granite-3.1-3b-a800m": (_GRANITE_MOE, 3_298_793_472),
    "gpt-oss-20b": (_GPT_OSS, 20_914_757_184),
    "Phi-3-mini-4k": (_PHI_3, 3_821_079_552),
    "Phi-3-mini-128k": (_PHI_3_LONG, 3_821_079_552),
    "Phi-4-mini": (_PHI_4, 3_836_021_760),
    "gemma-2b": (_GEMMA_1, 2_506_172_416),
    "gemma-2-2b": (_GEMMA_2, 2_614_341_888),
    "gemma-2-27b": (_GEMMA_2_27B, 27_227_128_320),
    "gemma-3-1b": (_GEMMA_3, 999_885_952),
    "gemma-3-4b, its language model": (_GEMMA_3_4B, 3_880_263_168),
    "gemma-4-E2B, its language model": (_GEMMA_4, 4_628_569_379),
    "gemma-4-E4B, its language model": (_GEMMA_4_E4B, 7_463_013_418),
    "gemma-4-31B, its language model": (_GEMMA_4_31B, 30_697_345_340),
    "gemma-4-26B-A4B, its language model": (_GEMMA_4_MOE, 25_233_141_790),
    "internlm3-8b": (_INTERN, 8_804_241_408),
    "falcon-7b": (_FALCON, 6_921_720_704),
    "falcon-40b": (_FALCON_40B, 41_303_293_952),
    "falcon-rw-1b": (_FALCON_RW, 1_311_625_216),
    "bloom-560m": (_BLOOM, 559_214_592),
    "phi-2": (_PHI_2, 2_779_683_840),
    "starcoder2-3b": (_STAR, 3_030_371_328),
    "stablelm-2-1.6b": (_STABLE, 1_644_515_328),
    "Seed-OSS-36B": (_SEED, 36_151_104_512),
    "command-r7b": (_COHERE, 8_028_033_024),
    "granite-3.1-2b": (_GRANITE, 2_533_531_648),
    "SmolLM3-3B": (_SMOL_3, 3_075_098_624),
    "OLMo-3-7B": (_OLMO_3, 7_298_011_136),
    "GLM-4-9B-0414": (_GLM_4, 9_400_279_040),
    "GLM-4.5-Air": (_GLM_45_AIR, 106_852_251_264),
    "GLM-4.5": (_GLM_45, 352_797_829_024),
    "DeepSeek-V3": (_DEEPSEEK, 671_026_419_200),
    "Moonlight-16B-A3B": (_MOONLIGHT, 15_960_110_208),
    "EXAONE-4.0-1.2B": (_EXAONE, 1_279_391_488),
    "EXAONE-4.0-32B": (_EXAONE_32B, 32_003_216_384),
    "OLMo-2-1B": (_OLMO, 1_484_916_736),
    "opt-125m": (_OPT, 125_239_296),
    "pythia-2.8b": (_PYTHIA, 2_775_208_960),
    "gpt2-large": (_GPT_2, 774_030_080),
    "gpt-j-6b": (_GPT_J, 6_050_882_784),
    "gpt-neo-125m": (_GPT_NEO, 125_198_592),
}
# Models that read images too; the counts are those of their language models.
WHOLE = {
    "gemma-3-4b-it": (_GEMMA_3_WHOLE, 3_880_263_168),
    "gemma-3-27b-it": (_GEMMA_3_WHOLE | {"text_config": _GEMMA_3_27B}, 27_009_346_304),
    "gemma-4-E2B-it": (_GEMMA_4_WHOLE | {"text_config": _GEMMA_4}, 4_628_569_379),
    "gemma-4-31B-it": (_GEMMA_4_WHOLE | {"text_config": _GEMMA_4_31B}, 30_697_345_340),
    "Mistral-Small-3.1-24B": (
        _MISTRAL_3_WHOLE | {"tie_word_embeddings": False, "text_config": _MISTRAL_SMALL},
        23_572_403_200,
    ),
    "Qwen3.5-27B": (_QWEN_35_WHOLE, 26_895_998_464),
    "Qwen3.5-35B-A3B": (
        _QWEN_35_WHOLE | {"model_type": "qwen3_5_moe", "text_config": _QWEN_35_MOE},
        34_660_610_688,
    ),
    "Ministral-3-3B": (_MISTRAL_3_WHOLE | {"tie_word_embeddings": True, "text_config": _MINISTRAL}, 3_429_006_336),
}
