"""Tokenised data on disk: made once for the same content, written as it comes, and mapped into memory after that."""

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

from dpo_jax.data.encode import CHUNK, EncodeOptions, check_encode_options, encode_one
from dpo_jax.data.sources.base import Item, Note, as_bytes
from dpo_jax.data.table import KINDS, EncodeReport, EncodeTally, LengthQuantiles, Table
from dpo_jax.errors import UserError
from dpo_jax.records import Array, Tokens

CACHE_FORMAT = 3
ABANDONED = 24 * 3600  # seconds after which a draft that nobody finished is removed
log = logging.getLogger(__name__)


def cached_encode(items: Iterable[Item], tokenizer: Any, cache_dir: Path, **options: Any) -> tuple[Table, EncodeReport]:
    """`encode`, done once for the same content and opened from disk (memory-mapped) after that.

    An entry is a folder `tokens-<key>` in `cache_dir`, and appears whole or not at all. What it depends on is every
    text and number (not `where`), the tokenizer, and the options. Comparisons pass one by one, twice: memory does not
    grow with their number.

    Args:
      items: can be gone through again and again; else as for `encode`.
      tokenizer, options: as for `encode`.
      cache_dir: made if need be.

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
            log.warning("cache entry %s is damaged (%s) and is made again", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
    try:
        _write_entry(entry, items, tokenizer, chosen)
    except OSError as error:
        raise UserError(f"{cache_dir}: the cache cannot be written ({error}); choose another folder") from error
    return _open_entry(entry)


def write_table(folder: Path, tokens: Iterable[Tokens]) -> dict[str, str]:
    """Writes comparisons into a folder as a table's arrays, a chunk at a time.

    Returns:
      The blake2b of each array's file, by name.
    """
    with contextlib.ExitStack() as stack:
        arrays = {name: stack.enter_context(_Growing(folder / f"{name}.npy")) for name in KINDS}
        tokens = iter(tokens)
        while chunk := list(islice(tokens, CHUNK)):
            part, start = Table.of(chunk), arrays["ids"].size
            for name, array in arrays.items():
                values = getattr(part, name)
                array.append(values + start if name == "offsets" else values)
    return _digests(folder)


def write_unnamed(cache_dir: Path, tokens: Iterable[Tokens]) -> Table:
    """Comparisons as a table that lies on the cache's disk, without a name there, until the process has done with it.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        draft = _draft(cache_dir / "tokens-unnamed")
        try:
            write_table(draft, tokens)
            return Table.open(draft)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # the memory that it is mapped into keeps it
    except OSError as error:
        raise UserError(f"{cache_dir}: the cache cannot be written ({error}); choose another folder") from error


class _Growing:
    """An array's file to which more is added along the first axis."""

    def __init__(self, path: Path):
        self.size, self._file, self._kind = 0, path.open("wb"), {}

    def __enter__(self) -> "_Growing":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_header()
        self._file.close()

    def append(self, values: Array) -> None:
        if not self._kind:
            self._kind = {"descr": npy.dtype_to_descr(values.dtype), "fortran_order": False, "shape": values.shape}
            self._write_header()
        self._file.write(np.ascontiguousarray(values).data)
        self.size += len(values)

    def _write_header(self) -> None:
        """Writes or renews the header, in which numpy leaves room for the first axis to grow."""
        if self._kind:
            self._file.seek(0)
            npy.write_array_header_1_0(self._file, {**self._kind, "shape": (self.size, *self._kind["shape"][1:])})


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for name in KINDS:
        with (folder / f"{name}.npy").open("rb") as file:
            found[name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return found


def _key(items: Iterable[Item], tokenizer: Any, options: EncodeOptions) -> str:
    """Hash of all that the table depends on; every text goes in with its length, so none runs into the next."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls switch these two on and off in a tokenizer in use, and encode() overrules them.
    model.update(padding=None, truncation=None)
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, bool(getattr(tokenizer, "split_special_tokens", False)))
    template = tokenizer.chat_template
    head = json.dumps([CACHE_FORMAT, model, special, template, sorted(options._asdict().items())])
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for part in _parts(items):
        digest.update(part)
    return digest.hexdigest()


def _parts(items: Iterable[Item]) -> Iterator[bytes]:
    for item in items:
        if isinstance(item, UserError | Note):
            yield repr(item).encode("utf-8", "surrogatepass")
            continue
        texts = [as_bytes(part) for part in (item.prompt, *item.responses)]
        numbers = (float(item.weight), float(item.preference), item.misplaced, *map(float, item.scores))
        yield f"{[*map(len, texts)]}{numbers!r}".encode()
        yield from texts


def _write_entry(entry: Path, items: Iterable[Item], tokenizer: Any, options: EncodeOptions) -> None:
    """Makes the entry beside its place and renames it there."""
    draft = _draft(entry)
    try:
        tally = EncodeTally()
        digests = write_table(draft, encode_one(items, tokenizer, options, tally))
        content = {"digests": digests, "report": tally.report()._asdict()}
        (draft / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        draft.rename(entry)
    except OSError:
        # Another process that was faster with the same content is as good.
        if not entry.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(entry: Path) -> Path:
    """Makes a folder beside an entry, for what is to become it."""
    draft = entry.with_name(f"{entry.name}.{os.getpid()}-{secrets.token_hex(4)}")
    draft.mkdir(parents=True)
    _sweep(entry.parent)
    return draft


def _sweep(cache_dir: Path) -> None:
    """Removes drafts that killed runs have left."""
    for draft in cache_dir.glob("tokens-*.*"):
        if time.time() - draft.stat().st_mtime > ABANDONED:
            shutil.rmtree(draft, ignore_errors=True)


def _open_entry(entry: Path) -> tuple[Table, EncodeReport]:
    content = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    if content["digests"] != _digests(entry):
        raise ValueError("its arrays are not those that were written")
    fields = content["report"]
    spans = {name: LengthQuantiles(*fields[name]) for name in ("prompt", "response", "whole")}
    return Table.open(entry), EncodeReport(**{**fields, **spans})
