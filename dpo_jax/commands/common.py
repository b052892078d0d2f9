"""Helpers shared by the commands: positional arguments, and output on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import distributed
from dpo_jax.errors import UserError


def log_line(line: str) -> None:
    """Prints a line, from process 0 only."""
    if distributed.is_primary():
        print(line, flush=True)


def leading_arguments(argv: list[str], command: str, *names: str) -> tuple[list[str], list[str]]:
    """Returns the positional arguments, and the options after them.

    Raises:
      UserError: the number of positional arguments differs from that of `names`.
    """
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    if first != len(names):
        raise UserError(f"dpo-jax {command} takes {' and '.join(names)}, then options; got {argv[:first]}")
    return argv[:first], argv[first:]


def print_samples(shown: Sequence[tuple[str, ...]], names: Sequence[str]) -> None:
    """Prints prompts with the completion of each model, as a table."""
    if shown:
        grid = Grid("prompt", *names, show_lines=True)
        for row in shown:
            grid.add_row(*(text.replace("\n", " / ") for text in row))
        Console().print(grid)
