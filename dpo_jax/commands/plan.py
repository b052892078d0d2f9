"""`dpo-jax plan`: the memory that a run needs on each device, and what a target's compiler makes of it."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from dpo_jax import optim
from dpo_jax.commands.common import leading_arguments, log_line, print_table
from dpo_jax.commands.target import plan_record, print_compiled, speed_advice
from dpo_jax.config.commands import PlanConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.models.attention import CHUNKS
from dpo_jax.paths import expand_home
from dpo_jax.training.abstract import with_cpu_rows
from dpo_jax.training.checks import with_model
from dpo_jax.training.fit import GB, Room, device_room
from dpo_jax.training.load import compute_dtype, recomputed
from dpo_jax.training.plan import fitting_plan, plan_run, with_passes
from dpo_jax.training.plan_records import Plan
from dpo_jax.training.targets import Target, check_compiler, parse_target

log = logging.getLogger(__name__)
LONG_ROW = 4096  # tokens; shorter ones are not worth to be shared by devices
NAMES = {"step": "the step", "reference": "the reference's pass", "sampling": "sampling"}


def plan_advice(plan: Plan, memory: int) -> list[str]:
    """Returns changes that help a run fit into `memory` bytes per device, most effective first; [] if it fits.

    Parameters and optimizer state shrink by more sharding or by adapters; activations by recomputing them or by fewer
    rows per microbatch.
    """
    config, need = plan.config, plan.memory
    passes = _pass_advice(plan, memory)
    if need.total <= memory:
        return passes
    permanent = need.trained + need.frozen + need.optimizer + need.gradients
    lines = []
    if permanent > 0.6 * memory:
        times = 2 ** math.ceil(math.log2(permanent / (0.6 * memory)))
        lines.append(f"mesh.fsdp {plan.mesh.fsdp * times}: shards parameters over {times} times as many devices")
        if not config.lora.rank and not config.lora.path:
            lines.append("lora.rank 16: only adapters need gradients and optimizer state; the base is the reference")
        elif not config.lora.base:
            lines.append("lora.base nf4: stores the base's projections in 4 bits per number, plus a scale per 64")
    if config.reference.mode == "online" and need.frozen:
        lines.append("reference.mode cache: keeps no second model in memory during training")
    elif need.frozen and not (config.lora.rank or config.lora.path):
        lines.append("samples.kl_prompts 0: keeps no reference in memory during training; there is then no eval_kl")
    stronger = {"none": "dots", "dots": "full"}.get(recomputed(config.model))
    if stronger and need.activations > 0.1 * memory:
        lines.append(f"model.remat {stronger}: recomputes more activations in the backward pass and keeps fewer")
    row_devices = plan.mesh.data * plan.mesh.fsdp * plan.mesh.expert
    local_rows = plan.shape.rows // row_devices
    if local_rows > 1 and need.activations > 0.1 * memory:
        lines.append(f"data.rows {plan.shape.rows // local_rows}: one row per device at a time instead of {local_rows}")
    if local_rows <= 1 and plan.shape.length >= LONG_ROW and need.activations > 0.3 * memory:
        lines.append(f"mesh.sequence {2 * plan.mesh.sequence}: shards the tokens of each row over as many devices")
    return [*(lines or ["data.max_length: lower it, or use devices with more memory"]), *passes]


def _pass_advice(plan: Plan, memory: int) -> list[str]:
    """Returns changes that help the programs beside the step fit into `memory` bytes per device."""
    large, lines = {one.name for one in plan.passes if one.memory.total > memory}, []
    if "sampling" in large:
        keys = "samples.prompts 0" + (" and samples.kl_prompts 0" if plan.config.samples.kl_prompts else "")
        lines.append(f"{keys}: samples nothing in training, which takes a whole copy of the parameters on a device")
        lines.append(f"mesh.tensor {2 * plan.mesh.tensor}: shards the parameters that sampling gathers over mesh.fsdp")
    if "reference" in large and plan.memory.total <= memory:
        rows = plan.mesh.data * plan.mesh.fsdp * plan.mesh.expert
        lines.append(f"data.rows {rows}: one row per device at a time, in the pass of the reference too")
    return lines


def resolve_base_model(config: Config, file: str = "") -> Config:
    """Returns the config with the model of the first run, if model.path is the YAML of a run.

    So it is if model.path is a run folder that does not exist yet, and its YAML stands beside `file`, the config's own.

    Raises:
      UserError: that YAML names no model.
    """
    path = config.model.path
    stage = Path(file).with_name(f"{Path(path).name}.yaml") if file and path else None
    if stage is not None and stage.is_file() and not (config.model.config or expand_home(path).exists()):
        log.info(f"{path} does not exist yet; planned with the model of {stage}")
        path = str(stage)
    if not path.endswith((".yaml", ".yml")):
        return config
    base = parse_config(Config, path, [], prog="dpo-jax plan")
    if not base.model.path and not base.model.config:
        raise UserError(f"{path}: names no model; set model.path or model.config")
    return resolve_base_model(with_model(config, path=base.model.path, config=base.model.config), path)


def plan_command(argv: list[str]) -> None:
    """Runs `dpo-jax plan CONFIG.yaml [--target T | --devices N] [--memory GB] [--json] [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "plan", "CONFIG.yaml")
    settings = parse_config(PlanConfig, file or None, rest, prog="dpo-jax plan CONFIG.yaml")
    _check_options(settings)
    target = parse_target(settings.target) if settings.target else None
    if target is not None:
        check_compiler(target)
    if settings.devices or target:  # the compiler needs no device
        jax.config.update("jax_platforms", "cpu")
    if settings.devices:
        jax.config.update("jax_num_cpu_devices", settings.devices)
    config = resolve_base_model(settings, file)
    memory = settings.memory and settings.memory * GB
    room = device_room(target, memory, emulated=settings.devices > 0)
    if settings.devices or target or jax.default_backend() != "cpu":  # emulated devices stand for accelerators
        config = with_model(config, compute=compute_dtype(config.model, "gpu"))
        plan = _planned(config, room, target, settings)
    else:
        plan = plan_run(with_cpu_rows(config))
    advice = plan_advice(plan, int(room.usable))
    if settings.json:
        log_line(json.dumps(plan_record(plan, room, advice)))
    else:
        _print_plan(plan, settings, room, advice)


def _check_options(settings: PlanConfig) -> None:
    """Refuses options of `dpo-jax plan` that make no sense, or not together."""
    if not 0 < (settings.memory or 80.0) < math.inf or settings.memory == 0 or settings.devices < 0:
        raise UserError("--memory must be a finite number of GB above 0, --devices at least 0; change them")
    if settings.target and settings.devices:
        raise UserError("--devices: the target says how many there are; remove it")
    if (settings.json or settings.step_only) and not settings.target:
        key = "--json" if settings.json else "--step_only"
        raise UserError(f"{key}: is for a plan with --target; set that too")


def _print_plan(plan: Plan, settings: PlanConfig, room: Room, advice: Sequence[str]) -> None:
    """Prints memory, what a target's compiler made of the step, the verdict and advice."""
    _print_memory(plan)
    if note := warmup_needs(plan.config, settings.max_steps):
        log_line(note)
    if plan.compiled is not None:
        print_compiled(plan.compiled, plan.passes)
    elif settings.model.attention not in ("auto", CHUNKS):
        log_line(f"model.attention: {settings.model.attention} is not planned for; the memory is that of {CHUNKS}")
    log_line(f"model.compute: {compute_dtype(plan.config.model)}, model.remat: {recomputed(plan.config.model)}")
    log_line(verdict(plan, room) + (": does not fit; set one or more of:" if advice else ": fits"))
    for line in advice or ([] if plan.compiled is None else speed_advice(plan.compiled)):
        log_line(f"  {line}")


def verdict(plan: Plan, room: Room) -> str:
    """Returns which part of the memory that it may take a plan takes, and in which program."""
    name, need = plan.largest
    part = need.total / room.usable
    share = f"{part:.0%}" if part >= 0.01 else f"{100 * part:.1g}%"
    return f"{share} of {room}" + (f", in {NAMES[name]}" if plan.passes else "")


def _planned(config: Config, room: Room, target: Target | None, settings: PlanConfig) -> Plan:
    """Returns the plan of an accelerator; of a target with all programs of the run, or the step alone."""
    try:
        plan = fitting_plan(config, room.usable, target)
        return plan if target is None or settings.step_only else with_passes(plan, target, room)
    except jax.errors.JaxRuntimeError as e:
        where = settings.target or "this device"
        raise UserError(f"the compiler for {where} refuses the program: {str(e).splitlines()[0]}") from e


def warmup_needs(config: Config, steps: int | None) -> str:
    """Returns what the warm-up asks of the run's length, which is known with `max_steps` only; "" for nothing."""
    if steps:
        return optim.warmup_note(config.optim, steps)
    warmup = config.optim.get("warmup_steps", -1)
    needed = f"{warmup * config.batch_size:,} comparisons ({warmup} steps of {config.batch_size})"
    return f"optim.warmup_steps: the learning rate reaches its peak after {needed}" if warmup > 0 else ""


def _print_memory(plan: Plan) -> None:
    programs = [plan.memory, *(one.memory for one in plan.passes)]
    parts = [(*one._asdict().items(), ("total", one.total)) for one in programs]
    rows = [(kinds[0][0], *(f"{value / GB:.2f}" for _, value in kinds)) for kinds in zip(*parts, strict=True)]
    names = [f"{NAMES[one.name]}, GB" for one in plan.passes]
    print_table(("on each device", *(["the step, GB", *names] if names else ["GB"])), rows)
    devices = jax.device_count() if plan.compiled is None else len(plan.compiled.groups)
    log_line(
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; {devices} device(s); at most "
        f"{plan.shape.microbatches} microbatches of {plan.shape.rows} rows x {plan.shape.length} tokens"
    )
