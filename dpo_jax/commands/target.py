"""What `dpo-jax plan --target` prints beside memory: collectives, work, times by data sheets, advice."""

from collections.abc import Sequence
from typing import Any

from dpo_jax.commands.common import log_line, print_table
from dpo_jax.sharding import RULES
from dpo_jax.training.fit import Room
from dpo_jax.training.load import recomputed
from dpo_jax.training.plan_records import Compiled, Pass, Plan
from dpo_jax.training.program import axes_of, custom_calls
from dpo_jax.training.roofline import Roofline, leaves

NOTE = "at the rates of data sheets, for full rows; not measured"


def collective_rows(compiled: Compiled) -> list[dict[str, Any]]:
    """Returns a step's collectives by mesh axis, kind and whether computation runs beside them, largest first."""
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for c in compiled.collectives:
        key = axes_of(c, compiled.mesh), c.kind, c.overlapped
        row = rows.setdefault(key, {"count": 0, "bytes": 0, "sent": 0.0, "network": False, "dtypes": set()})
        row["count"] += c.times
        row["bytes"] += c.bytes * c.times
        row["sent"] += c.sent * c.times
        row["network"] |= leaves(c, compiled.groups)
        row["dtypes"] |= {dtype for dtype, _ in c.shapes}
    named = ({"axis": axis, "kind": kind, "asynchronous": beside, **row} for (axis, kind, beside), row in rows.items())
    return sorted(({**row, "dtypes": sorted(row["dtypes"])} for row in named), key=lambda row: -row["sent"])


def plan_record(plan: Plan, room: Room, advice: list[str]) -> dict[str, Any]:
    """Returns the plan of a target as what JSON can hold. Bytes are on each device, times are in seconds."""
    compiled = plan.compiled
    assert compiled is not None
    speed = compiled.roofline
    return {
        "target": compiled.target._asdict() | {"devices": len(compiled.groups)},
        "mesh": compiled.mesh,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "batch": {k: v for k, v in plan.shape._asdict().items() if k != "own"},
        "compute": plan.config.model.compute,
        "remat": recomputed(plan.config.model),
        "attention": compiled.attention,
        "compile_seconds": round(compiled.seconds, 1),
        "memory": plan.memory._asdict()
        | {"total": plan.memory.total, "device": int(room.memory), "usable": int(room.usable)},
        "passes": {
            one.name: one.memory._asdict() | {"total": one.memory.total, "compile_seconds": round(one.seconds, 1)}
            for one in plan.passes
        },
        "largest": plan.largest[0],
        "fits": not advice,
        "advice": advice,
        "collectives": collective_rows(compiled),
        "custom_calls": custom_calls(compiled.text),
        "work": compiled.work._asdict(),
        "roofline": None if speed is None else speed._asdict() | {"seconds": speed.seconds},
    }


def print_compiled(compiled: Compiled, passes: Sequence[Pass] = ()) -> None:
    """Prints the collectives, the work and the time of a step at the rates of data sheets."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items())
    seconds = "".join(f", {one.name} in {one.seconds:.0f} s" for one in passes)
    log_line(f"{len(compiled.groups)} devices ({mesh}), compiled in {compiled.seconds:.0f} s{seconds}")
    log_line(compiled.attention)
    if compiled.roofline is None:
        log_line("the compiler refuses a program of that size, so that its collectives and its speed are not known")
        return
    rows = [_collective_cells(row) for row in collective_rows(compiled) if row["sent"] >= 1e6]
    if rows:
        print_table(("axis", "collective", "a step", "dtypes", "GB sent", "asynchronous", "links"), rows)
    _print_speed(compiled, compiled.roofline)


def _collective_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns a row of `collective_rows` as texts."""
    asynchronous, links = "yes" if row["asynchronous"] else "no", "network" if row["network"] else "fast"
    sent = row["axis"], row["kind"], f"{row['count']:,}", " ".join(row["dtypes"]), f"{row['sent'] / 1e9:.3g}"
    return *sent, asynchronous, links


def _print_speed(compiled: Compiled, speed: Roofline) -> None:
    work, chip = compiled.work, compiled.target.chip
    log_line(
        f"a step of {work.tokens:,} tokens needs {work.useful:.3g} FLOPs for its gradient if rows are full, each token "
        f"is scored and sees all before it in its window; {work.executed:.3g} with recomputation and other passes"
    )
    log_line(
        f"each device: matmuls {speed.matmul:.3g} s at {chip.peak / 1e12:.0f} TFLOP/s, memory {speed.memory:.3g} s "
        f"at {chip.bandwidth / 1e12:.2f} TB/s, links {speed.overlapped:.3g} s beside, {speed.exposed:.3g} s alone"
    )
    each = speed.tokens_per_second / len(compiled.groups)
    log_line(f"{speed.tokens_per_second:,.0f} tokens/s ({each:,.0f} a device), MFU {speed.mfu:.0%}, {NOTE}")


def speed_advice(compiled: Compiled) -> list[str]:
    """Returns what would make a step faster, by its roofline; [] if its matmuls are what takes longest."""
    speed, lines = compiled.roofline, []
    if speed is None:
        return []
    if speed.exposed + max(speed.overlapped - speed.matmul, 0) > 0.2 * speed.seconds:
        chip = compiled.target.chip
        rows = collective_rows(compiled)
        worst = max(rows, key=lambda row: row["sent"] / (chip.network if row["network"] else chip.link))
        where = f"{worst['kind']} over {worst['axis']}" + (" through the network" if worst["network"] else "")
        fix = "more tokens a microbatch (data.rows) send less a token"
        lines.append(f"communication takes long, most of all {where}; {fix}")
    sharded, rows = [a for a in RULES["embed"] if compiled.mesh[a] > 1], collective_rows(compiled)
    sums = [row["sent"] for row in rows if row["kind"] == "all-reduce" and row["axis"] == " x ".join(sharded)]
    if sharded and sum(sums) > sum(row["sent"] for row in rows) / 2:
        lines.append(
            f"the compiler sums whole arrays over {' x '.join(sharded)} in place of gathering and scattering parts; a "
            f"smaller mesh.{sharded[0]} may avoid that"
        )
    if speed.memory > speed.matmul:
        lines.append("memory takes longer than matmuls: more tokens a microbatch (data.rows) spread the weights")
    return lines
