"""Plain files of preferences: jsonl, json (both also gzipped) and parquet, with a column for each text."""

import glob
import gzip
import json
import logging
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.records import Comparison, UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
FLOAT32_MAX = 3.4028234e38
JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}
SURROGATE = re.compile("[\ud800-\udfff]")

Row = tuple[str, dict[str, Any]]

log = logging.getLogger(__name__)


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Comparison]:
    """Yields the rows of files as comparisons.

    Args:
      path: files, globs or folders; see `resolve`.
      split: which files of a folder; has no meaning for files that are named.
      responses: 2 reads prompt, chosen, rejected; 1 reads prompt, completion, or else each distinct (prompt, chosen)
        once; 0 reads prompt. An optional column `weight` multiplies the loss.

    Raises:
      UserError: naming the file and the line (row, in json and parquet) that is wrong.
    """
    if responses not in (0, 1, 2):
        raise UserError(f"data source 'files' has at most 2 responses to a prompt, not {responses}")
    if responses == 1:
        yield from _examples(rows(path, split))
    for where, row in rows(path, split) if responses != 1 else ():
        yield _pair(where, row) if responses else Comparison(text(where, row, "prompt"), (), where=where)


def rows(path: Sequence[str], split: str) -> Iterator[Row]:
    """Yields (`file:line`, object) for every row of the files that `path` names, in order."""
    for file in resolve(path, split):
        kind = _suffix(file).removesuffix(".gz")
        yield from {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[kind](file)


def text(where: str, row: dict[str, Any], key: str) -> str:
    """The text in a column of a row, or a `UserError` that says what is there instead."""
    if key not in row:
        raise UserError(f"{where}: no column {key!r}; the columns are: {', '.join(sorted(row)) or 'none'}")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, not {_type(value)}")
    if SURROGATE.search(value):
        raise UserError(f"{where}: {key!r} holds half of a surrogate pair, which is not text; repair or remove the row")
    return value


def resolve(path: Sequence[str], split: str) -> list[Path]:
    """The data files that names, globs and folders stand for: in the order given, sorted within a glob or folder.

    In a folder (searched with all below it) the files of a split are `<split>.<suffix>`, the hub's shards
    `<split>-00000-of-00001.<suffix>`, and all in a folder `<split>/`. A folder whose names mention no split at all
    is one train split, as on the hub.

    Raises:
      UserError: nothing is found, a file would be read twice, or which files are meant is not clear.
    """
    if not path:
        raise UserError("data.path names no file; give it files, globs or a folder")
    found = [file for entry in path for file in _entry(entry, split)]
    seen: set[Path] = set()
    for file in found:
        if file.resolve() in seen:
            raise UserError(f"{file}: named twice by data.path; its rows would count double")
        seen.add(file.resolve())
    return found


def is_data_name(name: str) -> bool:
    """Whether a name is a glob or ends as a data file does, and so can be no hub id."""
    return glob.has_magic(name) or _suffix(Path(name)) != ""


def _entry(entry: str, split: str) -> list[Path]:
    place = Path(entry).expanduser()
    if place.is_dir():
        return _folder(place, split)
    if place.exists():
        found = [place]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
    if not found:
        raise UserError(f"{entry}: no such file; check data.path")
    for file in found:
        if not _suffix(file):
            raise UserError(f"{file}: not a kind of file that can be read; known: {', '.join(SUFFIXES)}")
    return found


def _folder(folder: Path, split: str) -> list[Path]:
    candidates = sorted(file for file in folder.rglob("*") if file.is_file() and _suffix(file))
    if not candidates:
        raise UserError(f"{folder}: no data files in this folder; known kinds: {', '.join(SUFFIXES)}")
    named = [file for file in candidates if _is_of(file.relative_to(folder), split)]
    if not named and split == "train" and not any(_mentions_split(file.relative_to(folder)) for file in candidates):
        named = candidates
    if not named:
        listed = ", ".join(str(file.relative_to(folder)) for file in candidates[:8])
        raise UserError(f"{folder}: no file for split {split!r}; it has: {listed}; name the files in data.path")
    stems: dict[Path, Path] = {}
    for file in named:
        stem = file.parent / _stem(file)
        if stem in stems:
            raise UserError(f"{folder}: {stems[stem].name} and {file.name} may be the same data; name one in data.path")
        stems[stem] = file
    return named


def _is_of(file: Path, split: str) -> bool:
    shard = re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?", _stem(file))
    return shard is not None or split in file.parts[:-1]


def _mentions_split(file: Path) -> bool:
    words = re.split(r"[^a-z]+", str(file.parent / _stem(file)).lower())
    return bool(SPLIT_WORDS.intersection(words))


def _suffix(file: Path) -> str:
    """The longest known suffix of a file's name, or nothing."""
    return max((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), key=len, default="")


def _stem(file: Path) -> str:
    return file.name.removesuffix(_suffix(file))


def _type(value: object) -> str:
    """What JSON calls the type of a value."""
    return JSON_TYPES.get(type(value), type(value).__name__)


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, bytes) of each line; only a line feed ends one, as in JSON lines."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield f"{file}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read ({error}); is the file whole?") from error


def _parse(where: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        hint = "; one object a line is a .jsonl file" if "Extra data" in str(error) else ""
        raise UserError(f"{where}: not valid JSON ({error}){hint}") from error


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with named columns, not {_type(row)}")
    return where, row


def _jsonl(file: Path) -> Iterator[Row]:
    for where, line in _lines(file):
        if line.strip():
            yield _object(where, _parse(where, line))


def _json(file: Path) -> Iterator[Row]:
    values = _parse(str(file), b"".join(line for _, line in _lines(file)))
    if not isinstance(values, list):
        raise UserError(f"{file}: a .json file must be a list of objects, not {_type(values)}")
    for number, row in enumerate(values, 1):
        yield _object(f"{file}:{number}", row)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read as parquet after row {number} ({reason})") from error


def _weight(where: str, row: dict[str, Any]) -> float:
    value = row.get("weight", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: 'weight' must be a number, not {_type(value)}")
    if not 0 <= value <= FLOAT32_MAX or math.isnan(value):
        raise UserError(f"{where}: 'weight' must be finite and not negative, not {value}")
    return float(value)


def _pair(where: str, row: dict[str, Any]) -> Comparison:
    if "completion" in row and not {"chosen", "rejected"} & set(row):
        columns = ", ".join(sorted(row))
        raise UserError(f"{where}: the loss needs pairs: columns prompt, chosen, rejected; the columns are: {columns}")
    if "prompt" not in row and {"chosen", "rejected"} <= set(row):
        raise UserError(f"{where}: no column 'prompt'; transcripts such as Anthropic HH's are read by data.name hh")
    prompt, chosen, rejected = (text(where, row, key) for key in ("prompt", "chosen", "rejected"))
    return Comparison(prompt, (chosen, rejected), _weight(where, row), where)


def _examples(source: Iterator[Row]) -> Iterator[Comparison]:
    seen: set[tuple[str, str]] = set()
    repeats = 0
    for where, row in source:
        key = "completion" if "completion" in row or "chosen" not in row else "chosen"
        example = Comparison(text(where, row, "prompt"), (text(where, row, key),), _weight(where, row), where)
        if key == "chosen":
            pair = (example.prompt, example.responses[0])
            if pair in seen:
                repeats += 1
                continue
            seen.add(pair)
        yield example
    if repeats:
        log.warning("files: %d rows repeat a prompt with the same chosen response and are read once", repeats)
