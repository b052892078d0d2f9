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
    """Returns the parameters' shardings, and the abstract state: shapes, dtypes and shardings. Allocates nothing."""
    shapes = jax.eval_shape(lambda p: init_state(p, tx, run.loss, p if run.sync else ()), run.params)
    axes = run.model.axes if run.lora is None else lora.adapter_axes(run.model.architecture, run.model.axes, run.lora)
    params = sharding.param_shardings(mesh, axes, shapes.params)
    where = sharding.state_shardings_like(mesh, params, shapes)
    abstract = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return params, abstract


def policy_shardings(run: Run, mesh: Any, trained: Any) -> PolicyShardings:
    """Returns the shardings of a policy on a mesh, given those of its trained parameters."""
    if run.lora is None:
        collectives = sharding.mesh_collectives(mesh, (trained, None))
        model = gather_on_use(run.model, collectives, trained)
        return PolicyShardings(mesh, trained, None, only_trained, collectives, model)
    kind, architecture = run.lora, run.model.architecture

    def policy(adapters: Any, base: Any) -> Any:
        return lora.attach_adapters(architecture, base, adapters, kind)

    axes = qlora.quantized_axes(run.model.axes, run.base)
    base = sharding.param_shardings(mesh, axes, run.base)
    abstract_base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.base)
    shapes = jax.eval_shape(policy, run.params, abstract_base)
    attached = sharding.param_shardings(mesh, lora.attached_axes(architecture, run.model.axes, axes, kind), shapes)
    collectives = sharding.mesh_collectives(mesh, (trained, base))
    return PolicyShardings(mesh, trained, base, policy, collectives, gather_on_use(run.model, collectives, attached))


def gather_on_use(model: Model, collectives: Collectives, shardings: Any) -> Model:
    """Returns the model of sharded parameters, all-gathered just before use: one layer at a time. Rows may be split.

    Args:
      model: for gathered parameters.
      collectives: how devices share rows.
      shardings: tree of the parameters' shardings.
    """
    gather = collectives.gather
    if gather is None:
        return model

    def top(tree: Any) -> Any:
        rest = {k: v for k, v in tree.items() if k != "layers"}
        return gather(rest, {k: shardings[k] for k in rest}) | {"layers": tree["layers"]}

    def layer(tree: Any) -> Any:
        return gather(tree, shardings["layers"])

    return model._replace(
        hidden=lambda tree, *fields: model.hidden(top(tree), *fields, gather=layer, split=collectives.split),
        head=lambda tree: model.head(top(tree)),
        split=collectives.split,
    )
