"""Lazy parameters backed by safetensors files: headers are validated on open, values are read on access."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.tensor_map import (
    Index,
    Tensor,
    TensorPart,
    TreePath,
    in_layer,
    param_shape,
    read_block,
)
from dpo_jax.models.families.wrappers import ELSEWHERE, FURTHER, language_model_name
from dpo_jax.models.huggingface.mxfp4 import BLOCKS, CODE, SCALES, Unpacked, unpacked_shape
from dpo_jax.models.huggingface.safetensors import checkpoint_tensors

log = logging.getLogger(__name__)

# Readable dtypes, by safetensors' code, and the dtype that holds each on a device.
READABLE = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float32}
READABLE[CODE] = ml_dtypes.bfloat16
SHOWN = 20  # tensor names in a message
ROWS = 8192  # rows of an embedding that are read or compared at a time


class _Header(NamedTuple):
    """A tensor according to the header of its file.

    Attributes:
      file: the safetensors file.
      key: name of the tensor in it.
      stamp: size and modification time of the file when it was opened.
      shape: of the tensor; in MXFP4 that of its numbers.
      code: safetensors' code of its dtype, or MXFP4.
      scales: those of a tensor in MXFP4, whose blocks this is.
    """

    file: Path
    key: str
    stamp: tuple[int, int]
    shape: tuple[int, ...]
    code: str
    scales: "_Header | None" = None

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """Gives what is indexed by one slice per axis to read the tensor.

        Raises:
          UserError: the file has changed since it was opened.
        """
        if not self.file.exists() or _stamp(self.file) != self.stamp:
            raise UserError(f"{self.file}: was changed or removed while it was in use; put it back and run again")
        with safe_open(self.file, framework="numpy") as source:
            own = source.get_slice(self.key)
            if self.scales is None:
                yield own
                return
            with self.scales.opened() as scales:
                yield Unpacked(own, scales)


class _LayerSource(NamedTuple):
    """Where one layer of a parameter is on disk: the tensor, its layout, and the parameter in it."""

    header: _Header
    tensor: Tensor
    part: TensorPart

    def read(self, index: Index, dtype: Any) -> np.ndarray:
        """Returns a block."""
        with self.header.opened() as source:
            return read_block(self.tensor, self.part, index, source).astype(dtype, copy=False)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


class LazyArray:
    """A parameter on disk. Indexing reads the block that is asked for, and little more."""

    def __init__(self, sources: list[_LayerSource], stack: tuple[int, ...], dtype: Any = np.float32):
        """Creates the array from one source, or from a `stack` of them: [L] layers or their experts [L, E].

        `dtype` is that of all reads.
        """
        self.shape = (*stack, *param_shape(sources[0].tensor, sources[0].part))
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.dtype, self._sources, self._stack = np.dtype(dtype), sources, stack

    def narrow(self) -> "LazyArray":
        """Returns the same array in the dtype of its files (float32 if they have several, or float64)."""
        kinds = {READABLE[source.header.code] for source in self._sources}
        return LazyArray(self._sources, self._stack, kinds.pop() if len(kinds) == 1 else np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns a block, from slices of the first axes; those of a stack may be integers, a layer and an expert."""
        given = index if isinstance(index, tuple) else (index,)
        given += (slice(None),) * (self.ndim - len(given))
        deep = len(self._stack)
        which, rest = np.arange(len(self._sources)).reshape(self._stack)[given[:deep]], given[deep:]
        if deep and not which.ndim:
            return self._sources[int(which)].read(rest, self.dtype)
        shape = (len(range(*part.indices(size))) for part, size in zip(rest, self.shape[deep:], strict=True))
        out = np.empty((*which.shape, *shape), self.dtype)
        if deep:
            for place in np.ndindex(which.shape):
                out[place] = self._sources[which[place]].read(rest, self.dtype)
            return out
        first, rest = rest[0], rest[1:]
        start = first.indices(self.shape[0])[0]
        for low in range(0, len(out), ROWS):  # in pieces: the dtype of the file and `dtype` are never both complete
            high = min(low + ROWS, len(out))
            out[low:high] = self._sources[0].read((slice(start + low, start + high), *rest), self.dtype)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the complete array, in newly allocated memory."""
        return self[:].astype(dtype or self.dtype, copy=False)


def load_into_memory(params: Any) -> Any:
    """Returns parameters with every leaf read into host memory."""
    return jax.tree.map(np.asarray, params)


def narrow_dtypes(params: Any) -> Any:
    """Returns lazy parameters in the dtypes of their files, for parameters that are not trained. Widening is exact."""
    return jax.tree.map(lambda x: x.narrow() if isinstance(x, LazyArray) else x, params)


def _headers(files: list[Path], module: ModuleType, within: bool) -> dict[str, _Header]:
    """Returns the tensors in the files, by name without the family's prefix, except buffers, parts for images
    and heads for further tokens.

    `within` tells that the files hold a model that reads images too.

    Raises:
      UserError: a file is damaged, or two of them hold the same tensor.
    """
    found: dict[str, _Header] = {}
    further = 0
    for file in files:
        stamp = _stamp(file)
        try:
            with safe_open(file, framework="numpy") as source:
                for key in source.keys():  # noqa: SIM118 (it is no dict)
                    if key.startswith(ELSEWHERE if within else FURTHER):
                        further += not within
                        continue
                    own = language_model_name(key, module.PREFIX) if within else key.removeprefix(module.PREFIX)
                    name, view = own, source.get_slice(key)
                    if name in found:
                        raise UserError(f"{file}: tensor {key} is in {found[name].file.name} too; remove one of them")
                    found[name] = _Header(file, key, stamp, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            why = " ".join(str(error).split())
            raise UserError(f"{file}: is damaged or no safetensors file ({why}); download it again") from None
    if further:
        what = "tensors of heads for further tokens (mtp) are neither read nor exported"
        log.info(f"{files[0].parent}: {further} {what}")
    buffer = re.compile(rf"(^|\.)({'|'.join(map(re.escape, module.BUFFERS)) or '(?!)'})$")
    return _with_scales({name: header for name, header in found.items() if not buffer.search(header.key)})


def _without_further_layers(folder: Path, found: Mapping[str, _Header], layers: int) -> dict[str, _Header]:
    """Returns headers without those of layers after the model's that predict further tokens: they have an `eh_proj`."""
    numbered = {name: re.match(r"layers\.(\d+)\.", name) for name in found}
    numbers = {name: int(match[1]) for name, match in numbered.items() if match}
    heads = {i for name, i in numbers.items() if name == f"layers.{i}.eh_proj.weight" and i >= layers}
    if not heads:
        return dict(found)
    rest = {name: header for name, header in found.items() if numbers.get(name) not in heads}
    which = ", ".join(f"layers.{i}" for i in sorted(heads))
    what = f"tensors of heads for further tokens ({which}) are neither read nor exported"
    log.info(f"{folder}: {len(found) - len(rest)} {what}")
    return rest


def _without_unread(
    folder: Path, found: Mapping[str, _Header], module: ModuleType, architecture: Architecture
) -> dict[str, _Header]:
    """Returns headers without those of the family's `unread_tensors`."""
    names = module.unread_tensors(architecture) if hasattr(module, "unread_tensors") else set()
    rest = {name: header for name, header in found.items() if f"{module.PREFIX}{name}" not in names}
    if len(rest) < len(found):
        log.info(f"{folder}: {len(found) - len(rest)} tensors that no layer uses are neither read nor exported")
    return rest


def _with_scales(found: Mapping[str, _Header]) -> dict[str, _Header]:
    """Returns headers in which blocks and scales of MXFP4 are one, by the name of the blocks.

    Raises:
      UserError: blocks have no scales, or others than theirs.
    """
    joined = dict(found)
    for name, header in found.items():
        if not name.endswith(BLOCKS) or header.code != "U8":
            continue
        scales = joined.pop(name.removesuffix(BLOCKS) + SCALES, None)
        beside = header.key.removesuffix(BLOCKS) + SCALES
        if scales is None:
            raise UserError(f"{header.file}: tensor {beside} is missing, {header.key} needs it; download it again")
        shape = unpacked_shape(header.shape, scales.shape)
        if shape is None or scales.code != "U8":
            why = f"tensor {beside} has shape {scales.shape}, which does not fit {header.key}, {header.shape}"
            raise UserError(f"{scales.file}: {why}; download it again")
        joined[name] = header._replace(shape=shape, code=CODE, scales=scales)
    return joined


def _tensor_list(keys: list[str], one: str, several: str) -> str:
    """Returns `tensor a is ...` or `tensors a, b are ...`, with at most `SHOWN` names."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    names = f"{', '.join(keys[:SHOWN])}{more}"
    return f"tensor {names} {one}" if len(keys) == 1 else f"tensors {names} {several}"


def _check_headers(found: Mapping[str, _Header], wanted: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raises UserError for a tensor that is not part of the model, has another shape, or is not of a readable dtype."""
    extra = [header for key, header in found.items() if key not in wanted]
    if extra:
        what = _tensor_list([header.key for header in extra], "is", "are")
        raise UserError(f"{extra[0].file}: {what} not part of a {name}; check model_type in config.json")
    for key, header in found.items():
        where = f"{header.file}: tensor {header.key}"
        if header.shape != wanted[key]:
            raise UserError(f"{where} has shape {header.shape}, but by config.json it should be {wanted[key]}")
        if header.code not in READABLE:
            raise UserError(f"{where} is {header.code}; only {', '.join(READABLE)} can be read")


def lazy_params(
    files: list[Path], module: ModuleType, architecture: Architecture, within: bool = False
) -> tuple[dict[str, Any], str]:
    """Returns lazy parameters of safetensors files, and the dtype in which all of them can be written exactly.

    Reads the headers of the files only; all errors are found now.

    Args:
      files: all files of a checkpoint, in one folder.
      module: the family.
      architecture: the architecture of the parameters.
      within: the files hold a model that reads images too, of which this is the language model.

    Raises:
      UserError: a file is damaged; a tensor is missing, unknown or of another shape; a tied head differs from the
        embedding.
    """
    folder, found = files[0].parent, _headers(files, module, within)
    found = _without_further_layers(folder, found, architecture.layers)
    found = _without_unread(folder, found, module, architecture)
    if architecture.layers > max(1, len(found)):  # before anything is made for each of them
        raise UserError(f"{folder}: config.json has {architecture.layers:,} layers, the files {len(found):,} tensors")
    listed = list(checkpoint_tensors(module, architecture, _tensor_table(module, architecture, found)))
    table = {name.removeprefix(module.PREFIX): (i, tensor) for name, i, tensor in listed}
    shapes = {name: tensor.shape for name, (_, tensor) in table.items()}
    if architecture.tied and not architecture.score:
        shapes[module.HEAD] = (architecture.vocab, architecture.width)  # a file may hold a tied head once or twice
    _check_headers(found, shapes, module.CLASS)
    if architecture.tied and module.HEAD in found:
        found = _without_tied_head(folder, found, module, table)
    _check_complete(folder, found, module, [name for name, _, _ in listed])
    sources: dict[TreePath, list[_LayerSource]] = {}
    for name, (_, tensor) in table.items():  # in the order of layers
        for part in tensor.parts:
            sources.setdefault(part.path, []).append(_LayerSource(found[name], tensor, part))
    last = {part.path: place for place, tensor in table.values() for part in tensor.parts}  # of a stack, in each axis
    stacks = {path: tuple(i + 1 for i in place) for path, place in last.items()}
    common = _common_dtype(header for name, header in found.items() if not table[name][1].wide)
    return _nest({path: LazyArray(of, stacks[path]) for path, of in sources.items()}), common


def _tensor_table(module: ModuleType, architecture: Architecture, found: Mapping[str, _Header]) -> dict[str, Tensor]:
    """Returns the table of the names in the files: `fused_tensors` if one of its own is there, else `tensors`; that of
    MXFP4 if it is there."""
    table = module.tensors(architecture)
    if hasattr(module, "mxfp4_tensors") and any(header.code == CODE for header in found.values()):
        return module.mxfp4_tensors(architecture)
    if architecture.mixture is None:
        return table
    fused = module.fused_tensors(architecture)
    new = {name: fused[name].layers_of(architecture)[0] for name in fused.keys() - table.keys()}
    own = {in_layer(name, i).removeprefix(module.PREFIX) for name, i in new.items()}
    return fused if own & found.keys() else table


def _check_complete(folder: Path, found: Mapping[str, _Header], module: ModuleType, names: list[str]) -> None:
    missing = [name for name in names if name.removeprefix(module.PREFIX) not in found]
    if missing:
        why = "the file does not fit config.json"
        if missing == [module.HEAD]:
            why = "if the embedding is its head too, set tie_word_embeddings to true in config.json"
        raise UserError(f"{folder}: {_tensor_list(missing, 'is missing', 'are missing')}; {why}")


def _common_dtype(headers: Iterable[_Header]) -> str:
    """Returns the dtype of all tensors if it is one that is written, else float32."""
    kinds = {"BF16" if header.code == CODE else header.code for header in headers}
    return {"BF16": "bfloat16", "F16": "float16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _without_tied_head(
    folder: Path, found: dict[str, _Header], module: ModuleType, table: Mapping[str, Any]
) -> dict[str, _Header]:
    """Returns the headers without the tied head, which stands in for the embedding if the file holds only the head."""
    name = next(name for name, (_, tensor) in table.items() if tensor.parts[0].path == ("embedding",))
    head = found[module.HEAD]
    rest = {key: header for key, header in found.items() if key != module.HEAD}
    if name not in rest:
        return {**rest, name: head}
    for start in range(0, head.shape[0], ROWS):
        one, two = (_read_rows(header, start) for header in (head, rest[name]))
        if not np.array_equal(one, two):
            why = f"{module.HEAD} differs from the embedding though the config ties them"
            raise UserError(f"{folder}: {why}; set tie_word_embeddings to false in config.json")
    return rest


def _read_rows(header: _Header, start: int) -> np.ndarray:
    with header.opened() as source:
        return source[start : min(start + ROWS, header.shape[0])]


def _nest(flat: Mapping[TreePath, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
