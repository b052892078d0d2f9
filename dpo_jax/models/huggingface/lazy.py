"""Parameters in safetensors files, by a family's table of tensors: checked at once, read when they are looked at."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.tensor_map import Index, Tensor, TensorPart, cut, tensor_shape
from dpo_jax.models.families.tensor_map import TreePath as Keys
from dpo_jax.models.huggingface.safetensors import expand

# Safetensors' names of the number formats that can be read, and what holds each on a device.
STORED = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float32}
SHOWN = 20  # names in a message
ROWS = 8192  # of an embedding that are read or compared at a time


class _Place(NamedTuple):
    """Where one layer of a parameter is."""

    file: Path
    key: str
    stamp: tuple[int, int]
    tensor: Tensor
    part: TensorPart
    stored: str

    def read(self, index: Index, dtype: Any) -> np.ndarray:
        """Returns a block of it.

        Raises:
          UserError: the file is another one than when it was opened.
        """
        if not self.file.exists() or _stamp(self.file) != self.stamp:
            raise UserError(f"{self.file}: was changed or removed while it was in use; put it back and run again")
        with safe_open(self.file, framework="numpy") as source:
            return cut(self.tensor, self.part, index, source.get_slice(self.key)).astype(dtype, copy=False)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


class LazyArray:
    """A parameter in safetensors files: read when it is looked at, and no more of it than is asked for."""

    def __init__(self, places: list[_Place], stacked: bool, dtype: Any = np.float32):
        """`places` are its layers where it is stacked, else one; `dtype` is that in which it is read."""
        one = tensor_shape(places[0].tensor, places[0].part)
        self.shape = (len(places), *one) if stacked else one
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.dtype, self._places, self._stacked = np.dtype(dtype), places, stacked

    def narrow(self) -> "LazyArray":
        """Returns the parameter with numbers as wide as in the files, which has the same values."""
        kinds = {STORED[place.stored] for place in self._places}
        return LazyArray(self._places, self._stacked, kinds.pop() if len(kinds) == 1 else np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns a block, from slices of the first axes; instead of the first it may be a layer's number."""
        given = index if isinstance(index, tuple) else (index,)
        given += (slice(None),) * (self.ndim - len(given))
        first, rest = given[0], given[1:]
        if not isinstance(first, slice):
            return self._places[first].read(rest, self.dtype)
        shape = (len(range(*cut.indices(size))) for cut, size in zip(given, self.shape, strict=True))
        out = np.empty(tuple(shape), self.dtype)
        if self._stacked:
            for i, place in enumerate(self._places[first]):
                out[i] = place.read(rest, self.dtype)
            return out
        start = first.indices(self.shape[0])[0]
        for low in range(0, len(out), ROWS):  # what the file has, and what is made of it, is never all there twice
            high = min(low + ROWS, len(out))
            out[low:high] = self._places[0].read((slice(start + low, start + high), *rest), self.dtype)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all of it, in memory of its own."""
        return self[:].astype(dtype or self.dtype, copy=False)


def load_into_memory(params: Any) -> Any:
    """Returns parameters with every leaf read into the host's memory."""
    return jax.tree.map(np.asarray, params)


def narrow_dtypes(params: Any) -> Any:
    """Returns parameters with numbers as wide as in their files: for those that are not trained. Widening is exact."""
    return jax.tree.map(lambda x: x.narrow() if isinstance(x, LazyArray) else x, params)


class _Header(NamedTuple):
    """What a file says of one of its tensors."""

    file: Path
    key: str
    stamp: tuple[int, int]
    shape: tuple[int, ...]
    stored: str


def _headers(files: list[Path], module: ModuleType) -> dict[str, _Header]:
    """Returns what is in the files, by name without the family's prefix, but for buffers.

    Raises:
      UserError: a damaged file, or a tensor in two of them.
    """
    found: dict[str, _Header] = {}
    for file in files:
        stamp = _stamp(file)
        try:
            with safe_open(file, framework="numpy") as source:
                for key in source.keys():  # noqa: SIM118 (it is no dict)
                    name, view = key.removeprefix(module.PREFIX), source.get_slice(key)
                    if name in found:
                        raise UserError(f"{file}: tensor {key} is in {found[name].file.name} too; remove one of them")
                    found[name] = _Header(file, key, stamp, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise UserError(f"{file}: is damaged or no safetensors file ({error}); download it again") from None
    return found


def _named(keys: list[str], one: str, several: str) -> str:
    """Returns `tensor a is ...` or `tensors a, b are ...`, all named unless they are very many."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    names = f"{', '.join(keys[:SHOWN])}{more}"
    return f"tensor {names} {one}" if len(keys) == 1 else f"tensors {names} {several}"


def _check(folder: Path, found: Mapping[str, _Header], wanted: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Refuses tensors that are no part of the model, of another shape, or no floats."""
    extra = [header for key, header in found.items() if key not in wanted]
    if extra:
        what = _named([header.key for header in extra], "is", "are")
        raise UserError(f"{extra[0].file}: {what} not part of a {name}; is model_type right in config.json?")
    for key, header in found.items():
        where = f"{header.file}: tensor {header.key}"
        if header.shape != wanted[key]:
            raise UserError(f"{where} has shape {header.shape}, but by config.json it should be {wanted[key]}")
        if header.stored not in STORED:
            raise UserError(f"{where} is {header.stored}; only {', '.join(STORED)} can be read")


def lazy_params(files: list[Path], module: ModuleType, architecture: Architecture) -> tuple[dict[str, Any], str]:
    """Returns the parameters in safetensors files, not yet read, and the dtype that holds all of them.

    What is wrong with them is found now, from the files' headers.

    Args:
      files: all files of a checkpoint, in one folder.
      module: the family.
      architecture: what the parameters belong to.

    Raises:
      UserError: a damaged file; a tensor too many, too few or of another shape; a tied head that is not the embedding.
    """
    found = _headers(files, module)
    buffer = re.compile(rf"(^|\.)({'|'.join(map(re.escape, module.BUFFERS)) or '(?!)'})$")
    found = {name: header for name, header in found.items() if not buffer.search(header.key)}
    table = {name.removeprefix(module.PREFIX): (i, tensor) for name, i, tensor in expand(module, architecture)}
    shapes = {name: tensor.shape for name, (_, tensor) in table.items()}
    if architecture.tied and not architecture.score:
        shapes[module.HEAD] = (architecture.vocab, architecture.width)  # in the file it may be, again or only
    _check(files[0].parent, found, shapes, module.CLASS)
    if architecture.tied and module.HEAD in found:
        found = _tied(files[0].parent, found, module, table)
    missing = [name for name, _, _ in expand(module, architecture) if name.removeprefix(module.PREFIX) not in found]
    if missing:
        why = "the file does not fit config.json"
        if missing == [module.HEAD]:
            why = "if the embedding is its head too, set tie_word_embeddings to true in config.json"
        raise UserError(f"{files[0].parent}: {_named(missing, 'is missing', 'are missing')}; {why}")
    places: dict[Keys, list[_Place]] = {}
    for name, (_, tensor) in table.items():  # layers in their order
        for part in tensor.parts:
            places.setdefault(part.path, []).append(_Place(*found[name][:3], tensor, part, found[name].stored))
    stacked = {part.path: layer is not None for layer, tensor in table.values() for part in tensor.parts}
    return _nest({path: LazyArray(of, stacked[path]) for path, of in places.items()}), _dtype(found)


def _dtype(found: Mapping[str, _Header]) -> str:
    """Returns the dtype in which all tensors can be written as they were; float64 is not written."""
    kinds = {header.stored for header in found.values()}
    return {"BF16": "bfloat16", "F16": "float16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _tied(folder: Path, found: dict[str, _Header], module: ModuleType, table: Mapping[str, Any]) -> dict[str, _Header]:
    """Returns what is there with the tied head for the embedding, if the file has it under the head's name only."""
    name = next(name for name, (_, tensor) in table.items() if tensor.parts[0].path == ("embedding",))
    head = found[module.HEAD]
    rest = {key: header for key, header in found.items() if key != module.HEAD}
    if name not in rest:
        return {**rest, name: head}
    for start in range(0, head.shape[0], ROWS):
        one, two = (_rows(header, start) for header in (head, rest[name]))
        if not np.array_equal(one, two):
            why = f"{module.HEAD} differs from the embedding though the config ties them"
            raise UserError(f"{folder}: {why}; set tie_word_embeddings to false in config.json")
    return rest


def _rows(header: _Header, start: int) -> np.ndarray:
    with safe_open(header.file, framework="numpy") as source:
        return source.get_slice(header.key)[start : min(start + ROWS, header.shape[0])]


def _nest(flat: Mapping[Keys, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
