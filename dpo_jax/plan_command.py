"""`dpo-jax plan`: what a run needs of each device."""

import jax
from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import config, plan
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.settings import Planning
from dpo_jax.terminal import leading, say


def plan_command(argv: list[str]) -> None:
    """`dpo-jax plan CONFIG.yaml [--devices N] [--memory GB] [--key.path value ...]`."""
    (file,), rest = leading(argv, "plan", "CONFIG.yaml")
    settings = config.parse(Planning, file or None, rest, prog="dpo-jax plan CONFIG.yaml")
    if settings.devices:  # processors stand for them: the compiler needs no more than their number
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.devices)
    made = plan.of(plan.resolved(settings))
    grid = Grid("on each device", "GB")
    for name, value in (*made.memory._asdict().items(), ("together", made.memory.total)):
        grid.add_row(name, f"{value / plan.GB:.2f}")
    Console().print(grid)
    say(
        f"{made.parameters:,} parameters, {made.trained:,} of them trained; {jax.device_count()} device(s); up to "
        f"{made.shape.microbatches} microbatches of {made.shape.rows} rows x {made.shape.length} tokens"
    )
    if settings.model.attention not in ("auto", CHUNKS):
        say(f"model.attention: {settings.model.attention} cannot be planned with; the memory is that of {CHUNKS}")
    lines = plan.advice(made, int(settings.memory * plan.GB))
    share = made.memory.total / (settings.memory * plan.GB)
    say(f"{share:.0%} of {settings.memory:g} GB" + (": it does not fit; what would help:" if lines else ": it fits"))
    for line in lines:
        say(f"  {line}")
