"""The errors of this package that a user can fix, and hints for misspelt names."""

import difflib
from collections.abc import Sequence


def closest(name: str, known: Sequence[str]) -> str:
    """Returns the end of an error message on an unknown name: the likeliest one, or all."""
    match = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


# numpy on the host, jax on a device: a record is the same on both sides
class UserError(Exception):
    """Something a user can mend: one line that names the file, line or key, and what to do. Exit code 2."""
