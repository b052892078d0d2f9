"""Helpers shared by the commands: positional arguments, and output on the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from dpo_jax import distributed
from dpo_jax.errors import UserError, printable


def log_line(line: str) -> None:
    """Prints a line, from process 0 only."""
    if distributed.is_primary():
        print(printable(line), flush=True)


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
        print_table(("prompt", *names), ([text.replace("\n", " / ") for text in row] for row in shown), lines=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, lines: bool = False, wrap: bool = True) -> None:
    """Prints texts as a table, as they are: no markup in them is read, and control characters are escaped.

    Args:
      head: the title of each column.
      rows: a text for each column.
      lines: whether a line separates the rows.
      wrap: whether the first column may be wrapped.
    """
    titles = [Column(Text(printable(title)), no_wrap=not (wrap or i)) for i, title in enumerate(head)]
    grid = Grid(*titles, show_lines=lines)
    for row in rows:
        grid.add_row(*(Text(printable(text)) for text in row))
    Console().print(grid)
