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
from dpo_jax.paths import written

SAMPLED_KL = "kl(policy || reference)"  # `eval_kl` in the eval.json of older runs


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
    """Returns the lines of a JSONL file; a last line torn by a kill is left out.

    Raises:
      UserError: the file cannot be read; a line, but a torn last one, is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); fix the file or remove the run folder") from e
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as e:
            if number == len(lines):  # no newline follows it
                break
            why = " ".join(str(e).split())
            raise UserError(f"{path}:{number}: not JSON ({why}); remove that line or the run folder") from e
        if row is not None and not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove that line or the run folder")
        if row is not None:
            rows.append(row)
    return rows


def with_current_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metrics under the names of this version; those of older runs differ in two.

    `kl` was the mean of log ref - log pi over the data's responses, now `logratio` with the other sign, and is the KL
    of samples now, which was `kl(policy || reference)`. An old `kl` has no `logratio` beside it, but the log-ratios
    of a response, which a loss without a reference has not.

    Args:
      metrics: name -> number, of a line of `metrics.jsonl`; or mean, low, high and n, of `eval.json`.
    """
    found = {}
    for name, value in metrics.items():
        split = "eval_" if name.startswith("eval_") else ""
        old = {SAMPLED_KL, f"{split}logratios/chosen", f"{split}logratios/rejected"} & set(metrics)
        if name == f"{split}kl" and old and f"{split}logratio" not in metrics:
            name, value = f"{split}logratio", _negative(value)
        found["eval_kl" if name == SAMPLED_KL else name] = value
    return found


def _negative(value: Any) -> Any:
    if isinstance(value, Mapping):
        ends = {"mean": "mean", "low": "high", "high": "low"}
        return dict(value) | {name: _negative(value[other]) for name, other in ends.items() if other in value}
    return -value if isinstance(value, float | int) else value


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Drops the lines of later steps than `step`, and a torn last line, atomically; an absent file stays absent.

    Lines of `step` itself stay: whoever resumes from a checkpoint must have written them before it.
    """
    if not Path(path).exists():
        return
    rows = read_metrics(path)
    if odd := next((row for row in rows if type(row.get("step")) is not int), None):
        raise UserError(f"{path}: a line has the step {odd.get('step')!r}; remove that line or the run folder")
    with written(Path(path)) as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows if row["step"] <= step)
