"""Which collectives a compiled program has, read from XLA's own text of it."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results, as (dtype, sizes).
      loops: 0 if it happens once, 1 in every microbatch, 2 in every layer or chunk of one.
      devices: how many take part in each group of it; 0 where the text does not say.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    loops: int
    devices: int

    @property
    def bytes(self) -> int:
        """The size of its results on a device."""
        return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in self.shapes)


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program in which more than one device takes part.

    Args:
      text: `compiled.as_text()`.
    """
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        shapes = tuple(
            (dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in SHAPE.findall(match[1])
        )
        name = re.search(r'op_name="([^"]*)"', line)
        one = Collective(match[2], shapes, name[1].count("while/body") if name else 0, _group(line))
        if one.devices != 1:
            found.append(one)
    return found


def _group(line: str) -> int:
    """Returns how many devices are in a group, in any of the three ways to write it."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    return 0
