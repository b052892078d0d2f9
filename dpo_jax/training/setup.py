"""Builds a run from its config, on the host: tokenizer, model, tables and folder."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import distributed, losses, optim, sharding
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import dump
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss
from dpo_jax.models.huggingface.folder import model_folder, open_folder
from dpo_jax.models.huggingface.safetensors import weights_hash
from dpo_jax.paths import cache_folder, written
from dpo_jax.training import trackers
from dpo_jax.training.attention_check import with_attention
from dpo_jax.training.checks import LONG_RUN, check_keep_best, check_length, make_sync, with_compute
from dpo_jax.training.completions import make_run_completer, prompts_to_sample
from dpo_jax.training.export import export_run
from dpo_jax.training.load import (
    LoadedModel,
    check_unmerged,
    export_notes,
    load_policy,
    load_run_tokenizer,
    reference_weights,
)
from dpo_jax.training.run import Run, eval_interval
from dpo_jax.training.run_folder import (
    CHATS,
    PROMPTS,
    TEXTS,
    check_secrets,
    claim_folder,
    tokenizer_hash,
    with_schedule,
)
from dpo_jax.training.shard import check_experts
from dpo_jax.training.tables import (
    are_chats,
    check_ids,
    comparison_streams,
    decode_texts,
    eval_examples,
    load_table,
    responses_per_prompt,
    reward_encoding,
    template_file_text,
    with_noise,
    with_prompts,
)

log = logging.getLogger(__name__)
MODEL = "the model at the start"  # among a run's inputs


def check_config(config: Config) -> None:
    """Refuses invalid values, by key. Reads no data and loads no model."""
    check_secrets(config)
    trackers.check_tracker(config.track)
    for key in ("batch_size", "epochs", "save_every", "log_every", "max_nonfinite"):
        if getattr(config, key) < 1:
            raise UserError(f"{key} must be at least 1, got {getattr(config, key)}")
    if config.keep < 2:
        raise UserError(f"keep must be at least 2 (one is left if the newest is damaged), got {config.keep}")
    if config.patience < 0:
        raise UserError(f"patience must be at least 0 (0: never stop early), got {config.patience}")
    if config.patience and not config.keep_best:
        raise UserError("patience: needs the metric of keep_best; set keep_best: eval_loss")
    if not config.hang_seconds >= 0:
        raise UserError(f"hang_seconds must be >= 0 (0: never), got {config.hang_seconds}")
    if config.mesh.reduce_dtype != "float32" and config.mesh.tensor != 1:
        raise UserError(f"mesh.reduce_dtype: {config.mesh.reduce_dtype} needs mesh.tensor 1; set that, or float32")
    if config.seed < 0:
        raise UserError(f"seed must be >= 0, got {config.seed}")
    if config.data.eval_examples is not None and config.data.eval_examples < 1:
        raise UserError(f"data.eval_examples must be at least 1, got {config.data.eval_examples}; leave it out for all")
    if config.data.skip_bad_rows < 0:
        raise UserError(f"data.skip_bad_rows must be >= 0, got {config.data.skip_bad_rows}")
    if not 0 <= config.data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction must be in [0, 1), got {config.data.eval_fraction}")
    if config.lora.base and config.reference.path not in ("", config.model.path):
        kinds = f"with lora.base {config.lora.base} only model.path, for that base, is supported"
        raise UserError(f"reference.path: {kinds}; remove it")
    if not eval_interval(config, config.batch_size) and config.patience:
        raise UserError("patience: has no effect without evaluations during training; set eval_every too")
    check_unmerged(config.lora.path, config.model.path)
    loss = losses.build(config.loss)
    make_sync(config, loss)
    responses_per_prompt(config, loss)
    check_keep_best(config, loss)
    optim.build(**optim.with_total_steps(config.optim, LONG_RUN))


def setup_run(config: Config) -> Run:
    """Returns a run: its model loaded, its data tokenized, its folder locked.

    Raises:
      UserError: invalid options, or a model, data or folder that cannot be used.
    """
    check_config(config)
    config = with_compute(config)
    loss, notes = losses.build(config.loss), list[str]()
    sync, tokenizer = make_sync(config, loss), load_run_tokenizer(config.model)
    loaded = load_policy(config.model, tokenizer, config.seed, config.lora, reward_encoding(config, loss))
    check_length(config, loaded.model)
    for line in export_notes(config, loaded):
        log.info(line)
    mesh = sharding.make_mesh(*config.mesh.sizes)
    check_experts(loaded.model.architecture, mesh)
    model, note = with_attention(loaded.model, config.model.attention, config.model.compute, mesh)
    for line in filter(None, (loaded.note, note, _reference_note(config, loss))):
        notes.append(line)
        log.info(line)
    streams = comparison_streams(config.data, responses_per_prompt(config, loss))
    train_table, eval_table = _tables(config, streams, loss, tokenizer, loaded, notes)
    chats = are_chats(streams[0])
    config = dataclasses.replace(config, data=with_prompts(config.data, chats))
    config = with_schedule(config, len(train_table))
    start = start_hashes(config, loaded)
    known = start[MODEL] if _starts_as_stored(config, loaded) else ""
    load_reference = functools.cache(partial(reference_weights, config, loaded, known)) if loss.uses_reference else None
    inputs = _data_hashes(train_table, eval_table) | start
    inputs |= {"the tokenizer": tokenizer_hash(tokenizer), PROMPTS: CHATS if chats else TEXTS}
    if config.reference.path and load_reference:
        inputs["the reference"] = load_reference()[1]
    folder, lock = claim_folder(config, inputs)
    if distributed.is_primary():
        with written(folder / "data.json") as file:
            json.dump(notes, file, indent=1)
    prompts, kl_prompts = prompts_to_sample(config, loaded, loss, eval_table)
    return Run(
        config=config,
        folder=folder,
        lock=lock,
        cache=cache_folder(),
        model=model,
        loss=loss,
        sync=sync,
        params=loaded.params if loaded.lora is None else loaded.adapters,
        load_reference=load_reference,
        train_table=train_table,
        eval_table=eval_table,
        complete=make_run_completer(config, loaded, tokenizer, prompts, kl_prompts),
        prompts=decode_texts(tokenizer, prompts),
        kl_prompts=kl_prompts,
        export=partial(export_run, loaded, tokenizer, template_file_text(config.data)),
        base=None if loaded.lora is None else loaded.params,
        lora=loaded.lora,
        inputs=inputs,
    )


def _tables(
    config: Config, streams: Sequence[Any], loss: Loss, tokenizer: Any, loaded: LoadedModel, notes: list[str]
) -> tuple[Table, Table]:
    """Returns the training and the held-out table of two streams; they are the same in all processes."""
    with distributed.primary_first("the data"):  # the others then read the cache
        train = load_table(config, loss, tokenizer, with_noise(config, streams[0]), "training", notes)
        held_out = eval_examples(config, load_table(config, loss, tokenizer, streams[1], "held-out", notes))
    for split, table in (("training", train), ("held-out", held_out)):
        check_ids(table, split, tokenizer, loaded.model)
    same = {"config": dump(config)} | _data_hashes(train, held_out)
    if distributed.is_distributed():
        same["weights at the start"] = weights_hash(loaded.params, loaded.model.architecture)
    distributed.assert_same_everywhere(same)
    return train, held_out


def _data_hashes(train: Table, held_out: Table) -> dict[str, str]:
    return {"training data": _data_hash(train), "held-out data": _data_hash(held_out)}


def _data_hash(table: Table) -> str:
    """Returns a hash of all that training reads of a table; `Table.digest` covers token ids alone."""
    found = hashlib.blake2b(table.digest.encode(), digest_size=16)
    for array in (table.weights, table.preferences, table.scores):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def start_hashes(config: Config, loaded: LoadedModel) -> dict[str, str]:
    """Returns a hash of the model at the start, and of the adapters that it starts from.

    Random weights, a new head and a quantized base follow from the seed; their last bits may depend on the device, so
    that they are left out, and a run may go on elsewhere.
    """
    architecture, params = loaded.model.architecture, loaded.params
    if not config.model.path:
        params = {}
    elif not _starts_as_stored(config, loaded):
        architecture, _, params = open_folder(model_folder(config.model.path), config.model.family)
    found = {MODEL: weights_hash(params, architecture)}
    if config.lora.path and loaded.adapters is not None:
        found["the adapters at the start"] = weights_hash(loaded.adapters, architecture)
    return found


def _starts_as_stored(config: Config, loaded: LoadedModel) -> bool:
    """Returns whether the parameters at the start are those of the model folder, neither new ones nor quantized."""
    return bool(config.model.path) and not (config.lora.base or loaded.model.architecture.score)


def sweep_member(run: Run, config: Config) -> Run:
    """Returns `run` with another config, whose `train_step.hparams` alone may differ, and the folder of that config."""
    data = dataclasses.replace(config.data, text_prompts=run.config.data.text_prompts)
    config = dataclasses.replace(config, data=data, model=run.config.model)
    loss, config = losses.build(config.loss), with_schedule(config, len(run.train_table))
    folder, lock = claim_folder(config, run.inputs)
    if distributed.is_primary():
        with written(folder / "data.json") as file:
            file.write((run.folder / "data.json").read_text(encoding="utf-8"))
    return run._replace(config=config, folder=folder, lock=lock, loss=loss)


def with_run_folder(config: Config, file: str) -> Config:
    """Returns the config with its run folder set; by default runs/<name of the YAML>."""
    return dataclasses.replace(config, run=config.run or str(Path("runs") / Path(file).stem))


def _reference_note(config: Config, loss: Loss) -> str:
    """Returns a log message about the reference of a run that starts from trained adapters; "" for other runs."""
    if not (config.lora.path and loss.uses_reference):
        return ""
    if config.reference.path:
        return f"the reference is {config.reference.path}, without the adapters of lora.path"
    how = f"; reference.path {config.model.path} is the one without" if config.model.path else ""
    return f"the reference is the model with the adapters of {config.lora.path}{how}"
