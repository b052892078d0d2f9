"""`dpo-jax models`: lists the supported model families."""

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.models.families.registry import describe_families


def models_command(argv: list[str]) -> None:
    """Runs `dpo-jax models`."""
    leading_arguments(argv, "models")
    grid = Grid("model_type", "class in transformers", "what it is")
    for row in describe_families():
        grid.add_row(*row)
    Console().print(grid)
    log_line(
        "Every family can be trained, evaluated, sampled with a cache, sharded over devices and exported.\n"
        "Rotary positions: default, linear, llama3, yarn; longrope in phi3. Other settings of a config.json are\n"
        "refused by key.\n"
        "To add one: a file dpo_jax/models/families/<model_type>.py with architecture(config) and\n"
        "tensors(architecture), and a row in tests/tiny.py, with which the tests compare it to transformers."
    )
