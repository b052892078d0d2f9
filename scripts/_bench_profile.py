"""Where the time of one train step goes, by kind of operation. Run by scripts/bench --profile.

`_bench_profile.py FOLDER DTYPE BATCH_SIZE`: the step runs on one core, where operations do not overlap, so that their
times add up to the step's. The profiler gives the time of each operation, and the compiled program says what it is.
"""

import collections
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.__main__ import HUGE_PAGES

HERE = Path(__file__).resolve().parent
KINDS = ("products of layers", "products of attention", "products of the head", "sums", "copies and transposes")
KINDS += ("conversions", "slices of stacks", "elementwise", "optimizer and accumulators")
# An instruction of the program: name, type of what it returns, operation, the rest of the line.
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE)
DOT = re.compile(r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.\-]+), .*?lhs_contracting_dims=\{([\d,]*)\}")


class Operation(NamedTuple):
    """An operation of the program: its kind, and the floating-point operations of its products."""

    kind: str
    flops: float


def profiles(folder: Path, batch_size: int, dtypes: list[str]) -> dict[str, Any]:
    """Profiles a step in a process of its own for each dtype, and prints the tables."""
    for dtype in dtypes:
        command = [sys.executable, str(HERE / "_bench_profile.py"), str(folder), dtype, str(batch_size)]
        subprocess.run(command, check=True, env=os.environ | {"GLIBC_TUNABLES": HUGE_PAGES})
    return {}


def sizes(text: str) -> list[int]:
    """Returns the numbers of "1,768,384"."""
    return [int(x) for x in text.split(",") if x]


def products(body: str) -> float:
    """Returns the floating-point operations of the products in the text of a computation."""
    shapes = {name: sizes(kind.partition("[")[2].partition("]")[0]) for name, kind, *_ in INSTRUCTION.findall(body)}
    found = 0.0
    for out, left, contracted in DOT.findall(body):
        summed = math.prod(shapes[left][axis] for axis in sizes(contracted))
        found += 2 * summed * math.prod(sizes(out))
    return found


def operation(name: str, kind: str, rest: str, bodies: dict[str, str]) -> Operation:
    """Returns what an instruction of the program is."""
    called, origin = re.search(r"calls=%?([\w.\-]+)", rest), re.search(r'op_name="([^"]*)"', rest)
    body, origin = bodies.get(called[1], "") if called else rest, origin[1] if origin else ""
    if flops := products(body):
        if re.search(r"->\w*[vd]\b|rsv|rsd,vd", origin):
            return Operation("products of the head", flops)
        shape = sizes(kind.partition("[")[2].partition("]")[0])
        return Operation(f"products of {'attention' if len(shape) > 2 else 'layers'}", flops)
    if ("while" not in origin and origin) or name.startswith(("wrapped_add", "wrapped_broadcast")):
        return Operation("optimizer and accumulators", 0)
    if "reduce(" in body:
        return Operation("sums", 0)
    parts = (("copies and transposes", ("copy", "transpose")), ("slices of stacks", ("dynamic-",)))
    for label, words in (*parts, ("conversions", ("wrapped_convert", "convert_bitcast"))):
        if any(word in name for word in words):
            return Operation(label, 0)
    return Operation("elementwise", 0)


def operations(program: str) -> dict[str, Operation]:
    """Returns the operations of a program by name, without loops and calls, whose time is that of their bodies."""
    blocks = re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL)
    bodies, found = dict(blocks), INSTRUCTION.findall(program)
    loops = ("while", "call", "conditional")
    return {name: operation(name, kind, rest, bodies) for name, kind, what, rest in found if what not in loops}


def events(folder: str) -> dict[str, tuple[float, int]]:
    """Returns the seconds and the number of calls of each name that the profiler has written."""
    import jax

    found: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    (file,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in () if line.name.startswith("python") else line.events:
                seconds, calls = found[event.name]
                found[event.name] = seconds + event.duration_ns / 1e9, calls + 1
    return found


def profile(folder: Path, dtype: str, batch_size: int) -> None:
    """Prints where the time of one step goes."""
    import jax
    import numpy as np
    from _bench_list import System
    from _bench_systems import build_ours

    ours = build_ours(folder, System("dpo_jax", dtype), 4, batch_size)
    batch, count = ours.batch_of(ours.batches[0])
    batch = batch._replace(ref_logps=ours.column(ours.frozen, batch, count))
    compiled = ours.step.lower(ours.state, batch, np.int32(count)).compile()
    state, seconds = ours.state, []
    with tempfile.TemporaryDirectory() as name:
        for last in (False, False, False, True):
            if last:
                jax.profiler.start_trace(name)
            start = time.perf_counter()
            state, metrics = compiled(state, batch, np.int32(count))
            float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
        jax.profiler.stop_trace()
        spent, known = events(name), operations(compiled.as_text())
    table: dict[str, list[float]] = {kind: [0.0, 0.0, 0.0] for kind in KINDS}
    for name, (took, calls) in spent.items():
        if name in known:
            row = table[known[name].kind]
            row[:] = row[0] + took, row[1] + calls, row[2] + calls * known[name].flops
    show(f"{dtype}, {count} microbatches of {batch.tokens.shape[1:]} tokens", table, min(seconds[1:3]), seconds[3])


def show(title: str, table: dict[str, list[float]], undisturbed: float, traced: float) -> None:
    """Prints the table; what is not in it is between the operations."""
    total = sum(seconds for seconds, *_ in table.values())
    print(f"{title}: a step on one core takes {1e3 * undisturbed:.0f} ms, {1e3 * traced:.0f} ms when profiled")
    print(f"{'':<28}{'ms':>8}{'share':>8}{'calls':>8}{'GFLOP/s':>9}")
    for kind, (seconds, calls, flops) in sorted(table.items(), key=lambda row: -row[1][0]):
        rate = f"{flops / seconds / 1e9:>9.0f}" if flops else ""
        print(f"{kind:<28}{1e3 * seconds:>8.1f}{seconds / traced:>8.1%}{calls:>8.0f}{rate}")
    print(f"{'sum':<28}{1e3 * total:>8.1f}{total / traced:>8.1%}")


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    where, compute, size = sys.argv[1:]
    profile(Path(where), compute, int(size))
