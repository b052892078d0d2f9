"""Unlike layers as a scan over groups of them: three of linear attention and one of attention, say.

A parameter that only some layers have is stacked over these. The program holds one group, the shortest pattern that all
layers repeat, so that it and its compile time grow with the pattern, not with the number of layers. A pattern that does
not repeat is one group of all layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.records import Array

# The parameters of a layer that only layers of its kind have, by the beginning of their names, or all of it.
OWN = {"attention": ("q", "k", "v", "o", "q_norm", "k_norm", "q_gate"), "delta": ("delta_",)}


def _has(kind: str, name: str) -> bool:
    """Returns whether layers of a kind have a parameter."""
    owners = [k for k, own in OWN.items() if any(name == o or (o[-1] == "_" and name.startswith(o)) for o in own)]
    return not owners or kind in owners


def period(kinds: Sequence[str]) -> int:
    """Returns the layers of a group: the shortest pattern that all layers repeat."""
    count = len(kinds)
    return next(p for p in range(1, count + 1) if count % p == 0 and tuple(kinds) == tuple(kinds[:p]) * (count // p))


def names_of(kinds: Sequence[str], stacks: Iterable[str], layer: int) -> tuple[str, ...]:
    """Returns the names of those parameters that a layer has; arguments as for `layer_of`."""
    return tuple(name for name in stacks if not kinds or _has(kinds[layer], name))


def layer_of(kinds: Sequence[str], stacks: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Returns what one layer has of stacked parameters.

    Args:
      kinds: of all layers; () for alike ones.
      stacks: name -> a tree of arrays, stacked over the layers that have it.
      layer: its number.
    """
    names = names_of(kinds, stacks, layer)
    places = {name: sum(_has(kind, name) for kind in kinds[:layer]) if kinds else layer for name in names}
    return {name: jax.tree.map(lambda x, i=places[name]: x[i], stacks[name]) for name in names}


def init_groups(kinds: Sequence[str], init: Callable[[str, Array], Any], key: Array) -> dict[str, Any]:
    """Returns the stacked parameters of layers, with the names of their axes, drawn by `init`: (kind, key) -> layer."""
    size = period(kinds)

    def group(key: Array) -> dict[str, Any]:
        layers = [init(kind, one) for kind, one in zip(kinds[:size], jax.random.split(key, size), strict=True)]
        having = {name: [layer[name] for layer in layers if name in layer] for layer in layers for name in layer}
        return {name: jax.tree.map(lambda *x: jnp.stack(x), *found) for name, found in having.items()}

    def stacked(x: nn.Partitioned[Any]) -> nn.Partitioned[Any]:
        return nn.Partitioned(x.value.reshape(-1, *x.value.shape[2:]), ("layers", *x.names))

    drawn = jax.vmap(group)(jax.random.split(key, len(kinds) // size))
    return jax.tree.map(stacked, drawn, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def scan_groups(
    kinds: Sequence[str],
    layer: Mapping[str, Callable[[Any, Array, Any], tuple[Array, Any]]],
    stacks: Mapping[str, Any],
    x: Array,
    own: Any,
) -> tuple[Array, list[Any]]:
    """Returns the residual after all layers, and what each of them returns beside it.

    Args:
      kinds: of all layers.
      layer: kind -> function of a layer's parameters, the residual and its own inputs.
      stacks: see `layer_of`.
      x: the residual before the first layer.
      own: a tree of arrays [L] that differ between layers.
    """
    size = period(kinds)
    count = len(kinds) // size

    def group(x: Array, one: tuple[Any, Any]) -> tuple[Array, Any]:
        kept = []
        for i, kind in enumerate(kinds[:size]):
            x, more = layer[kind](layer_of(kinds[:size], one[0], i), x, jax.tree.map(lambda y, i=i: y[i], one[1]))
            kept.append(more)
        return x, kept

    split = jax.tree.map(lambda y: y.reshape(count, -1, *y.shape[1:]), (dict(stacks), own))
    x, kept = jax.lax.scan(group, x, split)
    return x, [jax.tree.map(lambda y, i=i: y[i // size], kept[i % size]) for i in range(len(kinds))]
