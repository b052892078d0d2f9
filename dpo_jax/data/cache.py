"""Tokenized data on disk: encoded once for the same content, written in chunks, and memory-mapped afterwards.

The cache is a folder of entries `tokens-<key>`; the key is a hash of everything the table depends on (`_key`). An entry
has one .npy file for each array of `Table` and `report.json`: {"digests": {array: blake2b of its file}, "report":
fields of `EncodeReport`}. It is written to a draft folder `tokens-<key>.<pid>-<random>` and then renamed, so that an
entry is complete or absent, however many processes write it and whenever they are killed. Opening compares the digests,
so that a damaged entry is encoded again and never trained on.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from dpo_jax.data.encode import CHUNK, EncodeOptions, check_encode_options, encode_stream
from dpo_jax.data.report import EncodeReport, EncodeTally, LengthQuantiles, WeightedResponses
from dpo_jax.data.sources.base import Item, Note, as_bytes
from dpo_jax.data.table import KINDS, PLACES, Table
from dpo_jax.errors import UserError
from dpo_jax.paths import ABANDONED
from dpo_jax.records import Tokens

# Part of every key. Raise it when the arrays or the report change, or when the same content encodes differently.
CACHE_FORMAT = 7
log = logging.getLogger(__name__)


def cached_encode(items: Iterable[Item], tokenizer: Any, cache_dir: Path, **options: Any) -> tuple[Table, EncodeReport]:
    """Returns what `encode` does, as a memory-mapped table; the same content is encoded only once.

    Two passes are made over the items, one for the key and one to encode. Memory does not grow with their number.

    Args:
      items: as for `encode`, and re-iterable.
      tokenizer: as for `encode`.
      cache_dir: the folder of the entries, created if it does not exist.
      options: as for `encode`.

    Raises:
      UserError: as `encode`; or the cache folder cannot be written.
    """
    chosen = EncodeOptions(**options)
    check_encode_options(tokenizer, chosen)
    entry = cache_dir / f"tokens-{_key(items, tokenizer, chosen)}"
    if entry.exists():
        try:
            return _open_entry(entry)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            log.warning("cache entry %s is damaged (%s); encoding again", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
            if entry.exists():
                raise UserError(f"{entry}: damaged and not yours to remove; set DPO_JAX_CACHE") from error
    with _writable(cache_dir):
        _write_entry(entry, items, tokenizer, chosen)
    return _open_entry(entry)


def write_table(folder: Path, tokens: Iterable[Tokens]) -> dict[str, str]:
    """Writes comparisons as the arrays of a table, a chunk at a time, for `Table.open`.

    Returns:
      Array name -> blake2b of its file.
    """
    with contextlib.ExitStack() as stack:
        arrays = {name: stack.enter_context(_GrowingArray(folder / f"{name}.npy")) for name in KINDS}
        tokens = iter(tokens)
        while chunk := list(islice(tokens, CHUNK)):
            part, start = Table.of(chunk), arrays["ids"].size
            for name, array in arrays.items():
                values = getattr(part, name)
                array.append(values + start if name in ("offsets", *PLACES) else values)
    return _digests(folder)


def write_unnamed(cache_dir: Path, tokens: Iterable[Tokens]) -> Table:
    """Returns comparisons as a memory-mapped table without a cache entry; its files vanish when the process ends.

    Raises:
      UserError: the cache folder cannot be written.
    """
    with _writable(cache_dir):
        draft = _draft(cache_dir / "tokens-unnamed")
        try:
            write_table(draft, tokens)
            return Table.open(draft)
        finally:
            # The mapping keeps the deleted files' contents alive.
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _writable(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{cache_dir}: the cache cannot be written ({error}); choose another folder") from error


class _GrowingArray:
    """A .npy file to which arrays are appended along the first axis."""

    def __init__(self, path: Path):
        self.size, self._file, self._header = 0, path.open("wb"), {}

    def __enter__(self) -> "_GrowingArray":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_header()
        self._file.close()

    def append(self, values: np.ndarray) -> None:
        if not self._header:
            self._header = {"descr": npy.dtype_to_descr(values.dtype), "fortran_order": False, "shape": values.shape}
            self._write_header()
        self._file.write(np.ascontiguousarray(values).data)
        self.size += len(values)

    def _write_header(self) -> None:
        """Writes the header, or overwrites it with the final size: numpy pads headers so that the size can grow."""
        if self._header:
            self._file.seek(0)
            npy.write_array_header_1_0(self._file, {**self._header, "shape": (self.size, *self._header["shape"][1:])})


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for name in KINDS:
        with (folder / f"{name}.npy").open("rb") as file:
            found[name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return found


def _key(items: Iterable[Item], tokenizer: Any, options: EncodeOptions) -> str:
    """Returns a blake2b hash of all that the table depends on: items (without `where`), tokenizer and options.

    Switches padding and truncation of the tokenizer off.
    """
    # Calling a tokenizer writes its padding and truncation into its JSON; encode() sets both itself.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    model = tokenizer.backend_tokenizer.to_str()
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, bool(getattr(tokenizer, "split_special_tokens", False)))
    template = tokenizer.chat_template
    head = json.dumps([CACHE_FORMAT, model, special, template, sorted(options._asdict().items())])
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for part in _hashed_parts(items):
        digest.update(part)
    return digest.hexdigest()


def _hashed_parts(items: Iterable[Item]) -> Iterator[bytes]:
    """Yields the bytes of each item. Lengths come before texts, so that ("ab", "c") and ("a", "bc") differ."""
    for item in items:
        if isinstance(item, UserError | Note):
            yield repr(item).encode("utf-8", "surrogatepass")
            continue
        texts = [*map(as_bytes, (item.prompt, *item.responses))]
        numbers = (float(item.weight), float(item.preference), item.misplaced, *map(float, item.scores))
        yield b"".join([f"{[*map(len, texts)]}{numbers!r}{item.token_weights!r}".encode(), *texts])


def _write_entry(entry: Path, items: Iterable[Item], tokenizer: Any, options: EncodeOptions) -> None:
    """Writes an entry as a draft beside it, then renames the draft."""
    draft = _draft(entry)
    try:
        tally = EncodeTally()
        digests = write_table(draft, encode_stream(items, tokenizer, options, tally))
        content = {"digests": digests, "report": tally.report()._asdict()}
        (draft / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        draft.rename(entry)
    except OSError:
        # The rename fails if another process has written the same entry meanwhile, which serves as well.
        if not entry.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(entry: Path) -> Path:
    """Creates a draft folder beside an entry, with a name that no other process uses."""
    draft = entry.with_name(f"{entry.name}.{os.getpid()}-{secrets.token_hex(4)}")
    draft.mkdir(parents=True)
    _remove_abandoned(entry.parent)
    return draft


def _remove_abandoned(cache_dir: Path) -> None:
    for draft in cache_dir.glob("tokens-*.*"):
        with contextlib.suppress(FileNotFoundError):  # another process has finished it
            if time.time() - draft.stat().st_mtime > ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def _open_entry(entry: Path) -> tuple[Table, EncodeReport]:
    content = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    if content["digests"] != _digests(entry):
        raise ValueError("its arrays differ from those written")
    fields = content["report"]
    spans = {name: LengthQuantiles(*fields[name]) for name in ("prompt", "response", "sequence")}
    weights = WeightedResponses(*fields["token_weights"])
    return Table.open(entry), EncodeReport(**{**fields, **spans, "token_weights": weights})
