"""Shardings of the policy's parameters and of the training state."""

from typing import Any

import jax

from dpo_jax import sharding
from dpo_jax.models import lora, qlora
from dpo_jax.models.model import Model
from dpo_jax.records import TrainState
from dpo_jax.sharding import Collectives
from dpo_jax.step import init_state, only_trained
from dpo_jax.training.run import PolicyShardings, Run


def state_shardings(run: Run, tx: Any, mesh: Any) -> tuple[Any, TrainState]:
    """Returns the parameters' shardings, and the shapes and shardings of the whole state; allocates nothing."""
    shapes = jax.eval_shape(lambda p: init_state(p, tx, run.loss.terms, p if run.sync else ()), run.params)
    axes = run.model.axes if run.lora is None else lora.adapter_axes(run.model.architecture, run.model.axes, run.lora)
    params = sharding.param_shardings(mesh, axes, shapes.params)
    where = sharding.state_shardings_like(mesh, params, shapes)
    like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return params, like


def policy_shardings(run: Run, mesh: Any, trained: Any) -> PolicyShardings:
    """Returns how the policy lies on a mesh, given the shardings of what is trained."""
    if run.lora is None:
        rows = sharding.mesh_collectives(mesh, (trained, None))
        return PolicyShardings(mesh, trained, None, only_trained, rows, gather_on_use(run.model, rows, trained))
    adapted, architecture = run.lora, run.model.architecture

    def policy(adapters: Any, base: Any) -> Any:
        return lora.attach_adapters(architecture, base, adapters, adapted)

    axes = qlora.quantized_axes(run.model.axes, run.base)
    base = sharding.param_shardings(mesh, axes, run.base)
    shapes = jax.eval_shape(
        policy, run.params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.base)
    )
    whole = sharding.param_shardings(mesh, lora.attached_axes(architecture, run.model.axes, axes, adapted), shapes)
    rows = sharding.mesh_collectives(mesh, (trained, base))
    return PolicyShardings(mesh, trained, base, policy, rows, gather_on_use(run.model, rows, whole))


def gather_on_use(model: Model, rows: Collectives, params: Any) -> Model:
    """Returns the model for parameters as they lie on the devices, made whole where they are used: a layer at a time.

    Args:
      model: for whole parameters.
      rows: how devices share rows.
      params: tree of the parameters' shardings.
    """
    whole = rows.whole
    if whole is None:
        return model

    def top(tree: Any) -> Any:
        rest = {k: v for k, v in tree.items() if k != "layers"}
        return whole(rest, {k: params[k] for k in rest}) | {"layers": tree["layers"]}

    def layer(tree: Any) -> Any:
        return whole(tree, params["layers"])

    return model._replace(
        hidden=lambda tree, *fields: model.hidden(top(tree), *fields, gather=layer),
        head=lambda tree: model.head(top(tree)),
    )
