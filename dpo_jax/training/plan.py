"""What a run needs on each device: compiles its step for shapes and allocates no arrays."""

import dataclasses
import logging
import math
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import losses, optim, sharding
from dpo_jax.config.schema import Config, MeshConfig
from dpo_jax.data import pack
from dpo_jax.logprobs import CHUNK
from dpo_jax.paths import is_run
from dpo_jax.records import Sync
from dpo_jax.training.abstract import (
    abstract_batch,
    abstract_run,
    bytes_per_device,
    count_parameters,
    plan_layout,
    planned_mesh,
    planned_responses,
    sharded_shape,
    sharded_shapes,
)
from dpo_jax.training.attention_check import planned_attention
from dpo_jax.training.checks import LONG_RUN, check_length, make_sync, with_compute
from dpo_jax.training.compile import compiled_step, hparams
from dpo_jax.training.load import compute_dtype, recomputed
from dpo_jax.training.program import Collective, collectives
from dpo_jax.training.roofline import Passes, Roofline, Work, roofline, step_work
from dpo_jax.training.run import Run
from dpo_jax.training.run_folder import run_config
from dpo_jax.training.shard import policy_shardings, state_shardings
from dpo_jax.training.targets import Target

GB = 2**30
SHARE = 0.9  # of a device's memory that a plan may take: the batches of a run differ from the plan's
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
      other: the program itself, results that replace no argument, and padding of arguments.
    """

    trained: int
    frozen: int
    optimizer: int
    gradients: int
    logits: int
    activations: int
    batch: int
    other: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


class Compiled(NamedTuple):
    """A step as a target's compiler compiled it.

    Attributes:
      target: the devices.
      mesh: their axes.
      groups: of fast links, for each device in the order of the program.
      attention: a message about the attention backend.
      seconds: that compiling took.
      text: of the program; "" if the compiler refused it because it does not fit.
      collectives: of the program.
      work: of a step.
      roofline: the bound of a step; None without a program.
    """

    target: Target
    mesh: dict[str, int]
    groups: list[int]
    attention: str
    seconds: float
    text: str
    collectives: list[Collective]
    work: Work
    roofline: Roofline | None


class Plan(NamedTuple):
    """The plan of a run.

    Attributes:
      config: the run's config.
      parameters: number of parameters of the model.
      trained: number of trained parameters: of the model, or of its adapters.
      shape: layout of a batch.
      memory: bytes on each device.
      mesh: the size of each axis.
      compiled: by a target's compiler; None for a plan on JAX's own devices.
    """

    config: Config
    parameters: int
    trained: int
    shape: pack.Layout
    memory: Memory
    mesh: MeshConfig
    compiled: Compiled | None = None


class Lowered(NamedTuple):
    """A step that is ready to be compiled.

    Attributes:
      run: with shapes in place of parameters, and the attention backend of the devices.
      loss: its objective.
      mesh: of JAX's devices or of a target's.
      groups: of fast links, for each device of the mesh.
      note: a message about the attention backend.
      shape: layout of a batch.
      trained: shardings of the trained parameters.
      state, batch, base: arguments of the step, as shapes with shardings; the base of adapters is None without them.
      step: from `jit(...).lower`.
    """

    run: Run
    loss: losses.Loss
    mesh: Any
    groups: list[int]
    note: str
    shape: pack.Layout
    trained: Any
    state: Any
    batch: Any
    base: Any
    step: Any


def planned_platform(target: Target | None) -> str:
    """Returns "tpu" or "gpu", the platform of a target or of JAX's devices; "" for CPUs, which may emulate others."""
    platform = jax.default_backend() if target is None else target.platform
    return "" if platform == "cpu" else platform


def lower_step(config: Config, target: Target | None, sync: Sync | None = None) -> Lowered:
    """Returns the train step of a run for JAX's devices or a target's; `sync` is how its reference follows it."""
    # CPUs that emulate devices would add a float32 copy of a bfloat16 base, so the step is compiled with a float32 one.
    run, loss, note = abstract_run(config, narrow=target is not None, sync=sync), losses.build(config.loss), ""
    mesh, groups = planned_mesh(config, target)
    if platform := planned_platform(target):
        compute = compute_dtype(config.model)
        model, note = planned_attention(run.model, config.model.attention, compute, mesh, platform)
        run = run._replace(model=model)
    tx = optim.build(**config.optim)
    shape = plan_layout(config, sharding.row_devices(mesh), sharding.token_devices(mesh))
    trained, abstract = state_shardings(run, tx, mesh)
    shardings = policy_shardings(run, mesh, trained)
    base = None if shardings.base is None else sharded_shapes(run.base, shardings.base)
    batch = jax.tree.map(
        partial(sharded_shape, where=sharding.batch_sharding(mesh)),
        abstract_batch(shape, planned_responses(config, loss)),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    step = compiled_step(run, shardings, abstract).lower(abstract, batch, count, base, hparams(config))
    return Lowered(run, loss, mesh, groups, note, shape, trained, abstract, batch, base, step)


def plan_run(config: Config, target: Target | None = None) -> Plan:
    """Returns the plan of a run on JAX's devices, or on a target's. Reads a config.json, no weights and no data.

    Raises:
      UserError: invalid options, or a compiler that is not installed.
    """
    config = dataclasses.replace(config, optim=optim.with_total_steps(config.optim, config.max_steps or LONG_RUN))
    lowered = lower_step(config, target, make_sync(config, losses.build(config.loss)))
    check_length(config, lowered.run.model)
    start = time.perf_counter()
    program = compile_step(lowered.step)
    seconds = time.perf_counter() - start
    run, state, base = lowered.run, lowered.state, lowered.base
    online = lowered.loss.uses_reference and config.reference.mode == "online"
    frozen = state.params if base is None and online else None
    if base is not None:  # in the dtype of its files
        frozen = sharded_shapes(abstract_run(config).base, jax.tree.map(lambda x: x.sharding, base))
    permanent = tuple(map(bytes_per_device, (state.params, frozen, state.opt_state)))
    gradients = bytes_per_device(sharded_shapes(run.params, lowered.trained))
    outputs, rows = 1 if lowered.loss.rewards else run.model.architecture.vocab, sharding.row_devices(lowered.mesh)
    logits = 2 * 4 * min(CHUNK, lowered.shape.rows * lowered.shape.scored) * outputs // rows
    batch = bytes_per_device(lowered.batch)
    memory = _memory(permanent, gradients, logits, batch, program, own=base is None, platform=planned_platform(target))
    compiled = None
    if target is not None:
        twice = lowered.loss.whole_batch or run.model.router_loss > 0
        passes = Passes(base is not None, recomputed(config.model), int(online) + int(twice))
        compiled = _compiled(config, target, lowered, program, passes, memory)._replace(seconds=seconds)
    full = jax.eval_shape(run.model.init, jax.eval_shape(jax.random.key, 0))
    counts, mesh = (count_parameters(full), count_parameters(run.params)), MeshConfig(**lowered.mesh.shape)
    return Plan(config, *counts, lowered.shape, memory, mesh, compiled)


def compile_step(lowered: Any) -> Any:
    """Returns the compiled program, or the bytes that it would need if the compiler refuses it for that."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        need = re.search(r"Used ([\d.]+)([KMGT]) of", str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or need is None:
            raise
        return int(float(need[1]) * 1024 ** (1 + "KMGT".index(need[2])))


def temporary_bytes(found: Any, platform: str) -> int:
    """Returns the temporary memory of a compiled step, from its `memory_analysis`.

    Of a TPU's program it is what the peak leaves beside the arguments: `temp_size_in_bytes` was up to 4 GiB above the
    heap in the compiler's own report, the peak within 0.05 GiB of it (scripts/README.md, Memory of the compiled step).
    """
    if platform != "tpu" or found.peak_memory_in_bytes <= 0:
        return found.temp_size_in_bytes
    return min(found.temp_size_in_bytes, max(0, found.peak_memory_in_bytes - found.argument_size_in_bytes))


def _memory(
    permanent: tuple[int, ...], gradients: int, logits: int, batch: int, program: Any, *, own: bool, platform: str = ""
) -> Memory:
    """Returns the memory by kind, of a program or of the bytes that it would need.

    Args:
      permanent: bytes of trained parameters, frozen parameters and optimizer state.
      gradients, logits, batch: bytes.
      program: from `compile_step`.
      own: whether what is frozen, if anything, is no argument of the step.
      platform: of the target; "" for JAX's devices.
    """
    trained, frozen, optimizer = permanent
    arguments = trained + optimizer + batch + (0 if own else frozen)
    if isinstance(program, int):
        temporary, other = max(0, program - arguments), 0
    else:
        found = program.memory_analysis()
        temporary, code = temporary_bytes(found, platform), found.generated_code_size_in_bytes
        padding = max(0, found.argument_size_in_bytes - arguments)
        other = padding + code + max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    return Memory(
        trained, frozen, optimizer, min(gradients, temporary), min(logits, max(0, temporary - gradients)),
        max(0, temporary - gradients - logits), batch, other,
    )  # fmt: skip


def _compiled(
    config: Config, target: Target, lowered: Lowered, program: Any, passes: Passes, memory: Memory
) -> Compiled:
    """Returns what the plan of a target has beside memory; its `seconds` are to be filled in."""
    mesh, shape = lowered.mesh, lowered.shape
    work = step_work(
        lowered.run.model.architecture, shape, passes, state=memory.trained + memory.optimizer,
        gradients=memory.gradients, itemsize=jnp.dtype(compute_dtype(config.model)).itemsize, devices=mesh.size,
        split=sharding.head_devices(mesh),
    )  # fmt: skip
    text = "" if isinstance(program, int) else program.as_text()
    rows = shape.rows // sharding.row_devices(mesh)
    chunks = math.ceil(shape.scored / max(1, min(CHUNK // max(1, rows), shape.scored)))
    # A step of one microbatch has no loop over them; that over chunks of the head is as long as the row that has most.
    trips = (shape.microbatches, chunks) if shape.microbatches > 1 else (chunks,)
    slices = target.slices if target.platform == "tpu" else 1  # a program for GPUs is that of all of them
    found = collectives(text, trips, slices, mesh.size) if text else []
    bound = roofline(work, found, target.chip, lowered.groups) if text else None
    return Compiled(target, dict(mesh.shape), lowered.groups, lowered.note, 0.0, text, found, work, bound)


def fitting_plan(config: Config, memory: float, target: Target | None = None) -> Plan:
    """Returns the plan of a run on JAX's devices or a target's.

    With `model.remat: auto` it is that of the fastest that fits in `memory` bytes, or of full.

    Raises:
      UserError: invalid options.
    """
    *faster, last = ("none", "dots", "full") if config.model.remat == "auto" else (config.model.remat,)
    for remat in faster:
        if target is not None and least_activations(config, target) > memory:
            continue  # compiling takes minutes
        try:
            plan = plan_run(_with_model(config, remat=remat), target)
        except jax.errors.JaxRuntimeError as e:  # a TPU's compiler refuses what does not fit
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            continue
        if plan.memory.total <= memory:
            return plan
    return plan_run(_with_model(config, remat=last), target)


def least_activations(config: Config, target: Target | None) -> int:
    """Returns bytes on each device that the backward pass needs from the forward pass unless remat is full.

    They are the inputs and outputs of attention, and what goes into the MLP and its activation, of each layer.
    """
    a, (mesh, _) = abstract_run(config).model.architecture, planned_mesh(config, target)
    shape = plan_layout(config, sharding.row_devices(mesh), sharding.token_devices(mesh))
    itemsize = jnp.dtype(compute_dtype(config.model)).itemsize
    inner = (2 if a.gated else 1) * a.mlp * (a.mixture.chosen if a.mixture else 1)
    split = (2 * a.heads + 2 * a.kv_heads) * a.head_dim + inner
    tokens = shape.rows * shape.length // (sharding.row_devices(mesh) * sharding.token_devices(mesh))
    return itemsize * a.layers * tokens * (a.width + split // sharding.head_devices(mesh))


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
