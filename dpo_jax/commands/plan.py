"""`dpo-jax plan`: the memory that a run needs on each device."""

import dataclasses
import math

import jax

from dpo_jax import optim
from dpo_jax.commands.common import leading_arguments, log_line, print_table
from dpo_jax.config.commands import PlanConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.training.load import compute_dtype, recomputed
from dpo_jax.training.plan import GB, Plan, fitting_plan, plan_run


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
    stronger = {"none": "dots", "dots": "full"}.get(recomputed(config.model))
    if stronger and need.activations > 0.1 * memory:
        lines.append(f"model.remat {stronger}: recomputes more activations in the backward pass and keeps fewer")
    local_rows = plan.shape.rows // max(1, jax.device_count() // (config.mesh.tensor * config.mesh.sequence))
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
    config, memory = resolve_base_model(settings), settings.memory * GB
    accelerator = bool(settings.devices) or jax.default_backend() != "cpu"
    if accelerator:  # emulated devices stand for accelerators
        compute = compute_dtype(config.model, "gpu")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute=compute))
    plan = fitting_plan(config, memory) if accelerator else plan_run(config)
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
    log_line(f"model.compute: {compute_dtype(plan.config.model)}, model.remat: {recomputed(plan.config.model)}")
    lines = plan_advice(plan, int(memory))
    share = plan.memory.total / memory
    log_line(f"{share:.0%} of {settings.memory:g} GB" + (": does not fit; set one or more of:" if lines else ": fits"))
    for line in lines:
        log_line(f"  {line}")
