"""The programs of a run, lowered for shapes and compiled: its step, the reference's pass, and sampling."""

import dataclasses
import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import losses, optim, reference, sharding
from dpo_jax.config.schema import Config
from dpo_jax.data import pack
from dpo_jax.errors import UserError
from dpo_jax.logprobs import CHUNK, batch_logps
from dpo_jax.models.attention import CHUNKS
from dpo_jax.models.split_head import words_per_block
from dpo_jax.records import Sync
from dpo_jax.sampling import PLAIN, lower_generate
from dpo_jax.training.abstract import (
    abstract_batch,
    abstract_run,
    plan_layout,
    planned_mesh,
    sharded_shape,
    sharded_shapes,
)
from dpo_jax.training.attention_check import attempt, in_short, planned_attention, refuse_split
from dpo_jax.training.load import compute_dtype
from dpo_jax.training.run import PolicyShardings, Run, kl_prompt_count
from dpo_jax.training.shard import check_experts, gather_on_use, policy_shapes, policy_shardings, state_shardings
from dpo_jax.training.tables import prompt_length, responses_per_prompt
from dpo_jax.training.targets import Target
from dpo_jax.training.train_step import compiled_step, hparams


class Planned(NamedTuple):
    """A run with shapes in place of arrays, on the mesh of JAX's devices or of a target's.

    Attributes:
      run: with the attention backend of the devices.
      loss: its objective.
      mesh: the device mesh.
      groups: of fast links, for each device of the mesh.
      note: a message about the attention backend.
      shape: layout of a batch.
      shardings: of the policy.
      state, batch, base: arguments of the step, as shapes with shardings; the base of adapters is None without them.
    """

    run: Run
    loss: losses.Loss
    mesh: Any
    groups: list[int]
    note: str
    shape: pack.Layout
    shardings: PolicyShardings
    state: Any
    batch: Any
    base: Any


class TooLarge(NamedTuple):
    """What a program would need that a compiler refuses because it does not fit.

    Attributes:
      bytes: on each device.
      arguments: whether those of its arguments are among them.
    """

    bytes: int
    arguments: bool


def planned_platform(target: Target | None) -> str:
    """Returns "tpu" or "gpu", the platform of a target or of JAX's devices; "" for CPUs, which may emulate others."""
    platform = jax.default_backend() if target is None else target.platform
    return "" if platform == "cpu" else platform


def planned_run(
    config: Config, target: Target | None, sync: Sync | None = None, refused: dict[str, str] | None = None
) -> Planned:
    """Returns a run on JAX's devices or a target's.

    Args:
      config: the run's config.
      target: the devices; None for those of JAX.
      sync: how the reference follows the policy.
      refused: attention kernels with which its step does not compile, and why.
    """
    mesh, groups = planned_mesh(config, target)
    if config.mesh.mode == "pmap":  # planned as jit, under which devices hold the same
        sharding.pmap_collectives(mesh)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, mode="jit"))
    # CPUs that emulate devices would add a float32 copy of a bfloat16 base, so the step is compiled with a float32 one.
    run, loss, note = abstract_run(config, narrow=target is not None, sync=sync), losses.build(config.loss), ""
    refuse_split(run.model.architecture, mesh)
    check_experts(run.model.architecture, mesh)
    if platform := planned_platform(target):
        compute = compute_dtype(config.model)
        model, note = planned_attention(run.model, config.model.attention, compute, mesh, platform, refused or {})
        run = run._replace(model=model)
    shape = plan_layout(config, sharding.row_devices(mesh), sharding.token_devices(mesh))
    trained, state = state_shardings(run, optim.build(**config.optim), mesh)
    shardings = policy_shardings(run, mesh, trained)
    base = None if shardings.base is None else sharded_shapes(run.base, shardings.base)
    batch = jax.tree.map(
        partial(sharded_shape, where=sharding.batch_sharding(mesh)),
        abstract_batch(shape, responses_per_prompt(config, loss) + loss.mismatched),
    )
    return Planned(run, loss, mesh, groups, note, shape, shardings, state, batch, base)


# How a TPU's compiler says what a program would need: in all, or beside its arguments.
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of|HLO temporaries \(([\d.]+)([KMGT])\)")
COUNT = jax.ShapeDtypeStruct((), jnp.int32)  # of microbatches


def lower_step(planned: Planned) -> Any:
    """Returns the lowered train step."""
    step = compiled_step(planned.run, planned.shardings, planned.state)
    return step.lower(planned.state, planned.batch, COUNT, planned.base, hparams(planned.run.config))


def compiled_run(config: Config, target: Target | None, sync: Sync | None = None) -> tuple[Planned, Any]:
    """Returns a run and its compiled step (see `compile_program`), with the first attention kernel that compiles.

    Raises:
      UserError: the kernel that the config names does not compile, or the target's compiler refuses the step.
    """
    refused: dict[str, str] = {}
    while True:
        planned = planned_run(config, target, sync, refused)
        kernel = planned.run.model.attention
        if kernel == CHUNKS:
            return planned, compile_program(lower_step(planned))
        program, error = attempt(lambda planned=planned: compile_program(lower_step(planned)))
        if error is None:
            return planned, program
        if isinstance(error, UserError) or lacks_memory(error):
            raise error
        refused[kernel] = f"does not compile for the {planned_platform(target)} ({in_short(error)})"


def lacks_memory(error: Exception) -> bool:
    """Returns whether a compiler refuses a program because it does not fit in the device's memory."""
    small = ("memory space vmem", "memory space smem")  # which a kernel alone uses
    return "RESOURCE_EXHAUSTED" in str(error) and not any(space in str(error) for space in small)


def compile_program(lowered: Any) -> Any:
    """Returns the compiled program, or what it would need if the compiler refuses it for that.

    Raises:
      JaxRuntimeError: the compiler refuses it for another reason.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        need = _NEEDED.search(str(e))
        if not lacks_memory(e) or need is None:
            raise
        number, unit = need[1] or need[3], need[2] or need[4]
        return TooLarge(int(float(number) * 1024 ** (1 + "KMGT".index(unit))), arguments=need[1] is not None)


def temporary_bytes(found: Any, platform: str) -> int:
    """Returns the temporary memory of a compiled program, from its `memory_analysis`.

    Of a TPU's program it is what the peak leaves beside the arguments: `temp_size_in_bytes` was up to 4 GiB above the
    heap in the compiler's own report, the peak within 0.05 GiB of it (scripts/README.md, Memory of the compiled step).
    """
    if platform != "tpu" or found.peak_memory_in_bytes <= 0:
        return found.temp_size_in_bytes
    return min(found.temp_size_in_bytes, max(0, found.peak_memory_in_bytes - found.argument_size_in_bytes))


def keeps_reference(config: Config, loss: losses.Loss) -> bool:
    """Returns whether the reference's parameters stay on the devices in training: to compute its log-probs of every
    batch, or of the samples for KL."""
    return loss.uses_reference and (config.reference.mode == "online" or kl_prompt_count(config, loss) > 0)


def reference_shapes(planned: Planned) -> Any:
    """Returns the reference's parameters, as shapes with shardings: those of the policy, or of its base."""
    shardings = planned.shardings
    where = shardings.trained if shardings.base is None else shardings.base
    return sharded_shapes(planned.run.params, where) if planned.base is None else planned.base


def lower_reference(planned: Planned) -> Any:
    """Returns the lowered pass of the reference over a batch."""
    params = reference_shapes(planned)
    where = jax.tree.map(lambda x: x.sharding, params)
    collectives = sharding.mesh_collectives(planned.mesh, where)
    logps = partial(batch_logps, gather_on_use(planned.run.model, collectives, where))
    ref_logps: Any = reference.make_ref_logps_fn(logps, collectives)
    return ref_logps.lower(params, planned.batch, COUNT)


def lower_sampling(planned: Planned, memory: float | None = None) -> Any:
    """Returns the lowered program that samples completions at an evaluation; None for a run without samples.

    Prompts have the most tokens that `data.max_prompt_length` allows. `memory` is what JAX takes of a device that is
    not here, in bytes.
    """
    config, loss = planned.run.config, planned.loss
    shown, kl = 0 if loss.rewards else config.samples.prompts, kl_prompt_count(config, loss)
    if not shown + kl:
        return None
    chosen = {} if kl else {name: getattr(config.samples, name) for name in PLAIN}
    architecture, new = planned.run.model.architecture, config.samples.max_new_tokens
    length = max(1, min(prompt_length(config.data), architecture.max_positions - new))
    options = PLAIN | chosen | {"max_new_tokens": new, "eos_id": 0}
    params = policy_shapes(planned.run, planned.shardings)
    return lower_generate(planned.run.model, params, [length] * max(shown, kl), memory=memory, **options)


def logits_bytes(planned: Planned) -> int:
    """Returns the bytes of a chunk of logits on a device, and of its gradient: of a block of words if it is split."""
    a, mesh = planned.run.model.architecture, planned.mesh
    split = planned.shardings.model.split_head is not None
    words = words_per_block(a.vocab, a.width) if split else a.vocab // math.gcd(a.vocab, sharding.head_devices(mesh))
    rows, columns, _ = head_chunks(planned.shape, mesh)
    return 2 * 4 * rows * columns * (1 if planned.loss.rewards else words)


def head_chunks(shape: pack.Layout, mesh: jax.sharding.Mesh) -> tuple[int, int, int]:
    """Returns the rows of a microbatch on a device, the columns of a chunk of logits, and the chunks that it computes.

    A row has the most of them if each of its tokens is scored; devices along `sequence` have an equal part of those.
    """
    rows, scored = shape.rows // sharding.row_devices(mesh), max(1, shape.scored // sharding.token_devices(mesh))
    columns = max(1, min(CHUNK // rows, scored))
    return rows, columns, math.ceil(scored / columns)
