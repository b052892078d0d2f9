"""The error that a user can fix, and hints for misspelt names."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error the user can fix. The message is one line: file, line or key, then the fix. Exit code 2."""


def closest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message on an unknown name: the most similar known name, or all of them."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(names)}"
