"""Helpers shared by the commands: positional arguments, and output on the terminal."""

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
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

    Where the terminal is too narrow for a word, or a number with its interval, each row is a list of its columns.

    Args:
      head: the title of each column.
      rows: a text for each column.
      lines: whether a line separates the rows.
      wrap: whether the first column may be wrapped.
    """
    titles = [Column(Text(printable(title)), no_wrap=not (wrap or i)) for i, title in enumerate(head)]
    grid, console, texts = Grid(*titles, show_lines=lines), Console(), [[printable(t) for t in row] for row in rows]
    for row in texts:
        grid.add_row(*map(Text, row))
    if _least_width(head, texts, words=lines, first_words=wrap) <= console.width:
        console.print(grid)
        return
    for first, *others in texts:
        console.print(Text(first), soft_wrap=True)
        for title, text in zip(head[1:], others, strict=True):
            console.print(Text(f"  {printable(title)}: {text}"), soft_wrap=True)


def _least_width(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool, first_words: bool) -> int:
    """Returns the characters of a line in which a table cuts nothing.

    Args:
      head: the title of each column, which may be wrapped between words.
      rows: a text for each column.
      words: whether texts may be wrapped between words.
      first_words: whether those of the first column may.
    """
    least = 1
    for i, title in enumerate(head):
        wrapped = words or (first_words and i == 0)
        parts = [part for row in rows for part in (row[i].split() if wrapped else [row[i]])]
        least += 3 + max(map(cell_len, [*title.split(), *parts]), default=0)
    return least
