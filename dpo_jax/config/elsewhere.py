"""Hints for unknown keys: names of TRL, transformers, PEFT and the original code, misspellings, wrong sections."""

import difflib
from collections.abc import Sequence

from dpo_jax.named import AXES

MOST = 4  # keys in a hint
# Names elsewhere: the key here, and what differs; or why there is none.
NAMES: tuple[tuple[str, str], ...] = (
    # Model and reference.
    ("model_name_or_path name_or_path model_id policy", "set model.path"),
    ("model_revision revision", "set model.path to owner/name@revision"),
    ("ref_model ref_model_name_or_path reference_model archive", "set reference.path; by default the initial policy"),
    ("torch_dtype dtype bf16 fp16 policy_dtype reference_dtype fsdp_policy_mp", "set model.compute: bfloat16"),
    ("bf16_full_eval fp16_full_eval", "set model.compute: bfloat16, in training and evaluation"),
    ("attn_implementation use_flash_attention_2 flash_attention", "set model.attention"),
    ("tokenizer_name_or_path tokenizer_name processing_class", "set model.tokenizer"),
    ("model_init_kwargs config_name", "set model.path, or model.config for random weights"),
    ("gradient_checkpointing activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs "
     "activation_offloading use_reentrant", "set model.remat: full"),
    ("sync_ref_model ref_model_sync_steps", "set reference.sync_every, with reference.mode: online"),
    ("ref_model_mixup_alpha", "set reference.sync_alpha"),
    ("precompute_ref_log_probs precompute_ref_batch_size cache_reference_logprobs",
     "set reference.mode: cache (the default) or online"),
    # Adapters.
    ("use_peft lora_r lora_rank r", "set lora.rank: 16; 0 trains all parameters"),
    ("lora_alpha", "set lora.alpha"),
    ("lora_target_modules target_modules", "set lora.targets"),
    ("lora_path adapter_name_or_path peft_model", "set lora.path"),
    ("load_in_4bit load_in_8bit quantization_config", "set lora.base: nf4 or int8"),
    ("lora_dropout dropout disable_dropout attention_dropout", "remove it: there is no dropout"),
    ("neftune_noise_alpha", "remove it: no noise is added to embeddings"),
    ("modules_to_save lora_modules_to_save use_rslora", "set lora.path: PEFT's folders are read as they are"),
    ("use_dora", "remove it: DoRA is not supported"),
    # Data.
    ("dataset_name dataset dataset_path train_file datasets data_files dataset_mixer", "set data.path"),
    ("dataset_train_split train_split", "set data.split"),
    ("dataset_test_split eval_split validation_split test_split", "set data.eval_split"),
    ("eval_dataset eval_file validation_file", "set data.eval_path"),
    ("dataset_num_proc preprocessing_num_workers dataloader_num_workers dataloader_pin_memory "
     "dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order "
     "dataloader_drop_last dataset_streaming", "remove it: data is tokenized once, as a stream, and cached"),
    ("max_length max_seq_length max_seq_len model_max_length", "set data.max_length"),
    ("max_prompt_length", "set data.max_prompt_length"),
    ("max_completion_length max_target_length", "set data.max_length: prompt plus response"),
    ("truncation_mode truncation", "set data.truncation: keep_start is TRL's"),
    ("chat_template chat_template_path", "set data.chat_template"),
    ("padding_free pad_to_multiple_of packing pad_token padding_value label_pad_token_id group_by_length "
     "length_column_name", "set data.row_length if at all: rows are packed, without padding"),
    ("n_eval_examples max_eval_samples", "set data.eval_examples"),
    ("remove_unused_columns label_names", "set data.columns.prompt, for columns of other names"),
    ("shuffle_train train_sampling_strategy data_seed", "set data.order, or seed"),
    ("trust_remote_code", "remove it: code of the hub is never run"),
    # Loss.
    ("loss loss_type loss_name", "set loss.name"),
    ("loss_weights rpo_alpha sft_weight", "set loss.weight of each loss: [{name: dpo}, {name: sft, weight: 1.0}]"),
    ("beta dpo_beta", "set loss.beta"),
    ("label_smoothing", "set loss.label_smoothing"),
    ("label_smoothing_factor", "remove it: it smooths tokens, not preferences; those have loss.label_smoothing"),
    ("f_divergence_type", "set loss.divergence"),
    ("f_alpha_divergence_coef", "set loss.divergence_alpha"),
    ("use_weighting use_wpo", "set loss.wpo"),
    ("ld_alpha", "set loss.ld_alpha"),
    ("discopop_tau", "set loss.name: discopop, and loss.tau"),
    ("simpo_gamma", "set loss.name: simpo, and loss.gamma"),
    ("gamma_beta_ratio", "set loss.name: simpo, and loss.gamma to the ratio times loss.beta"),
    ("cpo_alpha", "set loss.name: cpo, and loss.nll_weight"),
    ("reference_free", "set loss.reference_free"),
    ("router_aux_loss_coef", "set model.router_loss"),
    # Optimizer.
    ("optim optimizer optim_type", "set optim.name"),
    ("lr learning_rate", "set optim.learning_rate"),
    ("lr_scheduler_type scheduler lr_scheduler", "set optim.schedule"),
    ("lr_scheduler_kwargs", "set optim.min_ratio or optim.decay_ratio"),
    ("warmup_steps num_warmup_steps", "set optim.warmup_steps"),
    ("warmup_ratio", "set optim.warmup_ratio"),
    ("weight_decay", "set optim.weight_decay of optim.name: adamw"),
    ("adam_beta1 beta1", "set optim.b1 of optim.name: adamw"),
    ("adam_beta2 beta2 betas", "set optim.b2 of optim.name: adamw"),
    ("adam_epsilon epsilon", "set optim.eps"),
    ("max_grad_norm gradient_clipping clip_grad_norm grad_clip", "set optim.max_grad_norm"),
    ("optim_target_modules", "remove it: it is an option of GaLore and APOLLO, which are not supported"),
    ("optim_args", "set optim.NAME for each option of the optimizer"),
    # Run.
    ("output_dir exp_name run_name local_dirs local_run_dir logging_dir overwrite_output_dir", "set run"),
    ("per_device_train_batch_size train_batch_size gradient_accumulation_steps auto_find_batch_size micro_batch_size",
     "set batch_size: comparisons per step, over all devices"),
    ("per_device_eval_batch_size eval_batch_size eval_accumulation_steps", "set batch_size, for evaluation too"),
    ("num_train_epochs n_epochs num_epochs", "set epochs"),
    ("n_examples max_train_samples", "set max_steps to the examples divided by batch_size"),
    ("eval_steps eval_strategy evaluation_strategy do_eval do_first_eval eval_delay eval_on_start do_predict",
     "set eval_every: training comparisons between evaluations"),
    ("save_steps save_strategy", "set save_every"),
    ("save_total_limit", "set keep"),
    ("metric_for_best_model greater_is_better", "set keep_best: eval_loss"),
    ("load_best_model_at_end", "set keep_best: eval_loss; model/ is then the best checkpoint"),
    ("early_stopping_patience", "set patience: evaluations without a better value of keep_best"),
    ("early_stopping_threshold", "remove it: with patience, any better value of keep_best counts"),
    ("logging_steps logging_strategy logging_first_step minimum_log_interval_secs", "set log_every"),
    ("report_to wandb", "set track: tensorboard, wandb, mlflow or trackio"),
    ("project", "set track, and WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT in the environment"),
    ("trackio_space_id trackio_bucket_id trackio_static_space_id",
     "set track: trackio, and TRACKIO_SPACE_ID in the environment"),
    ("resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
     "remove it: the same command resumes by itself"),
    ("enable_jit_checkpoint", "remove it: SIGTERM always saves a checkpoint before the run ends"),
    ("random_seed full_determinism", "set seed; a run is deterministic"),
    ("sample_during_eval n_eval_model_samples", "set samples.prompts"),
    ("temperature", "set samples.temperature"),
    ("do_sample greedy", "set samples.temperature: 0 is greedy"),
    ("max_new_tokens max_tokens n_predict num_predict", "set samples.max_new_tokens"),
    ("fsdp fsdp_config deepspeed accelerator_config parallelism_config ddp_backend ddp_timeout ddp_bucket_cap_mb "
     "ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph local_rank tensor_parallel_size",
     "set mesh.data, mesh.fsdp and mesh.tensor"),
    ("push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push save_only_model",
     "remove it: dpo-jax export RUN OUT --push owner/name uploads the model"),
    ("hub_revision", "remove it: dpo-jax export RUN OUT --push owner/name uploads to the branch main"),
    ("use_cpu no_cuda", "remove it, and set the variable JAX_PLATFORMS=cpu"),
    ("torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config "
     "torch_empty_cache_steps", "remove it: programs are always compiled"),
    ("use_cache", "remove it: training has no key-value cache"),
    ("tf32", "remove it, and set the variable JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32"),
    ("do_train debug skip_memory_metrics disable_tqdm log_level log_level_replica log_on_each_node "
     "logging_nan_inf_filter include_num_input_tokens_seen include_for_metrics batch_eval_metrics "
     "prediction_loss_only eval_do_concat_batches eval_use_gather_object save_on_each_node "
     "average_tokens_across_devices trainer", "remove it: it has no counterpart"),
)  # fmt: skip
HINTS = {name: hint for names, hint in NAMES for name in names.split()}


def key_hint(key: str, known: Sequence[str], texts: Sequence[str] = ()) -> str:
    """Returns what to do about an unknown key: set another one, or remove it. Names at most `MOST` keys.

    Args:
      key: as it was written.
      known: the keys that exist.
      texts: its values.
    """
    last, inside = key.rpartition(".")[2], [name for name in known if name.startswith(f"{key}.")]
    if inside and list(texts) == ["None"]:
        return "this section is empty; indent its keys below it"
    if nearly := difflib.get_close_matches(key, known, n=1, cutoff=0.95):
        return f"did you mean {nearly[0]!r}?"
    hint = HINTS.get(key) or HINTS.get(last, "")
    if hint and _applies(hint, key, known):
        return hint
    if hint.startswith(f"set {key} of "):
        return f"it is an option of{hint.partition(' of')[2]}"
    if inside:
        first = sorted(inside, key=lambda name: not name.endswith((".path", ".name")))
        return f"it is a section; set {' or '.join(first[:2])}, indented below {key}: in a YAML"
    if last in AXES and (name := f"{key.removesuffix(last)}name") in known:
        return f"it is an option of the loss axes; set {name} axes"
    if key in AXES and "loss.name" in known:
        return f"it is an option of the loss axes; set loss.{key}, and no loss.name"
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return f"did you mean {_either(same)}?"
    if match := difflib.get_close_matches(key, known, n=1) or _close_last(last, known):
        return f"did you mean {match[0]!r}?"
    return "dpo-jax COMMAND --help-all lists the keys"


def _applies(hint: str, key: str, known: Sequence[str]) -> bool:
    """Returns whether a command has the key that a hint names; of the optimizer any, as names have their own."""
    if not hint.startswith("set "):
        return True
    other = hint.split()[1].rstrip(":,;")
    return other != key and (other in known or (other.startswith("optim.") and "optim.name" in known))


def _close_last(last: str, known: Sequence[str]) -> list[str]:
    """Returns the key whose own name, without its section, is most similar."""
    names = {name.rpartition(".")[2]: name for name in known}
    return [names[match] for match in difflib.get_close_matches(last, names, n=1, cutoff=0.75)]


def _either(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names[:MOST]]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
