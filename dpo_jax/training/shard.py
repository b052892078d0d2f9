"""Shardings of the policy's parameters and of the training state."""

from functools import partial
from typing import Any

import jax

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.models import lora, qlora
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.interface import Model
from dpo_jax.models.layer_embedding import TABLES
from dpo_jax.models.split_head import BLOCK, SplitHead, words_per_block
from dpo_jax.records import TrainState
from dpo_jax.sharding import Collectives
from dpo_jax.step import init_state, only_trained
from dpo_jax.training.run import PolicyShardings, Run


def check_experts(a: Architecture, mesh: jax.sharding.Mesh) -> None:
    """Refuses a mesh that shards the experts of a model without experts, or with a number that it does not divide."""
    devices, count = sharding.expert_devices(mesh), 0 if a.mixture is None else a.mixture.experts
    if devices > 1 and not count:
        raise UserError(f"mesh.expert: {devices}, but a {a.family} has no experts; set it to 1")
    if count % devices:
        raise UserError(f"mesh.expert: {devices} does not divide {count} experts; set a divisor of {count}")


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
    reduce_dtype = run.config.mesh.reduce_dtype
    if run.lora is None:
        collectives = sharding.mesh_collectives(mesh, (trained, None), reduce_dtype)
        model = gather_on_use(run.model, collectives, trained)
        return PolicyShardings(mesh, trained, None, only_trained, trained, collectives, model)
    kind, architecture = run.lora, run.model.architecture

    def policy(adapters: Any, base: Any) -> Any:
        return lora.attach_adapters(architecture, base, adapters, kind)

    axes = qlora.quantized_axes(run.model.axes, run.base)
    base = sharding.param_shardings(mesh, axes, run.base)
    shapes = jax.eval_shape(policy, run.params, jax.tree.map(_shape_of, run.base))
    attached = sharding.param_shardings(mesh, lora.attached_axes(architecture, run.model.axes, axes, kind), shapes)
    collectives = sharding.mesh_collectives(mesh, (trained, base), reduce_dtype)
    model = gather_on_use(run.model, collectives, attached)
    return PolicyShardings(mesh, trained, base, policy, attached, collectives, model)


def policy_shapes(run: Run, shardings: PolicyShardings) -> Any:
    """Returns the policy's parameters, with adapters attached, as shapes with shardings."""
    shapes = jax.eval_shape(shardings.policy, *jax.tree.map(_shape_of, (run.params, run.base)))
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings.whole)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def gather_on_use(model: Model, collectives: Collectives, shardings: Any, block: int = BLOCK) -> Model:
    """Returns the model of sharded parameters, all-gathered just before use: one layer at a time. Rows may be split,
    and the experts of a mixture, which are not gathered then.

    Where `tensor` does not shard them too, embeddings are looked up in parts of the table, and a large head is gathered
    in blocks: neither is ever whole on a device.

    Args:
      model: for gathered parameters.
      collectives: how devices share rows.
      shardings: tree of the parameters' shardings.
      block: numbers in a block of the head; one that is no larger is gathered whole.
    """
    gather, exchange = collectives.gather, collectives.exchange
    if collectives.experts is not None:
        model = model._replace(hidden=partial(model.hidden, experts=collectives.experts))
    if gather is None:
        return model

    def top(tree: Any, *kept: str) -> Any:
        """Gathers all parameters outside the layers but those that are `kept` as they are."""
        rest = {k: v for k, v in tree.items() if k not in ("layers", *kept)}
        return {**tree, **gather(rest, {k: shardings[k] for k in rest}, model.compute)}

    def layer(tree: Any) -> Any:
        return gather(tree, {name: shardings["layers"][name] for name in tree}, model.compute)

    sharded = [key for key in TABLES if key in shardings and not shardings[key].is_fully_replicated]
    kept = tuple(sharded) if exchange is not None else ()
    options = {"gather": layer, "exchange": exchange if kept else None, "split": collectives.split}
    return model._replace(
        hidden=lambda tree, *fields, **more: model.hidden(top(tree, *kept), *fields, **options, **more),
        head=lambda tree: model.head(top(tree)),
        split=collectives.split,
        split_head=_split_head(model, gather, shardings, block) if "embedding" in kept else None,
    )


def _split_head(model: Model, gather: Any, shardings: Any, block: int) -> Any:
    """Returns `Model.split_head`; None for a head that is gathered whole."""
    a = model.architecture
    key, words = "embedding" if a.tied else "head", words_per_block(a.vocab, a.width, block)
    if a.score or words == a.vocab:
        return None

    def whole(part: Any) -> Any:
        return gather({key: part}, {key: shardings[key]}, model.compute)[key]

    return lambda tree: SplitHead(tree[key], tree["head_bias"] if a.head_bias else None, whole, words)
