"""What a run needs of each device, before anything of it exists: its step is compiled for shapes alone."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import assemble, loading, losses, models, optim, sharding
from dpo_jax.config import Config
from dpo_jax.data import pack
from dpo_jax.logprobs import CHUNK
from dpo_jax.models import hf, hub, qlora, score
from dpo_jax.prepare import Run, compiled_step, numbers, parts_of, shardings_of
from dpo_jax.records import Batch, UserError

GB = 2**30
TOKENS = 4096  # on a device, in a microbatch whose rows are not set


class Memory(NamedTuple):
    """Bytes on each device while a step runs.

    Attributes:
      trained: float32 masters of what is trained.
      frozen: the base of adapters, or the reference where it is computed just in time.
      optimiser: its state.
      gradients: summed over microbatches in float32.
      logits: the chunk of the head that exists at one time, and its gradient.
      activations: what else the compiler needs: activations, casts, workspace.
      batch: the comparisons of a step.
    """

    trained: int
    frozen: int
    optimiser: int
    gradients: int
    logits: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Plan(NamedTuple):
    """What a run needs.

    Attributes:
      config: the run's.
      parameters: of the model; of them are trained.
      trained: numbers that are trained.
      shape: the layout of a batch.
      memory: on each device.
    """

    config: Config
    parameters: int
    trained: int
    shape: pack.Shape
    memory: Memory


def of(config: Config) -> Plan:
    """Returns what a run needs on the devices that JAX sees; reads a config.json, no weights and no data.

    Raises:
      UserError: settings that no run can have.
    """
    # The processors that stand for devices would make a wide copy of a narrow base, so it is wide in what is compiled.
    run, loss = traced(config, narrow=False), losses.build(config.loss)
    assemble.check_length(config, run.model)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tx, shape = optim.build(**config.optim), shape_of(config, sharding.row_devices(mesh))
    trained, like = shardings_of(run, tx, mesh)
    parts = parts_of(run, mesh, trained)
    base = None if parts.base is None else laid(run.base, parts.base)
    batch = jax.tree.map(partial(placed, where=sharding.of_batch(mesh)), batch_of(shape, responses_of(config, loss)))
    count_of = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = compiled_step(run, parts, like).lower([like], batch, count_of, base, [numbers(config)]).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    gradients = held(laid(run.params, trained))
    columns = 1 if loss.rewards else run.model.architecture.vocab
    logits = 2 * 4 * min(CHUNK, shape.rows * shape.scored) * columns // sharding.row_devices(mesh)
    frozen = None if parts.base is None else laid(traced(config).base, parts.base)
    if base is None and loss.uses_reference and config.reference.mode == "online":
        frozen = like.params
    memory = Memory(
        held(like.params),
        held(frozen),
        held(like.opt_state),
        min(gradients, temporary),
        min(logits, max(0, temporary - gradients)),
        max(0, temporary - gradients - logits),
        held(batch),
    )
    whole = jax.eval_shape(run.model.init, jax.eval_shape(jax.random.key, 0))
    return Plan(config, count(whole), count(run.params), shape, memory)


def state_bytes(config: Config) -> int:
    """Returns the bytes that each device holds of what is trained and its optimiser; compiles nothing."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return held(shardings_of(traced(config), optim.build(**config.optim), mesh)[1])


def traced(config: Config, narrow: bool = True) -> Run:
    """Returns a run that has shapes for parameters, and no data.

    Args:
      config: the run's.
      narrow: whether the floats of a base under adapters are as wide as in its files.
    """
    path = config.model.path
    source = config.model.config or (hub.config_of(path) if hub.is_name(path) else hf.model_folder(path))
    hf_config, loss = hf.read_config(source), losses.build(config.loss)
    architecture = models.architecture_of(hf_config)
    architecture = score.scoring(architecture) if loss.rewards else architecture
    model = models.build(architecture, compute=config.model.compute, remat=config.model.remat)
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    adapters, kind = loading.adapters_of(config.lora, architecture, 0)
    if kind is not None and narrow and config.model.path:
        dtype = jnp.dtype(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    if config.lora.base:
        params = qlora.base(params, architecture, config.lora.base, lambda f, x: jax.eval_shape(jax.vmap(f), x))
    none: Any = None
    return Run(
        config=config, folder=none, lock=none, cache=none, model=model, loss=loss, sync=assemble.sync_of(config, loss),
        params=params if kind is None else adapters, frozen=None, train=none, held_out=none, complete=None, prompts=[],
        export=none, base=None if kind is None else params, lora=kind,
    )  # fmt: skip


def shape_of(config: Config, devices: int) -> pack.Shape:
    """Returns the layout of a batch whose rows are full: as set, or rows of 2 * max_length in microbatches of 4096."""
    length = config.data.row_length or 2 * config.data.max_length
    rows = config.data.rows or devices * max(1, TOKENS // length)
    groups = min(config.batch_size, max(1, length // 64))
    return pack.Shape(math.ceil(config.batch_size / rows), rows, length, groups, length)


def responses_of(config: Config, loss: losses.Loss) -> int:
    """Returns P of a batch."""
    return assemble.responses_of(config, loss) + loss.mismatched


def batch_of(shape: pack.Shape, responses: int) -> Batch:
    """Returns the shapes of a batch."""
    lead = (shape.microbatches, shape.rows)
    ints, floats = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    row, scored, places = (*lead, shape.length), (*lead, shape.scored), (*lead, shape.groups)
    answers = (*places, responses)
    fields = [ints(row)] * 4 + [ints(scored)] * 3 + [floats(places)] * 2 + [floats(answers), floats((*answers, 2))]
    return Batch(*fields)


def placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array that lies somewhere."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def laid(tree: Any, where: Any) -> Any:
    """Returns the shapes of a tree of arrays that lie somewhere."""
    return jax.tree.map(placed, tree, where)


def held(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def count(tree: Any) -> int:
    """Returns how many numbers a tree has."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def advice(plan: Plan, memory: int) -> list[str]:
    """Returns what to change where a run does not fit `memory` bytes, most effective first; nothing where it fits.

    What lies on a device all the time can be split further or not be trained; what a step needs for a while can be
    computed again, or be made of fewer rows.
    """
    config, need = plan.config, plan.memory
    if need.total <= memory:
        return []
    lasting = need.trained + need.frozen + need.optimiser + need.gradients
    lines = []
    if lasting > 0.6 * memory:
        times = 2 ** math.ceil(math.log2(lasting / (0.6 * memory)))
        lines.append(f"mesh.fsdp {config.mesh.fsdp * times}: {times} times as many devices share the parameters")
        if not config.lora.rank and not config.lora.path:
            lines.append("lora.rank 16: only adapters have gradients and an optimiser, and the base is the reference")
        elif not config.lora.base:
            lines.append("lora.base nf4: projections under the adapters take 4 bits a number, and a scale for every 64")
    if config.reference.mode == "online" and need.frozen:
        lines.append("reference.mode cache: no second model while training")
    stronger = {"none": "dots", "dots": "full"}.get(config.model.remat)
    if stronger and need.activations > 0.1 * memory:
        lines.append(f"model.remat {stronger}: the backward pass computes more again and keeps less")
    each = plan.shape.rows // max(1, jax.device_count() // config.mesh.tensor)
    if each > 1 and need.activations > 0.1 * memory:
        lines.append(f"data.rows {plan.shape.rows // each}: one row on each device at a time instead of {each}")
    return lines or ["shorter rows (data.max_length), or devices with more memory"]


def resolved(config: Config) -> Config:
    """Returns the config with the model that training starts from, where that is another run's YAML.

    Raises:
      UserError: the model is neither named there.
    """
    path = config.model.path
    if not path.endswith((".yaml", ".yml")):
        return config
    start = assemble.configs.parse(Config, path, [], prog="dpo-jax plan")
    if not start.model.path and not start.model.config:
        raise UserError(f"{path}: names no model.path or model.config")
    model = dataclasses.replace(config.model, path=start.model.path, config=start.model.config)
    return resolved(dataclasses.replace(config, model=model))
