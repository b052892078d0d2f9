"""The files of a model folder: their names, JSON, and parameters as safetensors. No other weight format is opened."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.tensor_map import Tensor, TreePath, in_layer, is_layered, pack_tensor, same_layout
from dpo_jax.records import Array

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # safetensors' names of the dtypes
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}  # bytes of a number
Fetch = Callable[[Any], np.ndarray]  # an array on any devices -> the same array in this host's memory


class HeaderEntry(NamedTuple):
    """A tensor in the header of a file: its shape, and safetensors' code of its dtype."""

    shape: tuple[int, ...]
    code: str

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * SIZES[self.code]


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a model folder: one, or the shards of an index.

    Raises:
      UserError: there are none, or the weights are a pickle only.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        return _shards_of(folder)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        how = "convert it with transformers: model.save_pretrained(folder, safe_serialization=True)"
        raise UserError(f"{folder}: has its weights only as a pickle, which is never read; {how}")
    raise UserError(f"{folder}: there are no weights; {WEIGHTS} or {INDEX} is needed")


def _shards_of(folder: Path) -> list[Path]:
    """Returns the files that an index names.

    Raises:
      UserError: the index is damaged, or names a file that is missing or outside the folder.
    """
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{folder / INDEX}: weight_map must name a file for each tensor; download the folder again")
    files = [folder / name for name in sorted(set(named.values()))]
    for file in files:
        if file.parent != folder or file.suffix != ".safetensors":
            raise UserError(f"{folder / INDEX}: names {str(file)!r}, which is no safetensors file beside it")
        if not file.exists():
            raise UserError(f"{file}: is missing, {INDEX} names it; download the folder again")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file is not JSON or holds no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def write_json(file: Path, value: Any) -> None:
    """Writes a value as indented JSON with sorted keys."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weights_hash(params: Mapping[str, Any], architecture: Architecture) -> str:
    """Returns 32 hex digits that identify a model: blake2b of all parameters and of the architecture's fields.

    Floats are hashed as float32, so that a bfloat16 copy of the same values has the same hash.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dataclasses.asdict(architecture), sort_keys=True).encode())
    for path, value in sorted(_flatten(params)):
        dtype = np.dtype(np.float32) if value.dtype in tuple(DTYPES.values()) else value.dtype
        digest.update(f"{path} {dtype} {value.shape}".encode())
        for i in range(value.shape[0]) if value.ndim > 2 else (slice(None),):  # one layer at a time
            array = np.ascontiguousarray(np.asarray(value[i]).astype(dtype, copy=False))
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def checkpoint_tensors(
    module: ModuleType, architecture: Architecture, table: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yields (name in the file, place in the parameter's stack, tensor) for every tensor of a checkpoint.

    The place is () for a parameter outside the layers, (layer,), or (layer, expert), where layers without the parameter
    are not counted.

    Args:
      module: the family.
      architecture: the architecture of the parameters.
      table: name -> tensor, with `{i}` or `{i:kind}` for the layer and `{e}` for the expert; by default the family's
        `tensors`.
    """
    experts = architecture.mixture.experts if architecture.mixture else 0
    for pattern, tensor in (table or module.tensors(architecture)).items():
        if not is_layered(pattern):
            yield pattern, (), tensor
            continue
        for place, i in enumerate(tensor.layers_of(architecture)):
            name = in_layer(pattern, i)
            if "{e}" not in pattern:
                yield name, (place,), tensor
            for e in range(experts if "{e}" in pattern else 0):
                yield name.replace("{e}", str(e)), (place, e), tensor
    if architecture.score:
        yield "score.weight", (), same_layout(("score",), 1, architecture.width)


def _flatten(tree: Mapping[str, Any], before: TreePath = ()) -> Iterator[tuple[TreePath, Array]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*before, key))
        else:
            yield (*before, key), value


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Returns the names per shard, in order; a shard has at most `limit` bytes, or a single larger tensor."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def tensors_of(
    params: Mapping[str, Any], module: ModuleType, architecture: Architecture, dtype: str, fetch: Fetch
) -> Iterator[np.ndarray]:
    """Yields the tensors of a checkpoint in the order of `checkpoint_tensors`, one in memory at a time.

    Args:
      params: parameters as numpy arrays, on devices, or lazy.
      module: the family.
      architecture: the architecture of the parameters.
      dtype: a key of `DTYPES`.
      fetch: copies an array to this host's memory.

    Raises:
      UserError: a value is beyond the range of float16.
    """
    flat = dict(_flatten(params))
    for name, place, tensor in checkpoint_tensors(module, architecture):
        values, kind = (flat[part.path] for part in tensor.parts), DTYPES[_file_dtype_of(tensor, dtype)]
        pieces = (value[place or slice(None)] for value in values)
        with np.errstate(over="ignore"):
            parts = [fetch(piece.astype(kind, copy=False)) for piece in pieces]
        if dtype == "float16" and not all(np.isfinite(part).all() for part in parts):
            raise UserError(f"{name}: has values beyond float16's 65,504; choose bfloat16 or float32")
        yield np.ascontiguousarray(pack_tensor(tensor, parts))


def entries_of(module: ModuleType, architecture: Architecture, dtype: str) -> dict[str, HeaderEntry]:
    """Returns the tensors of a checkpoint by name, in the order of `checkpoint_tensors`; `dtype` is in `DTYPES`."""
    tensors = checkpoint_tensors(module, architecture)
    return {name: HeaderEntry(tensor.shape, CODES[_file_dtype_of(tensor, dtype)]) for name, _, tensor in tensors}


def _file_dtype_of(tensor: Tensor, dtype: str) -> str:
    return "float32" if tensor.wide else dtype


def write_tensors(folder: Path, tensors: Iterator[np.ndarray], entries: Mapping[str, HeaderEntry], limit: int) -> None:
    """Writes tensors as safetensors: one file, or shards and an index if there are more than `limit` bytes.

    Needs the memory of one tensor beside the parameters.

    Args:
      folder: an existing folder.
      tensors: in the order of `entries`.
      entries: their names, shapes and dtypes.
      limit: bytes per file; a larger tensor gets a file of its own.
    """
    sizes = {name: entry.bytes for name, entry in entries.items()}
    shards = _shards(sizes, limit)
    one = len(shards) == 1
    names = [WEIGHTS if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(names, shards, strict=True):
        _write(folder / file, {name: entries[name] for name in members}, tensors)
    if not one:
        files = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})


def _write(file: Path, entries: Mapping[str, HeaderEntry], tensors: Iterator[np.ndarray]) -> None:
    """Writes a safetensors file tensor by tensor; the library's own function needs all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.bytes
        header[name] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in zip(entries, tensors, strict=False):
            f.write(tensor.reshape(-1).view(np.uint8).data)
