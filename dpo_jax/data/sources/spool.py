"""Examples grouped by prompt without all of them in memory: beyond some size they wait on disk, in the cache folder."""

import io
import json
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from jaxtyping import Int64

from dpo_jax.data.sources.base import prompt_key
from dpo_jax.errors import UserError
from dpo_jax.paths import cache_folder

IN_MEMORY = 2**25  # bytes of a spool before it moves to disk


class Spool:
    """A list of JSON values of which memory holds the places, 8 bytes each; its file vanishes with it."""

    def __init__(self) -> None:
        self._file: IO[bytes] = io.BytesIO()
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, value: Any) -> None:
        """Adds a value.

        Raises:
          UserError: the cache folder cannot be written.
        """
        line = json.dumps(value).encode()
        self._ends.append(self._ends[-1] + len(line))
        try:
            if isinstance(self._file, io.BytesIO) and self._ends[-1] > IN_MEMORY:
                self._move_to_disk()
            self._file.write(line)
        except OSError as error:
            raise UserError(f"{cache_folder()}: the cache cannot be written ({error}); set DPO_JAX_CACHE") from error

    def take(self, order: Sequence[int] | np.ndarray) -> Iterator[Any]:
        """Yields the values at some places; no value can be added later."""
        for index in order:
            start, end = self._ends[index], self._ends[index + 1]
            self._file.seek(start)
            yield json.loads(self._file.read(end - start))

    def _move_to_disk(self) -> None:
        assert isinstance(self._file, io.BytesIO)
        cache_folder().mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115 - closed with the spool
        weakref.finalize(self, file.close)
        file.write(self._file.getbuffer())
        self._file = file


class PromptGroups:
    """Values by prompt; groups come in the order of each prompt's first value, values in that of `add`."""

    def __init__(self) -> None:
        self._values, self._keys = Spool(), array("Q")

    def add(self, prompt: str, value: Sequence[Any]) -> None:
        """Adds a value, which JSON can hold, to the group of a prompt."""
        self._values.append([prompt, value])
        self._keys.append(prompt_key(prompt))

    def __len__(self) -> int:
        return len(self._values)

    def groups(self) -> Iterator[tuple[str, list[Any]]]:
        """Yields (prompt, its values)."""
        first = first_places(np.frombuffer(self._keys, np.uint64))
        order = np.argsort(first, kind="stable")
        prompt, values, place = "", [], -1
        for index, (text, value) in zip(order, self._values.take(order), strict=True):
            if first[index] != place:
                if values:
                    yield prompt, values
                prompt, values, place = text, [], first[index]
            values.append(value)
        if values:
            yield prompt, values


def first_places(keys: np.ndarray) -> Int64[np.ndarray, " n"]:
    """Returns for each key the place where it first occurs."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]
