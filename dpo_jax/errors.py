"""The error that a user can fix, hints for misspelt names, the hub's errors, and text made safe for a terminal."""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """An error the user can fix. The message is one line: file, line or key, then the fix. Exit code 2."""


def closest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message on an unknown name: the most similar known name, or all of them."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(names)}"


def similar(value: Any, texts: Iterable[str]) -> str:
    """Returns the hint at the most similar of the allowed values, which ends a message; "" if none is similar."""
    match = difflib.get_close_matches(str(value), list(texts), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


# Control characters but line feed and tab, marks that reorder a line, and halves of surrogate pairs.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Returns a text with the characters escaped that a terminal would obey and not show."""
    return _UNSAFE.sub(lambda found: repr(found[0])[1:-1], text)


def is_utf8(text: str) -> bool:
    """Returns whether a text has no half of a surrogate pair, which Python reads bytes as that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@contextmanager
def hub_errors(what: str, fix: str = "", *more: type[Exception]) -> Iterator[None]:
    """Raises what the hub's client raises as a UserError, `what: reason` and `fix`.

    Args:
      what: the start of the message.
      fix: its end.
      more: further types of errors that mean the same.
    """
    from huggingface_hub.errors import HfHubHTTPError  # imported late: it is slow to import

    # The bases of HfHubHTTPError include all errors of the HTTP client.
    failures: Any = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__, *more)
    client = logging.getLogger("huggingface_hub")  # warns of each retry; the error says it all
    level, _ = client.level, client.setLevel(logging.ERROR)
    try:
        yield
    except failures as error:
        why = filter(None, (error, error.__cause__))
        reason = ": ".join(" ".join(str(e).split()) or type(e).__name__ for e in why)
        raise UserError(f"{what}: {reason}{fix}") from error
    finally:
        client.setLevel(level)
