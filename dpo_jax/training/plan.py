"""What a run needs on each device: compiles its programs for shapes and allocates no arrays."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import losses, optim, sharding
from dpo_jax.config.schema import Config, MeshConfig
from dpo_jax.paths import is_run
from dpo_jax.training.abstract import (
    abstract_run,
    bytes_per_device,
    count_parameters,
    sharded_shapes,
)
from dpo_jax.training.checks import LONG_RUN, check_length, make_sync, with_compute, with_model
from dpo_jax.training.fit import GB, Room, device_memory, least_activations
from dpo_jax.training.load import compute_dtype, recomputed
from dpo_jax.training.lower import (
    Planned,
    TooLarge,
    compile_program,
    compiled_run,
    head_chunks,
    keeps_reference,
    logits_bytes,
    lower_reference,
    lower_sampling,
    planned_platform,
    planned_run,
    reference_shapes,
    temporary_bytes,
)
from dpo_jax.training.plan_records import Compiled, Memory, Pass, Plan
from dpo_jax.training.program import collectives
from dpo_jax.training.roofline import Passes, roofline, step_work
from dpo_jax.training.run_folder import run_config
from dpo_jax.training.shard import policy_shapes
from dpo_jax.training.targets import Target

log = logging.getLogger(__name__)


def plan_run(config: Config, target: Target | None = None) -> Plan:
    """Returns the plan of a run's step on JAX's devices, or on a target's. Reads a config.json, no weights and no data.

    Raises:
      UserError: invalid options, or a compiler that is not installed.
    """
    config = dataclasses.replace(config, optim=optim.with_total_steps(config.optim, config.max_steps or LONG_RUN))
    start, sync = time.perf_counter(), make_sync(config, losses.build(config.loss))
    check_length(config, abstract_run(config).model)
    planned, program = compiled_run(config, target, sync)
    seconds = time.perf_counter() - start
    run, state, base = planned.run, planned.state, planned.base
    frozen = state.params if base is None and keeps_reference(config, planned.loss) else None
    if base is not None:  # in the dtype of its files
        frozen = sharded_shapes(abstract_run(config).base, jax.tree.map(lambda x: x.sharding, base))
    known = Memory(
        *map(bytes_per_device, (state.params, frozen, state.opt_state)),
        gradients=bytes_per_device(sharded_shapes(run.params, planned.shardings.trained)),
        logits=logits_bytes(planned), activations=0, batch=bytes_per_device(planned.batch),
    )  # fmt: skip
    arguments = known.trained + known.optimizer + known.batch + (0 if base is None else known.frozen)
    memory = _with_temporary(known, *_needs(program, arguments, planned_platform(target)))
    compiled = None if target is None else _compiled(target, planned, program, memory)._replace(seconds=seconds)
    full = jax.eval_shape(run.model.init, jax.eval_shape(jax.random.key, 0))
    counts, mesh = (count_parameters(full), count_parameters(run.params)), MeshConfig(**planned.mesh.shape)
    return Plan(config, *counts, planned.shape, memory, mesh, compiled)


def _needs(program: Any, arguments: int, platform: str) -> tuple[int, int]:
    """Returns the temporary memory of a program in bytes, and the other memory beside its arguments.

    Args:
      program: from `compile_program`.
      arguments: bytes of its arguments without padding.
      platform: of the target; "" for JAX's devices.
    """
    if isinstance(program, TooLarge):
        return max(0, program.bytes - arguments * program.arguments), 0
    found = program.memory_analysis()
    padding, results = found.argument_size_in_bytes - arguments, found.output_size_in_bytes - found.alias_size_in_bytes
    return temporary_bytes(found, platform), max(0, padding) + max(0, results) + found.generated_code_size_in_bytes


def _with_temporary(known: Memory, temporary: int, other: int) -> Memory:
    """Returns the memory of a step: what is temporary has gradients, then logits; the rest are activations."""
    gradients = min(known.gradients, temporary)
    logits = min(known.logits, temporary - gradients)
    activations = temporary - gradients - logits
    return known._replace(gradients=gradients, logits=logits, activations=activations, other=other)


def with_passes(plan: Plan, target: Target, room: Room) -> Plan:
    """Returns a target's plan with the programs that the run has beside its step: the reference's pass, and sampling.

    Whether sampling gathers all parameters at once depends on the memory of a device, `room`. The reference's log-probs
    of the data are computed before there is a training state, unless they are online.
    """
    assert plan.compiled is not None
    config, step = with_model(plan.config, attention=plan.compiled.kernel), plan.memory
    planned = planned_run(config, target, make_sync(config, losses.build(config.loss)))
    training = Memory(step.trained, step.frozen, step.optimizer, 0, 0, 0, 0, bytes_per_device(planned.state.reference))
    found = []

    def add(name: str, lowered: Any, resident: Memory, arguments: int) -> None:
        start = time.perf_counter()
        temporary, other = _needs(compile_program(lowered), arguments, target.platform)
        memory = resident._replace(activations=temporary, other=resident.other + other)
        found.append(Pass(name, memory, time.perf_counter() - start))

    if planned.loss.uses_reference:
        frozen = bytes_per_device(reference_shapes(planned))
        first = training if keeps_reference(config, planned.loss) else Memory(0, frozen, 0, 0, 0, 0, 0)
        add("reference", lower_reference(planned), first._replace(batch=step.batch), frozen + step.batch)
    if (sampling := lower_sampling(planned, room.taken)) is not None:
        # Its other arguments are the parameters as decoding reads them, which are made for it.
        add("sampling", sampling, training, bytes_per_device(policy_shapes(planned.run, planned.shardings)["layers"]))
    return plan._replace(passes=tuple(found))


def _compiled(target: Target, planned: Planned, program: Any, memory: Memory) -> Compiled:
    """Returns what the plan of a target has beside memory; its `seconds` are to be filled in."""
    mesh, shape, config = planned.mesh, planned.shape, planned.run.config
    online = planned.loss.uses_reference and config.reference.mode == "online"
    twice = planned.loss.whole_batch or planned.run.model.router_loss > 0
    extra = int(online) + int(twice)
    work = step_work(
        planned.run.model.architecture, shape, Passes(planned.base is not None, recomputed(config.model), extra),
        state=memory.trained + memory.optimizer, gradients=memory.gradients,
        itemsize=jnp.dtype(compute_dtype(config.model)).itemsize, devices=mesh.size, split=sharding.head_devices(mesh),
        experts=sharding.expert_devices(mesh),
    )  # fmt: skip
    text = "" if isinstance(program, TooLarge) else program.as_text()
    chunks = head_chunks(shape, mesh)[2]
    # A step of one microbatch has no loop over them; that over chunks of the head is as long as the row that has most.
    trips = (shape.microbatches, chunks) if shape.microbatches > 1 else (chunks,)
    slices = target.slices if target.platform == "tpu" else 1  # a program for GPUs is that of all of them
    found = collectives(text, mesh.size, trips, slices) if text else []
    speed = roofline(work, found, target.chip, planned.groups) if text else None
    kernel = planned.run.model.attention
    return Compiled(target, dict(mesh.shape), planned.groups, planned.note, kernel, 0.0, text, found, work, speed)


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
            plan = plan_run(with_model(config, remat=remat), target)
        except jax.errors.JaxRuntimeError as e:  # a TPU's compiler refuses what does not fit
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            continue
        if plan.memory.total <= memory:
            return plan
    return plan_run(with_model(config, remat=last), target)


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
        return with_model(config, remat=begun)
    memory = memory or device_memory()
    if not memory:
        if (platform or jax.default_backend()) != "cpu":
            log.info("model.remat: none; the device does not say how much memory it has, so set dots or full if needed")
        return config
    plan = fitting_plan(with_compute(config, platform), Room(memory).usable)
    log.info(
        f"model.remat: {plan.config.model.remat}, whose plan takes {plan.memory.total / GB:.3g} of "
        f"{Room(memory)}, on a device"
    )
    return dataclasses.replace(config, model=plan.config.model)
