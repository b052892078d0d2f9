"""Data files to examples, one at a time: JSON lines, JSON, CSV and TSV (also compressed), Parquet and Arrow.

A .json file holds what `datasets` reads from one: a list of objects, JSON lines, {"data": list}, {split: list},
{column: list}, or {column: {number: value}}, which pandas writes; also {split: columns}.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from dpo_jax.data.sources.base import RawExample, or_error
from dpo_jax.data.sources.values import Cell, type_name
from dpo_jax.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*(kind + packed for kind in TEXT_KINDS for packed in ("", *COMPRESSED)), ".parquet", ".arrow")
LINE_LIMIT = 64 * 2**20  # bytes; a longer line is an error, so that a file without line feeds fills no memory
BLANK_LIMIT = 2**20  # blank lines of up to 64 bytes in a row, which a small compressed file can hold without end
PROMPTS = {"prompt", "chosen", "messages", "conversations"}  # one of which an example has
JSON_LIMIT = 2**31  # bytes of a .json file, which is read whole


def suffix(file: Path) -> str:
    """Returns the longest known suffix of a file's name, or ''."""
    return max((one for one in SUFFIXES if file.name.endswith(one)), key=len, default="")


def examples_in_file(file: Path, split: str = "train") -> Iterator[RawExample | UserError]:
    """Yields the examples of a file in order, read by its suffix; a bad example as its error.

    Args:
      file: the file.
      split: which one to read of a .json file of several.

    Raises:
      UserError: the file cannot be read to its end.
    """
    kind = (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix
    if kind == ".json":
        yield from _jsonl(file) if _holds_lines(file) else _json(file, split)
    else:
        readers = {".parquet": _parquet, ".arrow": _arrow, ".csv": _table_of_texts, ".tsv": _table_of_texts}
        yield from readers.get(kind, _jsonl)(file)


class _LongLineError(UserError):
    """A line of more than `LINE_LIMIT` bytes."""


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (`file:line`, bytes) of each line. Only a line feed ends a line, as JSON lines specifies."""
    number = blank = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise _LongLineError(
                        f"{file}:{number}: a line of more than {LINE_LIMIT >> 20} MiB; is this JSON lines?"
                    )
                blank = 0 if not line.isspace() else blank + 1 + (len(line) >> 6)
                if blank > BLANK_LIMIT:
                    raise UserError(f"{file}:{number}: more than {BLANK_LIMIT:,} blank lines; remove them")
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
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        hint = "; name a file with one object per line .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{where}: not valid JSON ({error}){hint}") from error


def _object(where: str, example: Any) -> RawExample:
    if not isinstance(example, dict):
        raise UserError(f"{where}: an example must be an object with named columns, not {type_name(example)}")
    return where, example


def _parsed_object(where: str, raw: bytes) -> RawExample:
    return _object(where, _parse(where, raw))


def _jsonl(file: Path) -> Iterator[RawExample | UserError]:
    for where, line in _lines(file):
        if line.strip():
            yield or_error(_parsed_object, where, line)


def _holds_lines(file: Path) -> bool:
    """Returns whether a .json file holds JSON lines: an object on its first line, and further lines."""
    found = (line for _, line in _lines(file) if line.strip())
    try:
        first = or_error(_parsed_object, "", next(found, b""))
        return not isinstance(first, UserError) and bool(next(found, b""))
    except _LongLineError:
        return False


def _json(file: Path, split: str) -> Iterator[RawExample | UserError]:
    try:
        with _open(file) as stream:
            content = stream.read(JSON_LIMIT + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}: cannot be read ({error}); the file may be truncated") from error
    except MemoryError as error:
        raise UserError(f"{file}: takes more memory than there is; write it as JSON lines (.jsonl)") from error
    if len(content) > JSON_LIMIT:
        raise UserError(f"{file}: more than {JSON_LIMIT >> 30} GiB; write it as JSON lines (.jsonl), read line by line")
    values = _parse(str(file), content)
    if isinstance(values, dict):
        values = _rows_of(file, values, split)
    if not isinstance(values, list):
        raise UserError(f"{file}: a .json file must hold objects, not {type_name(values)}; see configs/DATA.md")
    for number, value in enumerate(values, 1):
        yield or_error(_object, f"{file}:{number}", value)


def _rows_of(file: Path, values: dict[str, Any], split: str) -> list[Any]:
    """Returns the rows of one object: those under `data`, of a split, or of columns; else the object itself."""
    lists = [value for value in values.values() if isinstance(value, list)]
    if lists == [values.get("data")] and not PROMPTS & values.keys():  # beside a version, for example
        return values["data"]
    columns = [value for value in values.values() if isinstance(value, dict)]
    if columns and len(columns) == len(values):
        if columns[0] and all(list(one) == list(columns[0]) and "".join(one).isdigit() for one in columns):
            return [dict(zip(values, row, strict=True)) for row in zip(*(one.values() for one in columns), strict=True)]
        return _rows_of(file, values[split], split) if split in values else [values]
    if not lists or len(lists) < len(values):
        return [values]
    turns = all(isinstance(one, dict) for value in lists for one in value)
    if turns and not any("role" in one or "from" in one for value in lists for one in value):
        if split not in values:
            raise UserError(f"{file}: has the splits {', '.join(values)}, not {split!r}; set data.split or eval_split")
        return values[split]
    if turns or len({len(value) for value in lists}) > 1:
        return [values]  # one example of conversations
    return [dict(zip(values, row, strict=True)) for row in zip(*lists, strict=True)]


def _table_of_texts(file: Path) -> Iterator[RawExample | UserError]:
    """Reads CSV or TSV with a head. An empty cell is absent; the others are texts until a number is needed."""
    csv.field_size_limit(LINE_LIMIT)
    row, head = 0, list[str]()
    try:
        with _open(file) as stream, io.TextIOWrapper(cast(Any, stream), "utf-8-sig", newline="") as text:
            for cells in csv.reader(text, delimiter="\t" if ".tsv" in file.name else ",", strict=True):
                if not head:
                    head = cells
                    if len(set(head)) < len(head):
                        raise UserError(f"{file}:1: a column is named twice; rename one")
                elif cells:
                    row += 1
                    yield or_error(_from_cells, f"{file}:{row}", head, cells)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read after example {row} ({error}); correct the file: a cell that begins with a quote "
            "ends with one, and has others twice"
        ) from error


def _from_cells(where: str, head: list[str], cells: list[str]) -> RawExample:
    if len(cells) != len(head):
        raise UserError(f"{where}: {len(cells)} cells for {len(head)} columns; quote cells that hold the separator")
    return where, {name: Cell(cell) if cell else None for name, cell in zip(head, cells, strict=True)}


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
            batch.validate(full=True)  # a damaged offset would be read as an address
            for start in range(0, len(batch), 1024):
                for example in _column_values(file, batch.slice(start, 1024)):
                    number += 1
                    yield f"{file}:{number}", example
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # a column's name may be no UTF-8
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file}: cannot be read as {kind} after example {number} ({reason}); the file may be truncated"
        ) from error


def _column_values(file: Path, batch: Any) -> Iterator[dict[str, Any]]:
    """Yields the examples of a batch. Python lacks some values of Arrow, such as years beyond 9999."""
    columns: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except (ValueError, OverflowError) as error:
            raise UserError(f"{file}: column {name}: {error}; remove the column or correct it") from error
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))
