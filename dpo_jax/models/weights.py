"""Parameters in and out of safetensors files, by a family's table of tensors. No other format is ever opened."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.layout import Path as Keys
from dpo_jax.models.layout import Tensor, to_ours, to_theirs
from dpo_jax.records import Array, UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORED = ("F32", "BF16", "F16", "F64")  # safetensors' names of the number formats that can be read


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a model folder: one, or the shards of an index.

    Raises:
      UserError: there are none, or only pickles.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        files = [folder / name for name in sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))]
        for file in files:
            if not file.exists():
                raise UserError(f"{file}: is missing, {INDEX} names it; download the folder again")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        how = "convert it with transformers: model.save_pretrained(folder, safe_serialization=True)"
        raise UserError(f"{folder}: has its weights only as a pickle, which is never read; {how}")
    raise UserError(f"{folder}: there are no weights; {WEIGHTS} or {INDEX} is needed")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: it is not JSON, or no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def write_json(file: Path, value: Any) -> None:
    """Writes a value as JSON with sorted keys, one to a line."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weights_hash(params: Mapping[str, Any], architecture: Architecture) -> str:
    """Returns 32 hex digits that identify a model: blake2b of all parameters and of the architecture's fields."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dataclasses.asdict(architecture), sort_keys=True).encode())
    for path, value in sorted(_flatten(params)):
        array = np.ascontiguousarray(value)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _expand(module: ModuleType, architecture: Architecture) -> Iterator[tuple[str, int | None, Tensor]]:
    """Yields (name in the file, layer or None, tensor) for every tensor of a checkpoint."""
    for pattern, tensor in module.tensors(architecture).items():
        if "{i}" not in pattern:
            yield pattern, None, tensor
            continue
        for i in range(architecture.layers):
            yield pattern.replace("{i}", str(i)), i, tensor


def _read_tensors(
    files: list[Path], module: ModuleType, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name without the family's prefix, float32 array) of every tensor in `shapes`.

    Raises:
      UserError: a damaged file, or a tensor that is not wanted, of another shape or no float.
    """
    for file in files:
        try:
            with safe_open(file, framework="numpy") as source:
                for key in source.keys():  # noqa: SIM118 (it is no dict)
                    name, view = key.removeprefix(module.PREFIX), source.get_slice(key)
                    if name not in shapes:
                        _check_buffer(file, key, module)
                        continue
                    _check(file, key, view, shapes[name])
                    yield name, np.asarray(source.get_tensor(key)).astype(np.float32)
        except SafetensorError as error:
            raise UserError(f"{file}: is damaged or no safetensors file ({error}); download it again") from None


def _check(file: Path, key: str, view: Any, expected: tuple[int, ...]) -> None:
    found = tuple(view.get_shape())
    if found != expected:
        raise UserError(f"{file}: tensor {key} has shape {found}, but by config.json it should be {expected}")
    if view.get_dtype() not in STORED:
        raise UserError(f"{file}: tensor {key} is {view.get_dtype()}; only {', '.join(STORED)} can be read")


def _check_buffer(file: Path, key: str, module: ModuleType) -> None:
    if not re.search(rf"(^|\.)({'|'.join(map(re.escape, module.BUFFERS))})$", key):
        raise UserError(f"{file}: tensor {key} is not part of a {module.CLASS}; is model_type right in config.json?")


def read_params(files: list[Path], module: ModuleType, architecture: Architecture) -> dict[str, Any]:
    """Returns the parameters in safetensors files, numpy float32.

    Args:
      files: all files of a checkpoint, in one folder.
      module: the family.
      architecture: what the parameters belong to.

    Raises:
      UserError: a damaged file; a tensor too many, too few or of another shape; a tied head that is not the embedding.
    """
    wanted = {name.removeprefix(module.PREFIX): (i, tensor) for name, i, tensor in _expand(module, architecture)}
    shapes = {name: tensor.shape for name, (_, tensor) in wanted.items()}
    if architecture.tied:
        shapes[module.HEAD] = (architecture.vocab, architecture.width)  # in the file it may be, again or only
    flat: dict[Keys, np.ndarray] = {}
    found, head = set(), None
    for name, value in _read_tensors(files, module, shapes):
        if name not in wanted:
            head = value
            continue
        found.add(name)
        layer, tensor = wanted[name]
        for (path, *_), part in zip(tensor.parts, to_ours(tensor, value), strict=True):
            if layer is None:
                flat[path] = np.ascontiguousarray(part)
            else:
                flat.setdefault(path, np.empty((architecture.layers, *part.shape), np.float32))[layer] = part
    if head is not None:
        found |= _tie(files[0].parent, flat, head, module, architecture)
    names = [name for name, _, _ in _expand(module, architecture)]
    _check_complete(files[0].parent, [name for name in names if name.removeprefix(module.PREFIX) not in found])
    return _nest(flat)


def _tie(
    folder: Path, flat: dict[Keys, np.ndarray], head: np.ndarray, module: ModuleType, architecture: Architecture
) -> set[str]:
    """Takes a tied head for the embedding, if the file has it under this name only; returns what it stands for."""
    key: Keys = ("embedding",)
    if not np.array_equal(head, flat.setdefault(key, head)):
        why = f"{module.HEAD} differs from the embedding though the config ties them"
        raise UserError(f"{folder}: {why}; set tie_word_embeddings to false in config.json")
    table = module.tensors(architecture)
    return {name.removeprefix(module.PREFIX) for name, tensor in table.items() if tensor.parts[0].path == key}


def _check_complete(folder: Path, missing: list[str]) -> None:
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor {missing[0]} is missing{more}; the file does not fit config.json")


def _nest(flat: Mapping[Keys, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def _flatten(tree: Mapping[str, Any], before: Keys = ()) -> Iterator[tuple[Keys, Array]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*before, key))
        else:
            yield (*before, key), value


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Returns names in order, cut so that no shard is above `limit` bytes unless it is one tensor."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_params(
    folder: Path, params: Mapping[str, Any], module: ModuleType, architecture: Architecture, dtype: str, limit: int
) -> None:
    """Writes parameters as safetensors, with an index where there are more than `limit` bytes.

    Args:
      folder: where; it exists.
      params: the parameters, numpy or on devices.
      module: the family.
      architecture: what the parameters belong to.
      dtype: a name of `DTYPES`.
      limit: bytes in a file; a larger tensor has one to itself.
    """
    table = {name: (i, tensor) for name, i, tensor in _expand(module, architecture)}
    kind = np.dtype(DTYPES[dtype])
    flat = {path: np.asarray(value) for path, value in _flatten(params)}

    def tensor_of(name: str) -> np.ndarray:
        layer, tensor = table[name]
        parts = [flat[part.path] if layer is None else flat[part.path][layer] for part in tensor.parts]
        return np.ascontiguousarray(to_theirs(tensor, parts).astype(kind))

    sizes = {name: math.prod(tensor.shape) * kind.itemsize for name, (_, tensor) in table.items()}
    shards = _shards(sizes, limit)
    one = len(shards) == 1
    names = [WEIGHTS if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(names, shards, strict=True):
        save_file({name: tensor_of(name) for name in members}, folder / file, metadata={"format": "pt"})
    if not one:
        files = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})
