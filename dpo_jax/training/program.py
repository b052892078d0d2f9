"""Reads the text of a compiled program (XLA's HLO, of any backend): which collectives it runs, and how often."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_RECEIVED = re.compile(r'_xla_megascale_transfer_type="(\w+)"')  # from other slices
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x')
_SLICE_GROUPS = re.compile(r"_xla_megascale_target=\{\{([\d,{}>-]+)\}\}")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.-]+)")
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
      groups: of devices that take part together, by their position in the program.
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
        """Devices of a group."""
        return len(self.groups[0])

    @property
    def bytes(self) -> int:
        """The size of its results on a device."""
        return sum(math.ceil(_bits(dtype) * math.prod(sizes) / 8) for dtype, sizes in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, by the algorithm that sends the least (a ring)."""
        n = self.devices
        share = {"all-reduce": 2 * (n - 1) / n, "all-gather": (n - 1) / n, "reduce-scatter": n - 1.0}
        return self.bytes * share.get(self.kind, 1.0 if self.kind == "collective-permute" else (n - 1) / n)


def _bits(dtype: str) -> int:
    """Returns the bits of a number: the first number in the name of its dtype, as in s4, bf16 and f8e4m3fn."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8 * (dtype == "pred")  # tokens and other handles have none


class _Program(NamedTuple):
    """Attributes: the lines of each computation, devices of a slice, slices, and the split collectives met so far."""

    bodies: dict[str, list[Instruction]]
    devices: int
    slices: int
    seen: set[str]


class _Place(NamedTuple):
    """Where a computation is called: trips of the loops in it that are not known, and as for `Collective`."""

    trips: tuple[int, ...]
    times: int = 1
    loops: int = 0
    overlapped: bool = False


def collectives(text: str, devices: int, trips: Sequence[int] = (), slices: int = 1) -> list[Collective]:
    """Returns the collectives of a program in which more than one device takes part, in the order in which they run.

    Of a conditional they are those of the branch that sends the most.

    Args:
      text: `compiled.as_text()`.
      devices: of all slices, in the order of the slices.
      trips: of loops whose number of passes is a run-time value: of one in no such loop, of one in one of them, ...;
        1 where it is not given.
      slices: of TPUs. The program is that of one of them; what it gets from the others is a collective too.
    """
    computations = _computations(text)
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    bodies = {name: lines for name, (_, lines) in computations.items()}
    program = _Program(bodies, devices // slices, slices, set())
    return [c for c in _walk(program, bodies[entry], _Place(tuple(trips))) if c.devices > 1]


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


def _walk(program: _Program, lines: Iterable[Instruction], place: _Place) -> Iterator[Collective]:
    """Yields the collectives of a computation and of those that it calls."""
    for one in lines:
        called = [program.bodies.get(name, []) for name in _called(one)]
        if one.operation.removesuffix("-start") in KINDS or (one.operation == "recv" and _RECEIVED.search(one.rest)):
            yield from _once(program, one, place)
        elif one.operation == "while":
            yield from _walk(program, *_loop(program, one, place))
        elif one.operation == "conditional":
            parts = [program._replace(seen=set(program.seen)) for _ in called]
            branches = [list(_walk(part, branch, place)) for part, branch in zip(parts, called, strict=True)]
            yield from max(branches, key=lambda found: sum(c.sent * c.times for c in found), default=[])
        else:
            inner = place._replace(overlapped=place.overlapped or one.operation == "async-start")
            for body in called:
                fused = [_scattered(line, body) for line in body] if one.operation == "fusion" else body
                yield from _walk(program, fused, inner)


def _loop(program: _Program, one: Instruction, place: _Place) -> tuple[list[Instruction], _Place]:
    """Returns the body of a loop, and its place."""
    passes, left = _passes(program.bodies, one), place.trips
    if passes is None:
        passes, left = (left or (1,))[0], left[1:]
    body = one.rest.partition("body=")[2].lstrip("%").split(",")[0]
    return program.bodies.get(body, []), _Place(left, place.times * passes, place.loops + 1, place.overlapped)


def _scattered(one: Instruction, lines: list[Instruction]) -> Instruction:
    """Returns a line of a fusion: a reduce-scatter in place of a sum of which the fusion uses slices only.

    A TPU's compiler writes many reduce-scatters so. In such a fusion no device ever has the whole sum.
    """
    names, slices = {one.name}, []
    for user in lines if one.operation == "all-reduce" else ():
        if not names & set(_OPERAND.findall(user.rest.partition(")")[0])):
            continue
        if user.operation == "dynamic-slice":
            slices.append(user.type)
        elif user.operation in ("get-tuple-element", "bitcast"):
            names.add(user.name)
        else:
            return one
    return one._replace(operation="reduce-scatter", type=" ".join(slices)) if slices else one


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


def _once(program: _Program, one: Instruction, place: _Place) -> Iterator[Collective]:
    """Yields the collective of a line, unless it is a part of one that was met before."""
    # A TPU splits one collective over several fusions with the same chain_id; it counts once.
    chain = re.search(r'chain_id="(\d+)"', one.rest)
    if chain and chain[1] in program.seen:
        return
    program.seen.update([chain[1]] if chain else [])
    starts = one.operation.endswith("-start") and '"is_sync":true' not in one.rest
    overlapped = place.overlapped or starts or chain is not None or one.operation == "recv"
    path = re.search(r'op_name="([^"]*)"', one.rest)
    kind, result, groups = _received(program, one) if one.operation == "recv" else _result(program, one)
    shapes = tuple((dtype, _numbers(sizes)) for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", result)))
    yield Collective(kind, shapes, groups, place.times, place.loops, overlapped, path[1] if path else "")


def _result(program: _Program, one: Instruction) -> tuple[str, str, tuple[tuple[int, ...], ...]]:
    """Returns the kind, the type of the results and the groups of a collective within a slice."""
    kind, result = one.operation.removesuffix("-start"), one.type
    if one.operation.endswith("-start") and kind != "all-reduce":
        result = _parts(result)[1]  # the first part repeats the operands
    groups = tuple(tuple(map(int, group)) for group in _groups(one.rest))
    return kind, result, groups or (tuple(range(program.devices)),)


def _received(program: _Program, one: Instruction) -> tuple[str, str, tuple[tuple[int, ...], ...]]:
    """Returns the kind, the type of the results and the groups of a collective between slices, from its `recv`.

    Its `send` has the operands, which are smaller (all-gather) or larger (reduce-scatter). Slices count from 1, and
    their devices' ids from 100,000 times that; devices in the same place of each slice take part together.
    """
    (name,) = _RECEIVED.findall(one.rest)
    kind = "collective-permute" if name == "ONE_TO_ONE" else name.lower().replace("_", "-")
    together = {tuple(range(program.slices))}
    if listed := _SLICES.search(one.rest):
        together = {tuple(n - 1 for n in _numbers(listed[1]))}
    elif listed := _SLICE_GROUPS.search(one.rest):
        ids = (re.split(r",|->", group) for group in listed[1].split("},{"))
        together = {tuple(int(n) // 100_000 - 1 for n in group) for group in ids}
    n = program.devices
    groups = tuple(tuple(i + n * place for place in group) for group in sorted(together) for i in range(n))
    return kind, _parts(one.type)[0], groups


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
    places = [np.unravel_index(group, shape) for group in collective.groups]
    return " x ".join(name for i, name in enumerate(sizes) if any(len(set(p[i].tolist())) > 1 for p in places))
