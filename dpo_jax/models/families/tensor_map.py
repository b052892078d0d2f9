"""Where a checkpoint's tensors go: a table of what each holds, and the reordering between their layout and ours."""

import math
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np

TreePath = tuple[str, ...]  # the keys to a parameter
Index = tuple[slice, ...]


class TensorPart(NamedTuple):
    """One parameter in a tensor of a checkpoint.

    Attributes:
      path: the keys to it. Where the tensor's name has an `{i}` it is stacked over layers, on axis 0.
      inputs: how many of the last axes come first with us: a torch Linear is [*outputs, *inputs], ours the reverse.
      take: what it has of the tensor's first axes, after `split`: a slice, a number (which drops the axis), or an array
        of numbers in our order. All of the axes that are not named.
    """

    path: TreePath
    inputs: int = 0
    take: tuple[Any, ...] = ()


class Tensor(NamedTuple):
    """One tensor of a Hugging Face checkpoint, and the parameters it holds: several where it is fused.

    Attributes:
      split: for each of its axes in the file, the axes with us that the file has merged to this one.
      parts: what it holds.
    """

    split: tuple[tuple[int, ...], ...]
    parts: tuple[TensorPart, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return tuple(math.prod(axes) for axes in self.split)

    @property
    def axes(self) -> tuple[int, ...]:
        """Its shape with merged axes apart."""
        return tuple(chain(*self.split))


def plain(path: TreePath, *shape: int) -> Tensor:
    """A tensor that has our layout."""
    return Tensor(tuple((size,) for size in shape), (TensorPart(path),))


def linear(path: TreePath, outputs: tuple[int, ...], inputs: tuple[int, ...], take: tuple[Any, ...] = ()) -> Tensor:
    """A torch Linear's weight [out, in], ours [*inputs, *outputs]."""
    return Tensor((outputs, inputs), (TensorPart(path, len(inputs), take),))


def to_ours(tensor: Tensor, x: Any) -> list[Any]:
    """Returns the parameters that a tensor holds, in the order of its parts."""
    split = x.reshape(tensor.axes)
    return [_turned(split[part.take], part.inputs) for part in tensor.parts]


def to_theirs(tensor: Tensor, parts: list[Any]) -> np.ndarray:
    """Returns the tensor of a checkpoint from its parameters, in their dtype."""
    if len(parts) == 1 and not tensor.parts[0].take:  # nothing to put together, and no copy to be made
        return _turned(parts[0], parts[0].ndim - tensor.parts[0].inputs).reshape(tensor.shape)
    out = np.empty(tensor.axes, parts[0].dtype)
    for part, value in zip(tensor.parts, parts, strict=True):
        out[part.take] = _turned(value, value.ndim - part.inputs)
    return out.reshape(tensor.shape)


def tensor_shape(tensor: Tensor, part: TensorPart) -> tuple[int, ...]:
    """Returns the shape that a parameter has with us, in one layer."""
    return _turned(np.broadcast_to(np.int8(0), tensor.axes)[part.take], part.inputs).shape


def sides(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the input and the output axes of a module of projections, in the file's order, merged axes apart."""
    first, second = tensor.split
    # GPT-2 stores [in, out], the others [out, in].
    return (second, first) if tensor.parts[0].inputs else (first, second)


def _turned(x: Any, count: int) -> Any:
    """Brings the last `count` axes to the front."""
    first = x.ndim - count
    return x.transpose(*range(first, x.ndim), *range(first))


def cut(tensor: Tensor, part: TensorPart, index: Index, read: Any) -> np.ndarray:
    """Returns a block of a parameter, one layer's, reading little more of the tensor than that.

    Args:
      tensor: the tensor.
      part: the parameter.
      index: the block.
      read: the tensor: takes slices, one for each axis in the file.
    """
    outputs = len(index) - part.inputs
    wanted = iter(index[part.inputs :] + index[: part.inputs] if outputs else index)
    takes = chain(part.take, repeat(slice(None)))
    block, shape, inner = [], [], []
    for axes in tensor.split:
        for place, size in enumerate(axes):
            chosen = np.arange(size)[next(takes)]
            chosen = chosen[next(wanted)] if chosen.ndim else chosen
            low, high = (int(chosen.min()), int(chosen.max()) + 1) if place == 0 else (0, size)
            if place == 0:  # of axes that the file has merged only the first can be cut in it
                rest = math.prod(axes[1:])
                block.append(slice(low * rest, high * rest))
            shape.append(high - low)
            inner.append(_as_slice(chosen - low))
    return _turned(read[tuple(block)].reshape(shape)[tuple(inner)], part.inputs)


def _as_slice(chosen: np.ndarray) -> Any:
    """Returns a number, a slice where the numbers are consecutive, or the numbers."""
    if not chosen.ndim:
        return int(chosen)
    consecutive = chosen.size == 0 or np.array_equal(chosen, np.arange(chosen[0], chosen[0] + chosen.size))
    return slice(int(chosen[0]), int(chosen[0]) + chosen.size) if consecutive and chosen.size else chosen
