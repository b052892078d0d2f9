"""`dpo-jax plan`: the memory that a run needs on each device. Compiles its step for shapes; allocates no arrays."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import losses, optim, sharding
from dpo_jax.commands.common import leading_arguments, log_line, print_table
from dpo_jax.config.commands import PlanConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data import pack
from dpo_jax.errors import UserError
from dpo_jax.logprobs import CHUNK
from dpo_jax.models import qlora, reward_head
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.huggingface.folder import model_folder, read_config
from dpo_jax.models.huggingface.hub import hub_config_file, is_hub_name
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.models.model import build_model
from dpo_jax.records import Batch
from dpo_jax.training import setup
from dpo_jax.training.compile import compiled_step, hparams
from dpo_jax.training.load import initial_adapters
from dpo_jax.training.run import Run
from dpo_jax.training.shard import policy_shardings, state_shardings
from dpo_jax.training.tables import responses_per_prompt

GB = 2**30
TOKENS = 4096  # per device and microbatch, if data.rows is not set


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
    config = dataclasses.replace(config, optim=optim.with_total_steps(config.optim, config.max_steps or setup.LONG_RUN))
    # CPUs that emulate devices would add a float32 copy of a bfloat16 base, so the step is compiled with a float32 one.
    run, loss = abstract_run(config, narrow=False), losses.build(config.loss)
    setup.check_length(config, run.model)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tx, shape = optim.build(**config.optim), plan_layout(config, sharding.row_devices(mesh))
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
    model = build_model(architecture, compute=config.model.compute, remat=config.model.remat)
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
        config=config, folder=none, lock=none, cache=none, model=model, loss=loss, sync=setup.make_sync(config, loss),
        params=params if kind is None else adapters, load_reference=None, train_table=none, eval_table=none,
        complete=None, prompts=[], export=none, base=None if kind is None else params, lora=kind,
    )  # fmt: skip


def plan_layout(config: Config, devices: int) -> pack.Layout:
    """Returns the layout of a batch of full rows; by default rows of 2 * max_length tokens, `TOKENS` per device."""
    length = config.data.row_length or 2 * config.data.max_length
    rows = config.data.rows or devices * max(1, TOKENS // length)
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


def plan_advice(plan: Plan, memory: int) -> list[str]:
    """Returns changes that help a run fit into `memory` bytes per device, most effective first; [] if it fits.

    Parameters and optimizer state shrink by more sharding or by adapters; activations by recomputing them or by fewer
    rows per microbatch.
    """
    config, need = plan.config, plan.memory
    if need.total <= memory:
        return []
    permanent = need.trained + need.frozen + need.optimizer + need.gradients
    lines = []
    if permanent > 0.6 * memory:
        times = 2 ** math.ceil(math.log2(permanent / (0.6 * memory)))
        lines.append(f"mesh.fsdp {config.mesh.fsdp * times}: shards parameters over {times} times as many devices")
        if not config.lora.rank and not config.lora.path:
            lines.append("lora.rank 16: only adapters need gradients and optimizer state; the base is the reference")
        elif not config.lora.base:
            lines.append("lora.base nf4: stores the base's projections in 4 bits per number, plus a scale per 64")
    if config.reference.mode == "online" and need.frozen:
        lines.append("reference.mode cache: keeps no second model in memory during training")
    stronger = {"none": "dots", "dots": "full"}.get(config.model.remat)
    if stronger and need.activations > 0.1 * memory:
        lines.append(f"model.remat {stronger}: recomputes more activations in the backward pass and keeps fewer")
    local_rows = plan.shape.rows // max(1, jax.device_count() // config.mesh.tensor)
    if local_rows > 1 and need.activations > 0.1 * memory:
        lines.append(f"data.rows {plan.shape.rows // local_rows}: one row per device at a time instead of {local_rows}")
    return lines or ["data.max_length: lower it, or use devices with more memory"]


def resolve_base_model(config: Config) -> Config:
    """Returns the config with the model of the first run, if model.path is the YAML of a run.

    Raises:
      UserError: that YAML names no model.
    """
    path = config.model.path
    if not path.endswith((".yaml", ".yml")):
        return config
    base = parse_config(Config, path, [], prog="dpo-jax plan")
    if not base.model.path and not base.model.config:
        raise UserError(f"{path}: names no model; set model.path or model.config")
    model = dataclasses.replace(config.model, path=base.model.path, config=base.model.config)
    return resolve_base_model(dataclasses.replace(config, model=model))


def plan_command(argv: list[str]) -> None:
    """Runs `dpo-jax plan CONFIG.yaml [--devices N] [--memory GB] [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "plan", "CONFIG.yaml")
    settings = parse_config(PlanConfig, file or None, rest, prog="dpo-jax plan CONFIG.yaml")
    if not 0 < settings.memory < math.inf or settings.devices < 0:
        raise UserError("--memory must be a finite number of GB above 0, --devices at least 0; change them")
    if settings.devices:  # the compiler needs only their number, so CPUs emulate them
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.devices)
    plan = plan_run(resolve_base_model(settings))
    parts = (*plan.memory._asdict().items(), ("total", plan.memory.total))
    print_table(("on each device", "GB"), [(name, f"{value / GB:.2f}") for name, value in parts])
    log_line(
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; {jax.device_count()} device(s); at most "
        f"{plan.shape.microbatches} microbatches of {plan.shape.rows} rows x {plan.shape.length} tokens"
    )
    if settings.max_steps and (note := optim.warmup_note(plan.config.optim, settings.max_steps)):
        log_line(note)
    if settings.model.attention not in ("auto", CHUNKS):
        log_line(f"model.attention: {settings.model.attention} is not planned for; the memory is that of {CHUNKS}")
    lines = plan_advice(plan, int(settings.memory * GB))
    share = plan.memory.total / (settings.memory * GB)
    log_line(f"{share:.0%} of {settings.memory:g} GB" + (": does not fit; set one or more of:" if lines else ": fits"))
    for line in lines:
        log_line(f"  {line}")
