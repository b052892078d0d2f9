"""Evaluations of a run by the metric of `keep_best`: their values, patience, and the evaluation of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.paths import load_json
from dpo_jax.training.checkpoint import EVALUATION, MANIFEST, goodness, read_manifest, write_evaluation
from dpo_jax.training.metrics_file import read_metrics, with_current_names

Evaluated = dict[str, dict[str, float]]  # metric -> mean, low, high (95%), n


def means(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns metric -> mean of an evaluation."""
    return {name: entry["mean"] for name, entry in found.items()}


def evaluated_values(run: Path, metric: str) -> list[Any]:
    """Returns the values of a metric in metrics.jsonl, one for each evaluation after the first update."""
    lines = [with_current_names(line) for line in read_metrics(run / "metrics.jsonl")] if metric else []
    return [line[metric] for line in lines if metric in line and line["step"] > 0]


def evaluations_since_best(metric: str, values: Sequence[float | None]) -> int:
    """Returns the number of evaluations after the best value; of equal values, the first one counts."""
    good = [goodness(metric, value) for value in values]
    return len(good) - 1 - good.index(max(good)) if good else 0


def checkpoint_evaluation(checkpoint: Path) -> Evaluated:
    """Returns the evaluation at the step of a checkpoint; {} without one.

    A checkpoint of an earlier version holds the means alone: `low`, `high` and `n` are missing.
    """
    if (checkpoint / EVALUATION).is_file():
        return with_current_names(load_json(checkpoint / EVALUATION, dict).get("metrics", {}))
    found = read_manifest(checkpoint)["metrics"] if (checkpoint / MANIFEST).is_file() else {}
    return {name: {"mean": value} for name, value in with_current_names(found).items()}


def keep_evaluation(run: Path, step: int) -> None:
    """Makes eval.json of a run that of a step, the exported one, if it is another evaluation."""
    path, found = run / EVALUATION, checkpoint_evaluation(run / "checkpoints" / str(step))
    known = load_json(path, dict) if path.is_file() else {}
    foreign = known.get("step") != step or _is_foreign(known)
    if foreign and found and all("n" in entry for entry in found.values()):
        write_evaluation(path, step, found)


def run_evaluation(run: Path, step: int) -> Evaluated:
    """Returns the evaluation of a step of a run on its held-out data: that of eval.json, else that of its checkpoint.

    An evaluation on other data, or with another loss or reference, by `dpo-jax eval RUN --data...`, does not count.
    """
    path = run / EVALUATION
    found = load_json(path, dict) if path.is_file() else {}
    if found.get("step") == step and not _is_foreign(found):
        return with_current_names(found.get("metrics", {}))
    return checkpoint_evaluation(run / "checkpoints" / str(step))


def _is_foreign(stored: Mapping[str, Any]) -> bool:
    """Returns whether an eval.json is an evaluation with other data, loss or reference than the run has."""
    return bool({"data", "loss", "reference"} & set(stored))
