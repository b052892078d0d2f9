"""Restores policy and reference from a checkpoint of a run, or from a model folder, to evaluate them."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import losses, optim
from dpo_jax.config.commands import EvalConfig, SampleConfig
from dpo_jax.config.schema import Config, ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.evaluation import EvalModel
from dpo_jax.models.huggingface.folder import model_folder
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.paths import is_run
from dpo_jax.records import TrainState
from dpo_jax.step import init_state
from dpo_jax.training.attention_check import with_attention
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.checks import make_sync
from dpo_jax.training.load import LoadedModel, compute_dtype, load_policy, load_run_tokenizer, reference_weights
from dpo_jax.training.run_folder import CHATS, recorded_prompts, run_config
from dpo_jax.training.tables import are_chats, held_out_comparisons, responses_per_prompt, reward_encoding

log = logging.getLogger(__name__)


def load_initial(settings: Config, loss: losses.Loss) -> tuple[LoadedModel, Any]:
    """Returns the initial policy of a config, and its tokenizer; a reward model for a loss of one."""
    tokenizer = load_run_tokenizer(settings.model)
    encoding = reward_encoding(settings, loss)
    return load_policy(settings.model, tokenizer, settings.seed, settings.lora, encoding), tokenizer


def restore_state(path: str, settings: Config, loaded: LoadedModel, loss: losses.Loss, which: str = "") -> TrainState:
    """Returns the state in a checkpoint of a run, without that of the optimizer; for a model folder, step 0.

    Args:
      path: a run folder or a model folder.
      settings: the run's config.
      loaded: from `load_policy`.
      loss: the run's loss.
      which: best (by the run's keep_best), last, or a step; "" is best if the run has keep_best, else last.

    Raises:
      UserError: the run has no such checkpoint, or one is named for a model folder.
    """
    if which and not is_run(path):
        raise UserError(f"checkpoint: {path} is a model folder, which has none; remove it, or name a run folder")
    moving = make_sync(settings, loss) is not None
    trained = loaded.params if loaded.lora is None else loaded.adapters
    if not is_run(path):
        return TrainState(0, load_into_memory(trained), (), np.zeros(loss.carried, np.float32), ())
    like = jax.eval_shape(lambda params: init_state(params, optim.STATELESS, loss, params if moving else ()), trained)
    return _restore_checkpoint(Path(path), like, which)


def _restore_checkpoint(run: Path, like: TrainState, which: str) -> TrainState:
    """Returns the state in a checkpoint as host arrays, given its shapes and dtypes; writes nothing."""
    one, folder = jax.sharding.SingleDeviceSharding(jax.devices()[0]), run / "checkpoints"
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like)
    state, step = None, None
    if folder.is_dir():
        checkpoints = Checkpoints(folder, best=run_config(run).keep_best, read_only=True)
        step = checkpoints.step_of(which)
        state = checkpoints.restore(like, step, optimizer=False)
        checkpoints.close()
    if state is None and step is not None:
        raise UserError(f"{run}: checkpoint {step} is damaged; name another: --checkpoint last, or a step")
    if state is None:
        raise UserError(f"{run}: no intact checkpoint; run dpo-jax train first")
    log.info(f"{run}: the checkpoint of step {int(state.step)}")
    return jax.device_get(state)


def load_sampled(path: str, options: ModelConfig, seed: int, which: str = "") -> tuple[LoadedModel, Any]:
    """Returns a language model to sample from, and its tokenizer.

    Args:
      path: a model folder or hub id, or a run folder.
      options: `model.tokenizer` and `model.compute`.
      seed: of `load_policy`.
      which: the checkpoint of the run, see `restore_state`; "" for its exported model.

    Raises:
      UserError: there is no such model or checkpoint, or it generates no text.
    """
    if not which:
        options = dataclasses.replace(options, path=str(model_folder(path)))
        tokenizer = load_run_tokenizer(options)
        return load_policy(options, tokenizer, seed), tokenizer
    if not is_run(path):
        raise UserError(f"checkpoint: {path} is a model folder, which has none; remove it, or name a run folder")
    config = run_config(path)
    if (loss := losses.build(config.loss)).rewards:
        raise UserError(f"{path}: a reward model, which generates no text; name a language model")
    model = dataclasses.replace(
        config.model, compute=options.compute, tokenizer=options.tokenizer or config.model.tokenizer
    )
    tokenizer = load_run_tokenizer(model)
    loaded = load_policy(model, tokenizer, config.seed, config.lora)
    policy = loaded.policy(restore_state(path, config, loaded, loss, which).params)
    return loaded._replace(params=policy, adapters=None, lora=None), tokenizer


def restore_models(path: str, settings: Config, loaded: LoadedModel, state: TrainState) -> dict[str, Any]:
    """Returns {"policy": params}, and "reference" if the run has one, in host memory."""
    models = {"policy": loaded.policy(state.params)}
    uses = is_run(path) and losses.build(settings.loss).uses_reference
    if state.reference:
        models["reference"] = state.reference
    elif settings.reference.path or uses:
        params, _ = reference_weights(settings, loaded)
        models["reference"] = load_into_memory(loaded.attached(params) if params is loaded.adapters else params)
    return models


def eval_model(path: str, settings: EvalConfig, loaded: LoadedModel, loss: losses.Loss, state: TrainState) -> EvalModel:
    """Returns the policy and its reference, ready to evaluate."""
    models = restore_models(path, settings, loaded, state)
    model, note = with_attention(loaded.model, settings.model.attention, compute_dtype(settings.model))
    if note:
        log.info(note)
    return EvalModel(model, loss, models, state.running, settings.batch_size, settings.data.max_length)


def asks_in_turns(path: str, tokenizer: Any, settings: SampleConfig | EvalConfig) -> bool:
    """Returns whether a text prompt is a turn of a user: as `settings.raw` says; None judges by the model.

    A model chats if it has a chat template; a run, if its data are conversations too.
    """
    if settings.raw is not None:
        return not settings.raw
    return has_template(tokenizer, settings) and trained_on_chats(path, settings)


def has_template(tokenizer: Any, settings: Config) -> bool:
    """Returns whether there is a chat template: the run's or the tokenizer's."""
    return bool(settings.data.chat_template or tokenizer.chat_template)


def trained_on_chats(path: str, settings: Config) -> bool:
    """Returns whether a run was trained on conversations; True for a model folder.

    A run of an earlier version did not record it: then its data tell, or it counts as True if they are not at hand.
    """
    if not is_run(path):
        return True
    if recorded := recorded_prompts(Path(path)):
        return recorded == CHATS
    try:
        responses = responses_per_prompt(settings, losses.build(settings.loss))
        return are_chats(held_out_comparisons(settings.data, responses))
    except UserError:
        log.info(f"{path}: its data are not at hand, so it counts as trained on conversations; raw decides otherwise")
        return True
