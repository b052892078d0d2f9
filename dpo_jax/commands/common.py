"""What the commands share: arguments before the options, settings, and lines and tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import distributed
from dpo_jax.errors import UserError


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


def print_samples(shown: Sequence[tuple[str, ...]], names: Sequence[str]) -> None:
    """Prints prompts with what each model answers."""
    if shown:
        grid = Grid("prompt", *names, show_lines=True)
        for row in shown:
            grid.add_row(*(text.replace("\n", " / ") for text in row))
        Console().print(grid)
