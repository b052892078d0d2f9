"""Data files to rows: JSON lines, JSON, Parquet and Arrow, the first two also compressed; one row at a time."""

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
LINE_LIMIT = 64 * 2**20
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
    """The longest known suffix of a file's name, or nothing."""
    return max((one for one in SUFFIXES if file.name.endswith(one)), key=len, default="")


def type_name(value: object) -> str:
    """What JSON calls the type of a value."""
    return JSON_TYPES.get(type(value), type(value).__name__)


def shorten(value: object, most: int = 60) -> str:
    """A value as a message shows it: on one line, and of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def rows_in_file(file: Path) -> Iterator[RawExample | UserError]:
    """Yields the rows of a file, of a kind that its suffix tells, in order; a bad row is an error in its place.

    Raises:
      UserError: the file cannot be read, or not to its end.
    """
    plain = file.with_suffix("") if file.suffix in COMPRESSED else file
    yield from {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".arrow": _arrow}[plain.suffix](file)


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, bytes) of each line; only a line feed ends one, as in JSON lines."""
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise UserError(f"{file}:{number}: a line of more than {LINE_LIMIT >> 20} MiB; is this JSON lines?")
                yield f"{file}:{number}", line
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read ({error}); is the file whole?") from error


def _open(file: Path) -> io.BufferedIOBase:
    """A file's bytes, unpacked."""
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
        hint = "; one object a line is a .jsonl file" if "Extra data" in str(error) else ""
        raise UserError(f"{where}: not valid JSON ({error}){hint}") from error


def _object(where: str, row: Any) -> RawExample:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with named columns, not {type_name(row)}")
    return where, row


def _jsonl(file: Path) -> Iterator[RawExample | UserError]:
    for where, line in _lines(file):
        if line.strip():
            yield or_error(lambda where, line: _object(where, _parse(where, line)), where, line)


def _json(file: Path) -> Iterator[RawExample | UserError]:
    values = _parse(str(file), b"".join(line for _, line in _lines(file)))
    if not isinstance(values, list):
        raise UserError(f"{file}: a .json file must be a list of objects, not {type_name(values)}")
    for number, row in enumerate(values, 1):
        yield or_error(_object, f"{file}:{number}", row)


def _parquet(file: Path) -> Iterator[RawExample]:
    import pyarrow.parquet

    yield from _arrow_rows(file, "parquet", lambda: pyarrow.parquet.ParquetFile(file).iter_batches(1024))


def _arrow(file: Path) -> Iterator[RawExample]:
    """The streaming format, which is that of `datasets`' files, or else the file format, also called Feather."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)

    yield from _arrow_rows(file, "arrow", batches)


def _arrow_rows(file: Path, kind: str, batches: Any) -> Iterator[RawExample]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for start in range(0, len(batch), 1024):
                for row in batch.slice(start, 1024).to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read as {kind} after row {number} ({reason})") from error
