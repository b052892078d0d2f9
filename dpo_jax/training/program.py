"""Reads the text of a compiled program (XLA's HLO, of any backend): which collectives it runs, and how often."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
NETWORK = ((-1, -1),)  # in place of the groups of what goes between slices
_SENT = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Instruction(NamedTuple):
    """A line of a program: name, type of the result, operation, and the rest of the line."""

    name: str
    type: str
    operation: str
    rest: str


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results on one device, as (dtype, sizes).
      groups: of devices that take part together, by their position in the program; () for all devices.
      times: how often it runs in a step.
      loops: loops around it: 0 if it happens once, 1 in every microbatch, 2 in every layer or chunk of one.
      overlapped: it starts and ends in two operations, so that others may run between them.
      path: of the Python code that it comes from; "" where XLA has dropped it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...]
    times: int
    loops: int
    overlapped: bool
    path: str

    @property
    def devices(self) -> int:
        """Devices of a group; 0 for all."""
        return len(self.groups[0]) if self.groups else 0

    @property
    def bytes(self) -> int:
        """The size of its results on a device."""
        return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, by the algorithm that sends the least (a ring)."""
        n = self.devices or 1
        share = {"all-reduce": 2 * (n - 1) / n, "all-gather": (n - 1) / n, "reduce-scatter": n - 1.0}
        return self.bytes * share.get(self.kind, 1.0 if self.kind == "collective-permute" else (n - 1) / n)


def collectives(text: str, trips: Sequence[int] = (), slices: int = 1, devices: int = 0) -> list[Collective]:
    """Returns the collectives of a program in which more than one device takes part, in the order in which they run.

    Args:
      text: `compiled.as_text()`.
      trips: of loops whose number of passes is a run-time value: of one in no such loop, of one in one of them, ...;
        1 where it is not given.
      slices: of TPUs. The program is that of one of them; what it sends to the others is a collective too.
      devices: of all slices, in the order of the slices; needed only for several.
    """
    computations = _computations(text)
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    bodies = {name: lines for name, (_, lines) in computations.items()}
    found = _walk(bodies, entry, tuple(trips), times=1, loops=0, overlapped=False, seen=set())
    if slices == 1:
        return [c for c in found if c.devices != 1]
    own, each = range(devices // slices), devices // slices
    across = tuple(tuple(i + each * n for n in range(slices)) for i in own)
    groups = {NETWORK: across, (): (tuple(own),)}
    return [c for c in (c._replace(groups=groups.get(c.groups, c.groups)) for c in found) if c.devices != 1]


def custom_calls(text: str) -> dict[str, int]:
    """Returns the operations that are kernels of a library or of Pallas, and how many of each the program has."""
    return dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text)).most_common())


def _computations(text: str) -> dict[str, tuple[bool, list[Instruction]]]:
    """Returns the computations of a program by name: whether it is where the program begins, and its lines."""
    found: dict[str, tuple[bool, list[Instruction]]] = {}
    lines: list[Instruction] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = []
            found[head[2]] = (head[1] is not None, lines)
        elif match := _LINE.match(line):
            lines.append(Instruction(*match.groups()))
    return found


def _walk(
    bodies: dict[str, list[Instruction]],
    name: str,
    trips: tuple[int, ...],
    *,
    times: int,
    loops: int,
    overlapped: bool,
    seen: set[str],
) -> Iterator[Collective]:
    """Yields the collectives of a computation and of those that it calls; `seen` has the split ones so far."""
    for one in bodies.get(name, ()):
        kind = one.operation.removesuffix("-start")
        if kind in KINDS:
            # A TPU splits one collective over several fusions with the same chain_id; it counts once.
            chain = re.search(r'chain_id="(\d+)"', one.rest)
            if chain is None or chain[1] not in seen:
                seen |= {chain[1]} if chain else set()
                starts = one.operation.endswith("-start") and '"is_sync":true' not in one.rest
                yield _collective(one, kind, times, loops, overlapped or starts or chain is not None)
        elif one.operation == "send" and (sent := _SENT.search(one.rest)):
            found = _collective(
                one._replace(type=_parts(one.type)[0]), sent[1].lower().replace("_", "-"), times, loops, True
            )
            yield found._replace(groups=NETWORK)
        elif one.operation == "while":
            passes, left = _passes(bodies, one), trips
            if passes is None:
                passes, left = (trips or (1,))[0], trips[1:]
            body = one.rest.partition("body=")[2].lstrip("%").split(",")[0]
            yield from _walk(
                bodies, body, left, times=times * passes, loops=loops + 1, overlapped=overlapped, seen=seen
            )
        else:
            hidden = overlapped or one.operation == "async-start"
            for called in _called(one):
                yield from _walk(bodies, called, trips, times=times, loops=loops, overlapped=hidden, seen=seen)


def _called(one: Instruction) -> Iterable[str]:
    branches = _BRANCHES.search(one.rest)
    listed = [b.strip().lstrip("%") for b in branches[1].split(",")] if branches else []
    return itertools.chain(_CALLED.findall(one.rest), listed)


def _passes(bodies: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """Returns how often a loop runs; None if that is a run-time value."""
    if known := _KNOWN.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    lines = bodies.get(condition[1], []) if condition else []
    constants = {one.name: one.rest for one in lines if one.operation == "constant"}
    for one in lines:
        limit = re.match(r"%?[\w.-]+, %?([\w.-]+)\)", re.sub(r"\w+\[\]\S* ", "", one.rest))
        if one.operation == "compare" and "direction=LT" in one.rest and limit and limit[1] in constants:
            return int(constants[limit[1]].split(")")[0])  # JAX's loops begin at 0
    return None


def _collective(one: Instruction, kind: str, times: int, loops: int, overlapped: bool) -> Collective:
    result = one.type
    if one.operation.endswith("-start") and kind != "all-reduce":
        result = _parts(result)[1]  # the first part repeats the operands
    shapes = tuple((dtype, _numbers(sizes)) for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", result)))
    path = re.search(r'op_name="([^"]*)"', one.rest)
    groups = tuple(tuple(map(int, group)) for group in _groups(one.rest))
    return Collective(kind, shapes, groups, times, loops, overlapped, path[1] if path else "")


def _parts(type_: str) -> list[str]:
    """Returns the parts of a tuple's type, "(a, (b, c))" -> ["a", "(b, c)"]."""
    parts, depth = [""], 0
    for character in type_.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _groups(rest: str) -> Sequence[Sequence[int]]:
    """Returns the groups of devices of a collective, in any of the ways to write them; () for all devices."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{} ]+)\}\}", rest):
        return [_numbers(group) for group in listed[1].split("},{")]
    if iota := _IOTA.search(rest):
        return _order(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))  # type: ignore[return-value]
    if mesh := _MESH.search(rest):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        sizes, named = [int(n) for n in axes.values()], re.findall(r"'(\w+)'", mesh[4])
        order = _order(mesh[2] or str(math.prod(sizes)), mesh[3]).reshape(sizes)
        within = [list(axes).index(name) for name in named]
        last = np.moveaxis(order, within, range(len(sizes) - len(within), len(sizes)))
        return last.reshape(-1, math.prod(sizes[i] for i in within))  # type: ignore[return-value]
    return ()


def _order(sizes: str, transposed: str | None) -> np.ndarray:
    numbers = _numbers(sizes)
    devices = np.arange(math.prod(numbers)).reshape(numbers)
    return (devices if not transposed else devices.transpose(_numbers(transposed))).ravel()


def axes_of(collective: Collective, sizes: dict[str, int]) -> str:
    """Returns the mesh axes that a collective goes over, joined by " x ".

    Args:
      collective: of a program for a mesh.
      sizes: the mesh's axes, in order.
    """
    shape = tuple(sizes.values())
    groups = collective.groups or (tuple(range(math.prod(shape))),)
    places = [np.unravel_index(group, shape) for group in groups]
    return " x ".join(name for i, name in enumerate(sizes) if any(len(set(p[i].tolist())) > 1 for p in places))
