"""The table that maps a checkpoint's tensors to our parameters, and the conversion of their layouts.

A family's `tensors(architecture)` is such a table: name in the file -> `Tensor`. In a name, `{i}` is the number of a
layer; where layers of several kinds have a tensor of one name, of other sizes, it is `{i:kind}` for all but one kind.
"""

import math
import re
from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.models.architecture import Architecture, Rope

LAYER = re.compile(r"\{i(?::\w+)?\}")
TreePath = tuple[str, ...]  # keys that lead to a parameter in the pytree
Index = tuple[slice, ...]


class TensorPart(NamedTuple):
    """One parameter inside a tensor of a checkpoint.

    Attributes:
      path: the parameter. If the tensor's name contains `{i}`, the parameter is stacked over layers on axis 0.
      inputs: how many of the tensor's last axes come first in the parameter: a torch Linear is [*outputs, *inputs], our
        kernels are [*inputs, *outputs].
      take: index into the tensor's axes after `split`: per axis a slice, an integer (which drops the axis), or an array
        of indices in our order. Axes that are not indexed are taken completely.
      lead: how many of the tensor's first axes stay first: that of the experts, where a tensor holds all of a layer.
    """

    path: TreePath
    inputs: int = 0
    take: tuple[Any, ...] = ()
    lead: int = 0


class Tensor(NamedTuple):
    """One tensor of a Hugging Face checkpoint and the parameters it holds: several if projections are fused.

    Attributes:
      split: for each axis in the file, the sizes of our axes that are merged into it.
      parts: the parameters.
      layers: numbers of the layers that have it; None for all.
      wide: it is written in float32 whatever the dtype of the others, as in transformers.
    """

    split: tuple[tuple[int, ...], ...]
    parts: tuple[TensorPart, ...]
    layers: tuple[int, ...] | None = None
    wide: bool = False

    def layers_of(self, architecture: Architecture) -> tuple[int, ...]:
        """Returns the numbers of the layers that have it, in the order of the parameters' stack."""
        return tuple(range(architecture.layers)) if self.layers is None else self.layers

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(math.prod(axes) for axes in self.split)

    @property
    def split_shape(self) -> tuple[int, ...]:
        """The shape with merged axes split."""
        return tuple(chain(*self.split))


def same_layout(path: TreePath, *shape: int) -> Tensor:
    """Returns the entry of a tensor whose layout is that of the parameter."""
    return Tensor(tuple((size,) for size in shape), (TensorPart(path),))


def linear(path: TreePath, outputs: tuple[int, ...], inputs: tuple[int, ...], take: tuple[Any, ...] = ()) -> Tensor:
    """Returns the entry of a torch Linear's weight, [out, in] in the file and [*inputs, *outputs] as a parameter."""
    return Tensor((outputs, inputs), (TensorPart(path, len(inputs), take),))


def neighbors_apart(rope: Rope | None, head_dim: int) -> tuple[Any, ...]:
    """Returns `take` of the queries or keys, [heads, d], of a family that rotates neighboring dimensions.

    `rotary.rotate` rotates dimension i with i + dims / 2. A common order of queries and keys changes no score.
    """
    dims = 0 if rope is None else rope.dims
    return slice(None), np.concatenate([np.arange(0, dims, 2), np.arange(1, dims, 2), np.arange(dims, head_dim)])


def with_neighbors_apart(table: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """Returns a table whose queries and keys are taken as in `neighbors_apart`."""
    take = neighbors_apart(a.rope, a.head_dim)
    moved = {name: t for name, t in table.items() if t.parts[0].path[1:2] in (("q",), ("k",))}
    return {**table, **{name: t._replace(parts=(t.parts[0]._replace(take=take),)) for name, t in moved.items()}}


def with_bias(module: str, weight: Tensor, *outputs: int) -> dict[str, Tensor]:
    """Returns the weight and the bias of a module; the bias has the weight's path, but for the last key."""
    path = (*weight.parts[0].path[:-1], "bias")
    return {f"{module}.weight": weight, f"{module}.bias": same_layout(path, *outputs)}


def layer_norms(norms: Mapping[str, TreePath], width: int) -> dict[str, Tensor]:
    """Returns the weights and biases of layer norms, from prefix of the name -> path."""
    return {
        prefix + name: same_layout((*path, leaf), width)
        for prefix, path in norms.items()
        for name, leaf in (("weight", "scale"), ("bias", "bias"))
    }


def renamed(table: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns a table with the given parts of names replaced."""

    def new(name: str) -> str:
        for old, other in names.items():
            name = name.replace(f"{old}.", f"{other}.")
        return name

    return {new(name): tensor for name, tensor in table.items()}


def of_kind(table: Mapping[str, Tensor], a: Architecture, *kinds: str) -> dict[str, Tensor]:
    """Returns a table whose tensors only the layers of some kinds have."""
    numbers = tuple(i for i, own in enumerate(a.kinds) if own in kinds) if a.kinds else None
    return {name: tensor._replace(layers=numbers) for name, tensor in table.items()}


def in_layer(pattern: str, layer: int) -> str:
    """Returns the name in the file of a layer's tensor, or of its module."""
    return LAYER.sub(str(layer), pattern)


def is_layered(pattern: str) -> bool:
    """Returns whether layers have a tensor of that name each."""
    return LAYER.search(pattern) is not None


def within_layer(pattern: str) -> str:
    """Returns what follows the number of the layer and a dot in the name of a tensor, or of a module."""
    return LAYER.split(pattern)[-1].removeprefix(".")


def untied_head(name: str, a: Architecture) -> dict[str, Tensor]:
    """Returns the head of a model that is not tied to the embedding; nothing for a tied one."""
    return {} if a.tied else {name: same_layout(("head",), a.vocab, a.width)}


def unpack_tensor(tensor: Tensor, x: Any) -> list[Any]:
    """Returns the parameters in a checkpoint's tensor, in the order of its parts."""
    split = x.reshape(tensor.split_shape)
    return [_last_axes_first(split[part.take], part.inputs, part.lead) for part in tensor.parts]


def pack_tensor(tensor: Tensor, params: list[Any]) -> np.ndarray:
    """Returns a checkpoint's tensor from its parameters, in their dtype: the inverse of `unpack_tensor`."""
    if len(params) == 1 and not tensor.parts[0].take:  # a view is enough, no copy
        return _as_in_file(tensor.parts[0], params[0]).reshape(tensor.shape)
    out = np.empty(tensor.split_shape, params[0].dtype)
    for part, value in zip(tensor.parts, params, strict=True):
        out[part.take] = _as_in_file(part, value)
    return out.reshape(tensor.shape)


def param_shape(tensor: Tensor, part: TensorPart) -> tuple[int, ...]:
    """Returns the shape of a parameter in one layer."""
    whole = np.broadcast_to(np.int8(0), tensor.split_shape)
    return _last_axes_first(whole[part.take], part.inputs, part.lead).shape


def module_axes(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the sizes of a module's input axes and output axes, in the order of the file, merged axes split.

    Of a tensor of all experts, those of one: its first `lead` axes are left out.
    """
    first, second = tensor.split[tensor.parts[0].lead :]
    # GPT-2 stores [in, out], all other families [out, in].
    return (second, first) if tensor.parts[0].inputs else (first, second)


def _last_axes_first(x: Any, count: int, lead: int = 0) -> Any:
    first = x.ndim - count
    return x.transpose(*range(lead), *range(first, x.ndim), *range(lead, first))


def _as_in_file(part: TensorPart, value: Any) -> Any:
    return _last_axes_first(value, value.ndim - part.inputs - part.lead, part.lead)


def read_block(tensor: Tensor, part: TensorPart, index: Index, source: Any) -> np.ndarray:
    """Returns a block of a parameter of one layer, and reads little more of the file than that.

    Args:
      tensor: the tensor.
      part: the parameter.
      index: the block, one slice per axis of the parameter.
      source: the tensor in the file; supports indexing by one slice per axis.
    """
    end = part.lead + part.inputs
    wanted = iter(index[: part.lead] + index[end:] + index[part.lead : end])
    takes = chain(part.take, repeat(slice(None)))
    block, shape, inner = [], [], []
    for axes in tensor.split:
        for place, size in enumerate(axes):
            chosen = np.arange(size)[next(takes)]
            chosen = chosen[next(wanted)] if chosen.ndim else chosen
            low, high = (int(chosen.min()), int(chosen.max()) + 1) if place == 0 else (0, size)
            if place == 0:  # only the first of merged axes can be sliced in the file; the others are in memory
                rest = math.prod(axes[1:])
                block.append(slice(low * rest, high * rest))
            shape.append(high - low)
            inner.append(_as_slice(chosen - low))
    return _last_axes_first(source[tuple(block)].reshape(shape)[tuple(inner)], part.inputs, part.lead)


def _as_slice(chosen: np.ndarray) -> Any:
    """Returns an index: an integer, a slice if the indices are consecutive (NumPy then makes no copy), or the array."""
    if not chosen.ndim:
        return int(chosen)
    consecutive = chosen.size == 0 or np.array_equal(chosen, np.arange(chosen[0], chosen[0] + chosen.size))
    return slice(int(chosen[0]), int(chosen[0]) + chosen.size) if consecutive and chosen.size else chosen
