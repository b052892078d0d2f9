"""metrics.jsonl: one JSON object per line, the record of truth for every table and figure.

A resumed run truncates it to the step of its checkpoint and goes on, so that a run killed at any instant leaves the
lines of one that was not.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError


def append_metrics(path: str | os.PathLike, step: int, examples: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line to a JSONL file and flushes it, so that a kill tears at most the last line.

    Args:
      path: the file, made if need be.
      step: updates done; a line on the state before the first update has 0.
      examples: comparisons trained on so far.
      metrics: name -> scalar (numpy's and JAX's too); NaN and infinities, which JSON lacks, become null.
    """
    line = {"step": int(step), "examples": int(examples)} | {k: _plain(v) for k, v in metrics.items()}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Returns a scalar as JSON has it."""
    if isinstance(value, str | int | None):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file; a last line torn by a kill is left out, one torn elsewhere is a UserError."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as e:
            if number == len(lines):  # no newline follows it
                break
            raise UserError(f"{path}:{number}: not JSON ({e.msg}); remove that line or the run folder") from e
        if row is not None:
            rows.append(row)
    return rows


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Drops the lines of later steps than `step`, and a torn last line, atomically; an absent file stays absent.

    Lines of `step` itself stay: whoever resumes from a checkpoint must have written them before it.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
