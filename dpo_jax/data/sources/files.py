"""Files of preferences, or data sets of the hub: JSON lines, JSON, Parquet and Arrow, with the usual columns."""

import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.sources.base import Item, Note, RawExample, as_bytes, expand_examples
from dpo_jax.data.sources.columns import READ, as_list, comparisons_from_columns
from dpo_jax.data.sources.formats import SUFFIXES, rows_in_file, suffix
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison

SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
METADATA = {"dataset_info.json", "dataset_dict.json", "state.json"}  # of the folders that `datasets` saves
MOST_NAMES = 100  # of columns that are kept in mind
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?")


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """The rows of files as comparisons; `columns` says which columns make what.

    Args:
      path: files, globs or folders, see `resolve`, or hub ids.
      split: which files of a folder, or which split on the hub; has no meaning for files that are named.
      responses: for each prompt. One response to each of several equal (prompt, chosen) is read once.

    Raises:
      UserError: a file is missing or cannot be read to its end. (A conversation after texts, or a text after
        conversations, is a bad row: a chat template writes only the former.)
    """
    seen: set[bytes] = set()
    kinds: set[type] = set()
    unread: set[str] = set()

    def convert(where: str, row: dict[str, Any]) -> list[Item]:
        unread.update(row.keys() - READ if len(unread) < MOST_NAMES else ())
        found = comparisons_from_columns(where, row, responses)
        _check_kind(where, found, kinds)
        return [_once(item, seen) for item in found] if responses == 1 and "chosen" in row else found

    yield from expand_examples(file_rows(path, split), convert)
    if unread:
        yield Note(f"columns that nothing reads: {as_list(unread)}", len(unread))


def file_rows(path: Sequence[str], split: str) -> Iterator[RawExample | UserError]:
    """Yields (`file:line`, object) for every row of the files or hub ids that `path` names, in order.

    A hub id is `owner/name`, or `owner/name:config` for one of its configurations, either with `@revision` if it is
    to be that branch, tag or commit. Its copy on this disk, which is made first, is mapped into memory.
    """
    for entry in resolve_files(path, split):
        yield from rows_in_file(entry) if isinstance(entry, Path) else _hub(entry, split)


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean a data set of the hub."""
    is_file = glob.has_magic(name) or suffix(Path(name)) != "" or Path(name).exists()
    return not is_file and HUB_ID.fullmatch(name) is not None


def _hub(name: str, split: str) -> Iterator[RawExample]:
    import datasets
    import datasets.exceptions

    match = HUB_ID.fullmatch(name)
    assert match is not None
    *names, revision = match.groups()
    options = {"split": split} | ({"revision": revision} if revision else {})
    try:
        table = datasets.load_dataset(*filter(None, names), **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{name}: no such local path, and split {split!r} cannot be loaded from the hub ({reason})"
        raise UserError(message) from error
    for number, row in enumerate(table, 1):
        yield f"{name}[{split}]:{number}", dict(row)


def _check_kind(where: str, found: list[Item], kinds: set[type]) -> None:
    """Keeps the kind of the first prompt; `UserError` for one of the other kind."""
    for item in found:
        if isinstance(item, Comparison):
            kinds.update({type(item.prompt)} if not kinds else ())
            if type(item.prompt) not in kinds:
                names = ("a conversation", "texts") if isinstance(item.prompt, Chat) else ("a text", "conversations")
                raise UserError(
                    f"{where}: {names[0]}, where the rows before it are {names[1]}; give each kind its own file, "
                    "as parts of a mixture (data.name)"
                )


def _once(item: Item, seen: set[bytes]) -> Item:
    """The item, or a note where it repeats an example: every pair of a prompt brings its chosen response."""
    if not isinstance(item, Comparison):
        return item
    key = hashlib.blake2b(repr([as_bytes(part) for part in (item.prompt, *item.responses)]).encode(), digest_size=12)
    if key.digest() in seen:
        return Note("rows repeat a prompt with the same chosen response and are read once")
    seen.add(key.digest())
    return item


def resolve_files(path: Sequence[str], split: str) -> list[Path | str]:
    """The data files that names, globs and folders stand for: in the order given, sorted within a glob or folder.

    Hub ids stay as they are.

    In a folder (searched with all below it) the files of a split are `<split>.<suffix>`, the hub's shards
    `<split>-00000-of-00001.<suffix>`, and all in a folder `<split>/`. A folder whose names mention no split at all
    is one train split, as on the hub.

    Raises:
      UserError: nothing is found, a file would be read twice, or which files are meant is not clear.
    """
    if not path:
        raise UserError("data.path names no file; give it files, globs, a folder or a hub id")
    found = [file for entry in path for file in _entry(entry, split)]
    seen: set[Path | str] = set()
    for file in found:
        its = file.resolve() if isinstance(file, Path) else file
        if its in seen:
            raise UserError(f"{file}: named twice by data.path; its rows would count double")
        seen.add(its)
    return found


def _entry(entry: str, split: str) -> Sequence[Path | str]:
    if is_hub_id(entry):
        return [entry]
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
        if not suffix(file):
            raise UserError(f"{file}: not a kind of file that can be read; known: {', '.join(SUFFIXES)}")
    return found


def _folder(folder: Path, split: str) -> list[Path]:
    every = (file for file in folder.rglob("*") if file.is_file() and suffix(file))
    candidates = sorted(file for file in every if file.name not in METADATA)
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


def _stem(file: Path) -> str:
    return file.name.removesuffix(suffix(file))
