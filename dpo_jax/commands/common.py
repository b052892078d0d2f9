"""What the commands share: arguments before the options, settings, and lines and tables on the terminal."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import distributed
from dpo_jax.config.parse import parse_config
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import model_folder
from dpo_jax.paths import is_run
from dpo_jax.training.run_folder import run_config


def log_line(line: str) -> None:
    """Prints a line at once; of several processes, only the first does."""
    if distributed.is_primary():
        print(line, flush=True)


def leading_arguments(argv: list[str], command: str, *names: str) -> tuple[list[str], list[str]]:
    """Returns the arguments before the first option, one for each name, and the rest."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    if first != len(names):
        raise UserError(f"dpo-jax {command} takes {' and '.join(names)}, then options; given: {argv[:first]}")
    return argv[:first], argv[first:]


def command_config(path: str, argv: list[str], kind: type, command: str) -> Any:
    """Returns the config of a run with overrides, or the overrides alone for a model folder."""
    prog = f"dpo-jax {command} RUN_OR_MODEL"
    if is_run(path):
        return run_config(path, argv, kind, prog)
    settings = parse_config(kind, None, argv, prog=prog)
    model = dataclasses.replace(settings.model, path=str(model_folder(path)))
    return dataclasses.replace(settings, model=model)


def print_samples(shown: Sequence[tuple[str, ...]], names: Sequence[str]) -> None:
    """Prints prompts with what each model answers."""
    if shown:
        grid = Grid("prompt", *names, show_lines=True)
        for row in shown:
            grid.add_row(*(text.replace("\n", " / ") for text in row))
        Console().print(grid)
