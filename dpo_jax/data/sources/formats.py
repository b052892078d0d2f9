"""Data files to examples, one at a time: JSON lines and JSON (also compressed), Parquet and Arrow."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax.data.sources.base import RawExample, or_error
from dpo_jax.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KINDS = (".jsonl", ".json", ".parquet", ".arrow")
SUFFIXES = tuple(kind + packed for kind in KINDS for packed in ("", *(COMPRESSED if "json" in kind else ())))
LINE_LIMIT = 64 * 2**20  # bytes; a longer line is an error, so that a file without line feeds fills no memory
JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def suffix(file: Path) -> str:
    """Returns the longest known suffix of a file's name, or ''."""
    return max((one for one in SUFFIXES if file.name.endswith(one)), key=len, default="")


def type_name(value: object) -> str:
    """Returns the name of a value's type in JSON."""
    return JSON_TYPES.get(type(value), type(value).__name__)


def shorten(value: object, most: int = 60) -> str:
    """Returns a value as a message shows it: on one line, a long one cut short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def examples_in_file(file: Path) -> Iterator[RawExample | UserError]:
    """Yields the examples of a file in order, read by its suffix; a bad example as its error.

    Raises:
      UserError: the file cannot be read to its end.
    """
    plain = file.with_suffix("") if file.suffix in COMPRESSED else file
    yield from {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".arrow": _arrow}[plain.suffix](file)


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (`file:line`, bytes) of each line. Only a line feed ends a line, as JSON lines specifies."""
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise UserError(f"{file}:{number}: a line of more than {LINE_LIMIT >> 20} MiB; is this JSON lines?")
                yield f"{file}:{number}", line
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read ({error}); the file may be truncated") from error


def _open(file: Path) -> io.BufferedIOBase:
    """Opens a file for reading its decompressed bytes."""
    if file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"))
    if file.suffix == ".xz":
        return lzma.open(file)
    return gzip.open(file) if file.suffix == ".gz" else bz2.open(file) if file.suffix == ".bz2" else file.open("rb")


def _parse(where: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        hint = "; name a file with one object per line .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{where}: not valid JSON ({error}){hint}") from error


def _object(where: str, example: Any) -> RawExample:
    if not isinstance(example, dict):
        raise UserError(f"{where}: an example must be an object with named columns, not {type_name(example)}")
    return where, example


def _jsonl(file: Path) -> Iterator[RawExample | UserError]:
    for where, line in _lines(file):
        if line.strip():
            yield or_error(lambda where, line: _object(where, _parse(where, line)), where, line)


def _json(file: Path) -> Iterator[RawExample | UserError]:
    values = _parse(str(file), b"".join(line for _, line in _lines(file)))
    if not isinstance(values, list):
        raise UserError(f"{file}: a .json file must be a list of objects, not {type_name(values)}")
    for number, value in enumerate(values, 1):
        yield or_error(_object, f"{file}:{number}", value)


def _parquet(file: Path) -> Iterator[RawExample]:
    import pyarrow.parquet

    yield from _arrow_examples(file, "parquet", lambda: pyarrow.parquet.ParquetFile(file).iter_batches(1024))


def _arrow(file: Path) -> Iterator[RawExample]:
    """Reads both formats of Arrow: streams, which `datasets` saves, and files, also called Feather."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)

    yield from _arrow_examples(file, "arrow", batches)


def _arrow_examples(file: Path, kind: str, batches: Any) -> Iterator[RawExample]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for start in range(0, len(batch), 1024):
                for example in batch.slice(start, 1024).to_pylist():
                    number += 1
                    yield f"{file}:{number}", example
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file}: cannot be read as {kind} after example {number} ({reason}); the file may be truncated"
        ) from error
