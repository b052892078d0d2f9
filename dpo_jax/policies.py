"""The models of a run or a folder: its policy as a checkpoint has it, and the reference beside it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import assemble, folders, loading, losses, optim
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.models import hf
from dpo_jax.records import TrainState, UserError
from dpo_jax.step import init_state


def state(path: str, settings: Config, loaded: loading.Loaded, loss: losses.Loss, which: str = "newest") -> TrainState:
    """Returns the state of one of a run's checkpoints, or that of a model folder's parameters before any step."""
    moves = assemble.sync_of(settings, loss) is not None
    trained = loaded.params if loaded.lora is None else loaded.adapters

    def start(params: Any) -> TrainState:
        return init_state(params, optim.build(**settings.optim), loss.terms, params if moves else ())

    if not folders.is_run(path):
        return TrainState(0, hf.whole(trained), (), np.zeros(loss.terms, np.float32), ())
    return _saved(Path(path), jax.eval_shape(start, trained), which)


def _saved(run: Path, like: TrainState, which: str = "newest") -> TrainState:
    """Returns the state of one of a run's checkpoints, as host arrays; touches nothing.

    Args:
      run: its folder.
      like: shapes and dtypes.
      which: newest, best (by the run's keep_best), or a step.

    Raises:
      UserError: the run has none, or not that one.
    """
    one, folder = jax.sharding.SingleDeviceSharding(jax.devices()[0]), run / "checkpoints"
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like)
    state = None
    if folder.is_dir():
        checkpoints = Checkpoints(folder, best=folders.config_of(run).keep_best, read_only=True)
        state = checkpoints.restore(like, checkpoints.step_of(which))
        checkpoints.close()
    if state is None:
        raise UserError(f"{run}: no whole checkpoint yet; train it first with dpo-jax train")
    return jax.device_get(state)


def models(path: str, settings: Config, loaded: loading.Loaded, state: TrainState) -> dict[str, Any]:
    """Returns the policy and, if there is one, the reference as it stands."""
    models = {"policy": loaded.policy(state.params)}
    uses = folders.is_run(path) and losses.build(settings.loss).uses_reference
    if state.reference:
        models["reference"] = state.reference
    elif settings.reference.path or uses:
        models["reference"] = hf.whole(assemble.frozen_of(settings, loaded)[0])
    return models
