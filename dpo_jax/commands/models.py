"""`dpo-jax models`: lists the supported model families."""

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.models.families.registry import describe_families
from dpo_jax.models.families.wrappers import WRAPPERS


def models_command(argv: list[str]) -> None:
    """Runs `dpo-jax models`."""
    leading_arguments(argv, "models")
    grid = Grid("model_type", "class in transformers", "what it is")
    for row in describe_families():
        grid.add_row(*row)
    Console().print(grid)
    log_line(
        "Every family can be trained, evaluated, sampled with a cache, sharded over devices and exported.\n"
        "Rotary positions: default, linear, dynamic, llama3, yarn; longrope in phi3. Other settings of a\n"
        "config.json are refused by key.\n"
        f"Of models that read images too, the language model is trained: {', '.join(sorted(WRAPPERS))}.\n"
        "To add one: a file of your own with architecture(config) and tensors(architecture), which\n"
        "model.family: my_file:architecture names (example: dpo_jax/models/README.md), or a file\n"
        "dpo_jax/models/families/<model_type>.py, and a row in tests/tiny.py, by which tests compare it."
    )
