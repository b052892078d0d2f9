"""Unlike layers as scans over groups of them: three of linear attention and one of attention, say.

A parameter that only some layers have is stacked over these. The program holds one group, the shortest pattern that all
layers repeat, so that it and its compile time grow with the pattern, not with the number of layers. Where two patterns
follow each other, as few dense layers and then many mixtures, it holds a group of each. Layers without any pattern are
one group.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.records import Array

MLP, HEADS = ("up", "gate", "down"), ("q", "k", "v", "o", "q_norm", "k_norm")
# The parameters of layers that those of a kind lack, by the beginning of their names, or all of it.
LACKS = {"attention": ("delta_", "global_", "reader_"), "delta": (*HEADS, "q_gate")}
LACKS |= {"mixture": MLP, "dense": ("router", "expert_", "shared_"), "global": (*HEADS, "reader_")}
LACKS["reader"] = ("k", "v", "k_norm", "global_", *MLP)
LACKS["global_reader"] = (*HEADS, "global_k", "global_v", "global_k_norm", *MLP)


def _has(kind: str, name: str) -> bool:
    """Returns whether layers of a kind have a parameter."""
    return not any(name == lack or (lack[-1] == "_" and name.startswith(lack)) for lack in LACKS[kind])


def period(kinds: Sequence[str]) -> int:
    """Returns the layers of a group: the shortest pattern that all layers repeat."""
    count = len(kinds)
    return next(p for p in range(1, count + 1) if count % p == 0 and tuple(kinds) == tuple(kinds[:p]) * (count // p))


def sections(kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the first layer and the end of each scan: one, or two if their groups have fewer layers together."""

    def layers(split: int) -> int:
        return sum(period(part) for part in (kinds[:split], kinds[split:]) if part)

    split = min(range(len(kinds)), key=layers)
    return [part for part in ((0, split), (split, len(kinds))) if part[0] < part[1]]


def _place(kinds: Sequence[str], name: str, layer: int) -> int:
    """Returns where a parameter of a layer is in its stack: how many layers before have it."""
    return sum(_has(kind, name) for kind in kinds[:layer])


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
    places = {name: _place(kinds, name, layer) if kinds else layer for name in names}
    return {name: jax.tree.map(lambda x, i=places[name]: x[i], stacks[name]) for name in names}


def init_groups(kinds: Sequence[str], init: Callable[[str, Array], Any], key: Array) -> dict[str, Any]:
    """Returns the stacked parameters of layers, with the names of their axes, drawn by `init`: (kind, key) -> layer."""

    def joined(*parts: nn.Partitioned[Any]) -> nn.Partitioned[Any]:
        return nn.Partitioned(jnp.concatenate([part.value for part in parts]), parts[0].names)

    found = [_init_section(kinds[a:b], init, jax.random.fold_in(key, a) if a else key) for a, b in sections(kinds)]
    having = {name: [part[name] for part in found if name in part] for part in found for name in part}
    named = {"is_leaf": lambda x: isinstance(x, nn.Partitioned)}
    return {name: jax.tree.map(joined, *parts, **named) for name, parts in having.items()}


def _init_section(kinds: Sequence[str], init: Callable[[str, Array], Any], key: Array) -> dict[str, Any]:
    """Returns the parameters of the layers of one scan; arguments as for `init_groups`."""
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
    layer: Mapping[str, Callable[[Any, Any, Any], tuple[Any, Any]]],
    stacks: Mapping[str, Any],
    x: Any,
    own: Any,
) -> tuple[Any, list[Any]]:
    """Returns what the last layer hands on, and what each of them returns beside it.

    Args:
      kinds: of all layers.
      layer: kind -> function of a layer's parameters, what the layer before hands on, and its own inputs.
      stacks: see `layer_of`.
      x: what the first layer is given: a tree of arrays, the residual among them.
      own: a tree of arrays [L] that differ between layers.
    """
    kept = []
    for a, b in sections(kinds):
        inputs = jax.tree.map(lambda y, a=a, b=b: y[a:b], own)
        x, more = _scan_section(kinds[a:b], layer, x, (_section_of(kinds, stacks, a, b), inputs))
        kept += more
    return x, kept


def _section_of(kinds: Sequence[str], stacks: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """Returns what the layers from `start` to `end` have of stacked parameters."""
    found = {}
    for name, stack in stacks.items():
        a, b = (_place(kinds, name, layer) for layer in (start, end))
        if a < b:
            found[name] = jax.tree.map(lambda x, a=a, b=b: x[a:b], stack)
    return found


def _scan_section(
    kinds: Sequence[str],
    layer: Mapping[str, Callable[[Any, Any, Any], tuple[Any, Any]]],
    x: Any,
    given: tuple[dict[str, Any], Any],
) -> tuple[Any, list[Any]]:
    """Returns what `scan_groups` does for the layers of one scan, of which `given` has the stacks and own inputs."""
    size = period(kinds)
    count = len(kinds) // size

    def group(x: Any, one: tuple[Any, Any]) -> tuple[Any, Any]:
        kept = []
        for i, kind in enumerate(kinds[:size]):
            x, more = layer[kind](layer_of(kinds[:size], one[0], i), x, jax.tree.map(lambda y, i=i: y[i], one[1]))
            kept.append(more)
        return x, kept

    split = jax.tree.map(lambda y: y.reshape(count, -1, *y.shape[1:]), given)
    x, kept = jax.lax.scan(group, x, split)
    return x, [jax.tree.map(lambda y, i=i: y[i // size], kept[i % size]) for i in range(len(kinds))]
