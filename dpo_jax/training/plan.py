"""The memory that a run needs on each device: compiles its step for shapes and allocates no arrays."""

import dataclasses
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import losses, optim, sharding
from dpo_jax.config.schema import Config
from dpo_jax.data import pack
from dpo_jax.logprobs import CHUNK
from dpo_jax.models import qlora, reward_head
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.huggingface.folder import model_folder, read_config
from dpo_jax.models.huggingface.hub import hub_config_file, is_hub_name
from dpo_jax.models.model import build_model
from dpo_jax.paths import is_run
from dpo_jax.records import Batch
from dpo_jax.training.checks import LONG_RUN, check_length, make_sync, with_compute
from dpo_jax.training.compile import compiled_step, hparams
from dpo_jax.training.load import compute_dtype, initial_adapters, recomputed
from dpo_jax.training.run import Run
from dpo_jax.training.run_folder import run_config
from dpo_jax.training.shard import policy_shardings, state_shardings
from dpo_jax.training.tables import responses_per_prompt

GB = 2**30
SHARE = 0.9  # of a device's memory that a plan may take: the batches of a run differ from the plan's
TOKENS = 4096  # per device and microbatch, if data.rows is not set
log = logging.getLogger(__name__)


class Memory(NamedTuple):
    """Bytes on each device during a step.

    Attributes:
      trained: the trained parameters, float32.
      frozen: the base of adapters, or an online reference.
      optimizer: the optimizer's state.
      gradients: float32 gradients, summed over microbatches.
      logits: one chunk of logits, and its gradient.
      activations: all other temporary memory of the compiled step: activations, casts, workspace.
      batch: the batch of a step.
    """

    trained: int
    frozen: int
    optimizer: int
    gradients: int
    logits: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


class Plan(NamedTuple):
    """The memory plan of a run.

    Attributes:
      config: the run's config.
      parameters: number of parameters of the model.
      trained: number of trained parameters: of the model, or of its adapters.
      shape: layout of a batch.
      memory: bytes on each device.
    """

    config: Config
    parameters: int
    trained: int
    shape: pack.Layout
    memory: Memory


def plan_run(config: Config) -> Plan:
    """Returns the memory plan of a run on JAX's devices. Reads a config.json, no weights and no data.

    Raises:
      UserError: invalid options.
    """
    config = dataclasses.replace(config, optim=optim.with_total_steps(config.optim, config.max_steps or LONG_RUN))
    # CPUs that emulate devices would add a float32 copy of a bfloat16 base, so the step is compiled with a float32 one.
    run, loss = abstract_run(config, narrow=False), losses.build(config.loss)
    check_length(config, run.model)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.sequence)
    tx = optim.build(**config.optim)
    shape = plan_layout(config, sharding.row_devices(mesh), sharding.token_devices(mesh))
    trained, abstract = state_shardings(run, tx, mesh)
    shardings = policy_shardings(run, mesh, trained)
    base = None if shardings.base is None else sharded_shapes(run.base, shardings.base)
    batch = jax.tree.map(
        partial(_sharded_shape, where=sharding.batch_sharding(mesh)),
        abstract_batch(shape, planned_responses(config, loss)),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = compiled_step(run, shardings, abstract).lower(abstract, batch, count, base, hparams(config)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    gradients = bytes_per_device(sharded_shapes(run.params, trained))
    outputs = 1 if loss.rewards else run.model.architecture.vocab
    logits = 2 * 4 * min(CHUNK, shape.rows * shape.scored) * outputs // sharding.row_devices(mesh)
    frozen = None if shardings.base is None else sharded_shapes(abstract_run(config).base, shardings.base)
    if base is None and loss.uses_reference and config.reference.mode == "online":
        frozen = abstract.params
    memory = Memory(
        bytes_per_device(abstract.params),
        bytes_per_device(frozen),
        bytes_per_device(abstract.opt_state),
        min(gradients, temporary),
        min(logits, max(0, temporary - gradients)),
        max(0, temporary - gradients - logits),
        bytes_per_device(batch),
    )
    full = jax.eval_shape(run.model.init, jax.eval_shape(jax.random.key, 0))
    return Plan(config, count_parameters(full), count_parameters(run.params), shape, memory)


def fitting_plan(config: Config, memory: float) -> Plan:
    """Returns the plan of a run; with `model.remat: auto`, the fastest that fits in `memory` bytes, or that of full.

    Raises:
      UserError: invalid options.
    """
    *faster, last = ("none", "dots", "full") if config.model.remat == "auto" else (config.model.remat,)
    for remat in faster:
        try:
            plan = plan_run(_with_model(config, remat=remat))
        except jax.errors.JaxRuntimeError as e:  # a TPU's compiler refuses what does not fit
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            continue
        if plan.memory.total <= memory:
            return plan
    return plan_run(_with_model(config, remat=last))


def _with_model(config: Config, **values: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **values))


def with_remat(config: Config, platform: str = "", memory: float = 0) -> Config:
    """Returns the config of a run with `model.remat` set: on a GPU or TPU the fastest whose plan fits in its memory.

    A run that goes on keeps that of its start.

    Args:
      config: the run's config; what it sets stays as it is.
      platform: "cpu", "gpu" or "tpu"; by default that of JAX.
      memory: bytes on each device; by default what JAX may take.
    """
    if config.model.remat != "auto":
        return config
    folder = Path(config.run)
    if is_run(folder) and (begun := run_config(folder).model.remat) != "auto":
        return _with_model(config, remat=begun)
    memory = memory or _device_memory()
    if not memory:
        if (platform or jax.default_backend()) != "cpu":
            log.info("model.remat: none; the device does not say how much memory it has, so set dots or full if needed")
        return config
    plan = fitting_plan(with_compute(config, platform), SHARE * memory)
    log.info(
        f"model.remat: {plan.config.model.remat}, whose plan takes {plan.memory.total / GB:.3g} of "
        f"{memory / GB:.3g} GB on a device"
    )
    return dataclasses.replace(config, model=plan.config.model)


def _device_memory() -> int:
    """Returns the bytes that JAX may take on each device of this process, 0 if it does not say (on a CPU)."""
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())


def abstract_run(config: Config, narrow: bool = True) -> Run:
    """Returns a run with shapes (`jax.ShapeDtypeStruct`) in place of parameters, and without data and folder.

    Args:
      config: the run's config.
      narrow: give the base of adapters the dtype of its files; else float32.
    """
    path = config.model.path
    source = config.model.config or (hub_config_file(path) if is_hub_name(path) else model_folder(path))
    hf_config, loss = read_config(source), losses.build(config.loss)
    architecture = architecture_of(hf_config)
    architecture = reward_head.as_reward_architecture(architecture) if loss.rewards else architecture
    model = build_model(architecture, compute=compute_dtype(config.model), remat=recomputed(config.model))
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    adapters, kind = initial_adapters(config.lora, architecture, 0)
    if kind is not None and narrow and config.model.path:
        dtype = jnp.dtype(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    if config.lora.base:
        params = qlora.quantize_base(
            params, architecture, config.lora.base, lambda f, x: jax.eval_shape(jax.vmap(f), x)
        )
    none: Any = None
    return Run(
        config=config, folder=none, lock=none, cache=none, model=model, loss=loss, sync=make_sync(config, loss),
        params=params if kind is None else adapters, load_reference=None, train_table=none, eval_table=none,
        complete=None, prompts=[], kl_prompts=[], export=none, base=None if kind is None else params, lora=kind,
    )  # fmt: skip


def plan_layout(config: Config, devices: int, parts: int = 1) -> pack.Layout:
    """Returns the layout of a batch of full rows; by default rows of 2 * max_length tokens, `TOKENS` per device.

    Args:
      config: the run's config.
      devices: that share the rows of a microbatch.
      parts: devices that share the tokens of a row.
    """
    pack.check_parts(config.data.row_length, parts)
    unit = pack.LENGTH_UNIT * parts if parts > 1 else 1
    length = config.data.row_length or -(-2 * config.data.max_length // unit) * unit
    rows = config.data.rows or devices * max(1, TOKENS * parts // length)
    segments = min(config.batch_size, max(1, length // 64))
    return pack.Layout(math.ceil(config.batch_size / rows), rows, length, segments, length)


def planned_responses(config: Config, loss: losses.Loss) -> int:
    """Returns P, the number of responses per comparison in a batch."""
    return responses_per_prompt(config, loss) + loss.mismatched


def abstract_batch(shape: pack.Layout, responses: int) -> Batch:
    """Returns the shapes and dtypes of a batch."""
    lead = (shape.microbatches, shape.rows)
    ints, floats = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    row, scored, places = (*lead, shape.length), (*lead, shape.scored), (*lead, shape.segments)
    answers = (*places, responses)
    fields = [ints(row)] * 4 + [ints(scored)] * 3 + [floats(places)] * 2 + [floats(answers), floats((*answers, 2))]
    return Batch(*fields)


def _sharded_shape(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def sharded_shapes(tree: Any, shardings: Any) -> Any:
    """Returns a tree of shapes with the given tree of shardings."""
    return jax.tree.map(_sharded_shape, tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes on each device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def count_parameters(tree: Any) -> int:
    """Returns the number of elements in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
