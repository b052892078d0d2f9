"""Data in files (JSON lines, JSON, CSV, TSV, Parquet, Arrow) or on the hub, with the usual columns (`columns`)."""

import functools
import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpo_jax.data.sources.base import Item, Note, RawExample, as_bytes, expand_examples, or_error
from dpo_jax.data.sources.columns import READ, comparisons_from_columns
from dpo_jax.data.sources.formats import SUFFIXES, examples_in_file, suffix
from dpo_jax.data.sources.mapping import map_columns
from dpo_jax.data.sources.prompts import is_conversation, is_turn
from dpo_jax.data.sources.schemas import grouped, usual_columns
from dpo_jax.data.sources.values import SURROGATE, as_list
from dpo_jax.errors import UserError, hub_errors
from dpo_jax.paths import expand_home
from dpo_jax.records import Chat, Comparison

COLUMNS = "prompt, chosen, rejected; prompt, completion; prompt, completions, scores; messages; ... (configs/DATA.md)"
SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
METADATA = {"dataset_info.json", "dataset_dict.json", "state.json"}  # in folders that `datasets` saves
NONE: Mapping[str, str] = MappingProxyType({})
MOST_CONVERSATIONS = 1024
PAIR = {"prompt", "chosen", "rejected"}
MOST_NAMES = 100  # unused column names to remember
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?")


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields the comparisons of files, as `columns.comparisons_from_columns` makes them, and notes.

    A text after conversations is a bad example, and so is a conversation after texts: the chat template renders only
    conversations, so that the model would see two formats.

    Args:
      path: files, globs or folders (see `resolve_files`), or hub ids.
      split: the files of a folder, or the split on the hub; ignored for files that are named.
      responses: responses per comparison. With 1, pairs that repeat a prompt and chosen response give one comparison.

    Raises:
      UserError: a file is missing or cannot be read to its end.
    """
    return example_items(rows(path, split), responses, chat=_files_have_turns(path, split, _state(path, split)))


def example_items(
    examples: Iterable[RawExample | UserError],
    responses: int,
    columns: Mapping[str, str] = NONE,
    chat: bool | None = None,
) -> Iterator[Item]:
    """Yields the comparisons of examples, and notes.

    A note counts unused columns. With 1 response, a note replaces a pair that repeats a prompt and chosen response.

    Args:
      examples: with the usual columns (`columns`), those of a known data set (`schemas`), or mapped ones.
      responses: responses per comparison.
      columns: `data.columns`, see `mapping`.
      chat: whether text prompts are turns of a user (`has_turns`), see `prompts`; None: decided for each alone.
    """
    seen: set[bytes] = set()
    kinds: set[type] = set()
    unused: set[str] = set()
    usual = _converter(columns)
    plain = responses == 2 and not columns and not chat

    def convert(where: str, example: dict[str, Any]) -> list[Item]:
        if plain and (pair := _plain_pair(where, example)):
            _check_kind(where, [pair], kinds)
            return [pair]
        row = usual(where, example)
        if isinstance(row, Note):
            return [row]
        unused.update(row.keys() - READ if len(unused) < MOST_NAMES else ())
        found = comparisons_from_columns(where, row, responses, chat)
        _check_kind(where, found, kinds)
        return [_once(item, seen) for item in found] if responses == 1 and "chosen" in row else found

    yield from expand_examples(examples if columns else grouped(examples), convert)
    if unused:
        yield Note(f"unused columns: {as_list(unused)}", len(unused))


def has_turns(examples: Iterable[RawExample | UserError], columns: Mapping[str, str] = NONE) -> bool | None:
    """Returns True if text prompts of examples are turns of a user, because one stands beside a system message, tools
    or earlier turns; else None. Reads up to the first that decides, or so many conversations that texts are unlikely.
    """
    usual, conversations = _converter(columns), 0
    for item in examples:
        if not columns and not isinstance(item, UserError) and _plain_pair(*item):
            continue
        row = item if isinstance(item, UserError) else or_error(usual, *item)
        if isinstance(row, dict) and is_turn(row):
            return True
        conversations += isinstance(row, dict) and is_conversation(row)
        if conversations == MOST_CONVERSATIONS:
            return None
    return None


def _state(path: tuple[str, ...], split: str) -> tuple[Any, ...]:
    """Returns what changes with the files of a path: names, sizes and times of writing."""
    entries = resolve_files(path, split)
    stats = [(entry, entry.stat()) if isinstance(entry, Path) else (entry, None) for entry in entries]
    return tuple((entry, stat and (stat.st_size, stat.st_mtime_ns)) for entry, stat in stats)


@functools.lru_cache(maxsize=64)
def _files_have_turns(path: tuple[str, ...], split: str, state: tuple[Any, ...]) -> bool | None:
    """Returns `has_turns` of files. A run iterates over them several times, and each time would read them twice."""
    return has_turns(rows(path, split))


def _plain_pair(where: str, example: dict[str, Any]) -> Comparison | None:
    """Returns what `usual_columns` and `comparisons_from_columns` make of three texts and nothing else, or None."""
    if example.keys() != PAIR:
        return None
    prompt, chosen, rejected = texts = example["prompt"], example["chosen"], example["rejected"]
    if not type(prompt) is type(chosen) is type(rejected) is str:
        return None
    if not (prompt.isascii() and chosen.isascii() and rejected.isascii()) and any(map(SURROGATE.search, texts)):
        return None
    return Comparison(prompt, texts[1:], 1.0, where)


def _converter(columns: Mapping[str, str]) -> Callable[[str, dict[str, Any]], dict[str, Any] | Note]:
    return partial(map_columns, columns=columns) if columns else usual_columns


def rows(path: Sequence[str], split: str) -> Iterator[RawExample | UserError]:
    """Yields every example of the files and hub ids in `path`, in order; a bad example as its error.

    A hub id is `owner/name` or `owner/name:config`, optionally with `@revision` (a branch, tag or commit). `datasets`
    downloads it once and memory-maps its copy.
    """
    for entry in resolve_files(path, split):
        yield from examples_in_file(entry, split) if isinstance(entry, Path) else _hub(entry, split)


def is_hub_id(name: str) -> bool:
    """Returns whether a name is a hub id and not a file or glob."""
    is_file = glob.has_magic(name) or suffix(Path(name)) != "" or Path(name).exists()
    return not is_file and HUB_ID.fullmatch(name) is not None


def _hub(name: str, split: str) -> Iterator[RawExample]:
    import datasets
    import datasets.exceptions

    match = HUB_ID.fullmatch(name)
    assert match is not None
    *names, revision = match.groups()
    options = {"split": split} | ({"revision": revision} if revision else {})
    what = f"{name}: no such local path, and split {split!r} cannot be loaded from the hub"
    with hub_errors(what, "", datasets.exceptions.DatasetsError):
        table = datasets.load_dataset(*filter(None, names), **options)
    for number, example in enumerate(table, 1):
        yield f"{name}[{split}]:{number}", dict(example)


def _check_kind(where: str, found: list[Item], kinds: set[type]) -> None:
    """Adds the type of the first prompt to `kinds`; refuses prompts of the other type."""
    for item in found:
        if isinstance(item, Comparison):
            kinds.update({type(item.prompt)} if not kinds else ())
            if type(item.prompt) not in kinds:
                names = ("a conversation", "texts") if isinstance(item.prompt, Chat) else ("a text", "conversations")
                raise UserError(
                    f"{where}: {names[0]}, but the examples before it are {names[1]}; give each kind its own file, "
                    "as parts of a mixture (data.name)"
                )


def _once(item: Item, seen: set[bytes]) -> Item:
    """Returns the item, or a note if it repeats one: every pair of a prompt has the same chosen response."""
    if not isinstance(item, Comparison):
        return item
    key = hashlib.blake2b(repr([as_bytes(part) for part in (item.prompt, *item.responses)]).encode(), digest_size=12)
    if key.digest() in seen:
        return Note("examples left out: they repeat a prompt and its chosen response")
    seen.add(key.digest())
    return item


def resolve_files(path: Sequence[str], split: str) -> list[Path | str]:
    """Returns the data files of names, globs and folders: in the order given, sorted within a glob or folder.

    Hub ids are returned unchanged. In a folder (and all folders below it) the files of a split are `<split>.<suffix>`,
    the hub's shards `<split>-00000-of-00001.<suffix>`, and all files in a folder `<split>/`. If no name in the folder
    mentions a split, all files are the split `train`, as on the hub.

    Raises:
      UserError: nothing is found, a file would be read twice, or the choice of files is ambiguous.
    """
    if not path:
        raise UserError("data.path is empty; set it to files, globs, folders or hub ids")
    found = [file for entry in path for file in _entry(entry, split)]
    seen: set[Path | str] = set()
    for file in found:
        key = file.resolve() if isinstance(file, Path) else file
        if key in seen:
            raise UserError(f"{file}: named twice by data.path; name it once")
        seen.add(key)
    return found


def _entry(entry: str, split: str) -> Sequence[Path | str]:
    if not entry.strip():
        raise UserError("data.path: '' names no file; name files, folders or hub ids")
    if is_hub_id(entry):
        return [entry]
    place = expand_home(entry)
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
            raise UserError(f"{file}: unknown kind of data file; known: {', '.join(SUFFIXES)}")
    return found


def _folder(folder: Path, split: str) -> list[Path]:
    every = (file for file in folder.rglob("*") if file.is_file() and suffix(file))
    candidates = sorted(file for file in every if file.name not in METADATA)
    if not candidates:
        raise UserError(f"{folder}: no data files in this folder; known: {', '.join(SUFFIXES)}")
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
