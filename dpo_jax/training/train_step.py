"""The compiled train step of a run, and the hyper-parameters that are its arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dpo_jax import distributed, losses, optim, sharding
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss
from dpo_jax.records import Batch, TrainState
from dpo_jax.step import make_train_step
from dpo_jax.training.run import PolicyShardings, Run


def hparams(config: Config) -> dict[str, Any]:
    """Returns the floats of the loss and the optimizer: arguments of the step, so that other values compile nothing."""
    return {"loss": [traced_floats(term) for term in _terms(config)], "optim": traced_floats(config.optim)}


def traced_floats(section: Mapping[str, Any]) -> dict[str, float]:
    """Returns the floats of a loss or an optimizer that may be traced; none of a user's function or one of optax."""
    fixed = optim.FIXED if section["name"] not in optim.OPTAX else set(section) - {"learning_rate", "max_grad_norm"}
    own = ":" in section["name"]
    return {k: v for k, v in section.items() if isinstance(v, float) and not own and k not in fixed}


def _terms(config: Config) -> Sequence[Any]:
    return [config.loss] if isinstance(config.loss, Mapping) else config.loss


def loss_with(config: Config, hparams: Any) -> Loss:
    """Returns the config's loss with other values of its `hparams`."""
    return losses.build([{**term, **given} for term, given in zip(_terms(config), hparams["loss"], strict=True)])


def compiled_step(run: Run, shardings: PolicyShardings, abstract_state: TrainState) -> Any:
    """Returns the compiled `(state, batch, count, base, hparams) -> (state, metrics)`, which donates the state.

    By `jit` on a mesh, or by `pmap` over devices that each hold the whole state. The base below adapters is an
    argument: as a constant it would be a copy inside the program.
    """
    config = run.config
    mapped = config.mesh.mode == "pmap"
    if mapped and distributed.is_distributed():
        raise UserError("mesh.mode: pmap runs in one process; set jit for several")
    collectives = sharding.pmap_collectives(shardings.mesh) if mapped else shardings.collectives
    model = run.model if mapped else shardings.model

    def step(state: TrainState, batch: Batch, count: Any, base: Any, hparams: Any) -> Any:
        tx, loss = optim.build(**{**config.optim, **hparams["optim"]}), loss_with(config, hparams)
        pure = make_train_step(model, loss, tx, sync=run.sync, collectives=collectives, policy=shardings.policy)
        return pure(state, batch, count, base)

    if not mapped:
        where = jax.tree.map(lambda x: x.sharding, abstract_state), sharding.replicated(shardings.mesh)
        return jax.jit(step, donate_argnums=0, out_shardings=where)
    each = jax.pmap(step, sharding.MAPPED, in_axes=(None, 1, None, None, None), out_axes=None)
    devices = sharding.row_devices(shardings.mesh)
    by_device = jax.jit(lambda b: jax.tree.map(lambda x: x.reshape(x.shape[0], devices, -1, *x.shape[2:]), b))
    return lambda state, batch, *rest: each(state, by_device(batch), *rest)
