"""What a run needs of each device, before anything of it exists: its step is compiled for shapes alone."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import losses, optim, sharding
from dpo_jax.commands.common import leading_arguments, log_line
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
from dpo_jax.training.load import load_adapters_config
from dpo_jax.training.run import Run
from dpo_jax.training.shard import policy_shardings, state_shardings
from dpo_jax.training.tables import responses_per_prompt

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
    shape: pack.Layout
    memory: Memory


def plan_run(config: Config) -> Plan:
    """Returns what a run needs on the devices that JAX sees; reads a config.json, no weights and no data.

    Raises:
      UserError: settings that no run can have.
    """
    # The processors that stand for devices would make a wide copy of a narrow base, so it is wide in what is compiled.
    run, loss = traced_step(config, narrow=False), losses.build(config.loss)
    setup.check_length(config, run.model)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tx, shape = optim.build(**config.optim), plan_layout(config, sharding.row_devices(mesh))
    trained, abstract = state_shardings(run, tx, mesh)
    shardings = policy_shardings(run, mesh, trained)
    base = None if shardings.base is None else lay_out(run.base, shardings.base)
    batch = jax.tree.map(
        partial(place_shapes, where=sharding.batch_sharding(mesh)),
        abstract_batch(shape, planned_responses(config, loss)),
    )
    count_of = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = compiled_step(run, shardings, abstract).lower(abstract, batch, count_of, base, hparams(config)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    gradients = bytes_per_device(lay_out(run.params, trained))
    columns = 1 if loss.rewards else run.model.architecture.vocab
    logits = 2 * 4 * min(CHUNK, shape.rows * shape.scored) * columns // sharding.row_devices(mesh)
    frozen = None if shardings.base is None else lay_out(traced_step(config).base, shardings.base)
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
    whole = jax.eval_shape(run.model.init, jax.eval_shape(jax.random.key, 0))
    return Plan(config, count_collectives(whole), count_collectives(run.params), shape, memory)


def state_bytes(config: Config) -> int:
    """Returns the bytes that each device holds of what is trained and its optimiser; compiles nothing."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return bytes_per_device(state_shardings(traced_step(config), optim.build(**config.optim), mesh)[1])


def traced_step(config: Config, narrow: bool = True) -> Run:
    """Returns a run that has shapes for parameters, and no data.

    Args:
      config: the run's.
      narrow: whether the floats of a base under adapters are as wide as in its files.
    """
    path = config.model.path
    source = config.model.config or (hub_config_file(path) if is_hub_name(path) else model_folder(path))
    hf_config, loss = read_config(source), losses.build(config.loss)
    architecture = architecture_of(hf_config)
    architecture = reward_head.as_reward_architecture(architecture) if loss.rewards else architecture
    model = build_model(architecture, compute=config.model.compute, remat=config.model.remat)
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    adapters, kind = load_adapters_config(config.lora, architecture, 0)
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
        params=params if kind is None else adapters, frozen=None, train=none, held_out=none, complete=None, prompts=[],
        export=none, base=None if kind is None else params, lora=kind,
    )  # fmt: skip


def plan_layout(config: Config, devices: int) -> pack.Layout:
    """Returns the layout of a batch whose rows are full: as set, or rows of 2 * max_length in microbatches of 4096."""
    length = config.data.row_length or 2 * config.data.max_length
    rows = config.data.rows or devices * max(1, TOKENS // length)
    segments = min(config.batch_size, max(1, length // 64))
    return pack.Layout(math.ceil(config.batch_size / rows), rows, length, segments, length)


def planned_responses(config: Config, loss: losses.Loss) -> int:
    """Returns P of a batch."""
    return responses_per_prompt(config, loss) + loss.mismatched


def abstract_batch(shape: pack.Layout, responses: int) -> Batch:
    """Returns the shapes of a batch."""
    lead = (shape.microbatches, shape.rows)
    ints, floats = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    row, scored, places = (*lead, shape.length), (*lead, shape.scored), (*lead, shape.segments)
    answers = (*places, responses)
    fields = [ints(row)] * 4 + [ints(scored)] * 3 + [floats(places)] * 2 + [floats(answers), floats((*answers, 2))]
    return Batch(*fields)


def place_shapes(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array that lies somewhere."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def lay_out(tree: Any, where: Any) -> Any:
    """Returns the shapes of a tree of arrays that lie somewhere."""
    return jax.tree.map(place_shapes, tree, where)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def count_collectives(tree: Any) -> int:
    """Returns how many numbers a tree has."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def plan_advice(plan: Plan, memory: int) -> list[str]:
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


def resolve_devices(config: Config) -> Config:
    """Returns the config with the model that training starts from, where that is another run's YAML.

    Raises:
      UserError: the model is neither named there.
    """
    path = config.model.path
    if not path.endswith((".yaml", ".yml")):
        return config
    start = parse_config(Config, path, [], prog="dpo-jax plan")
    if not start.model.path and not start.model.config:
        raise UserError(f"{path}: names no model.path or model.config")
    model = dataclasses.replace(config.model, path=start.model.path, config=start.model.config)
    return resolve_devices(dataclasses.replace(config, model=model))


def plan_command(argv: list[str]) -> None:
    """`dpo-jax plan CONFIG.yaml [--devices N] [--memory GB] [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "plan", "CONFIG.yaml")
    settings = parse_config(PlanConfig, file or None, rest, prog="dpo-jax plan CONFIG.yaml")
    if settings.devices:  # processors stand for them: the compiler needs no more than their number
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.devices)
    made = plan_run(resolve_devices(settings))
    grid = Grid("on each device", "GB")
    for name, value in (*made.memory._asdict().items(), ("together", made.memory.total)):
        grid.add_row(name, f"{value / GB:.2f}")
    Console().print(grid)
    log_line(
        f"{made.parameters:,} parameters, {made.trained:,} of them trained; {jax.device_count()} device(s); up to "
        f"{made.shape.microbatches} microbatches of {made.shape.rows} rows x {made.shape.length} tokens"
    )
    if settings.model.attention not in ("auto", CHUNKS):
        log_line(f"model.attention: {settings.model.attention} cannot be planned with; the memory is that of {CHUNKS}")
    lines = plan_advice(made, int(settings.memory * GB))
    share = made.memory.total / (settings.memory * GB)
    log_line(
        f"{share:.0%} of {settings.memory:g} GB" + (": it does not fit; what would help:" if lines else ": it fits")
    )
    for line in lines:
        log_line(f"  {line}")
