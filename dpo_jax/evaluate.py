"""Accuracy, margins and KL on held-out data, with confidence intervals."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import processes, reference
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import batch_logps
from dpo_jax.losses import Loss
from dpo_jax.metrics import mean_interval, wilson
from dpo_jax.models import Model
from dpo_jax.records import Array, Tokens
from dpo_jax.sample import sample
from dpo_jax.sharding import ALONE, Rows
from dpo_jax.step import make_eval_step


class Evaluator(NamedTuple):
    """What evaluates one table.

    Attributes:
      step: the compiled eval step.
      table: N comparisons.
      reference: float32[N, P], or None for a loss without one.
      shape: the layout of a batch.
      batch_size: comparisons in a batch.
      put: moves a Batch to the devices.
    """

    step: Callable
    table: Table
    reference: Array | None
    shape: pack.Shape
    batch_size: int
    put: Callable


def make_step(logps: Callable, loss: Any, rows: Rows = ALONE) -> Callable:
    """Returns the compiled eval step, `(params, batch, count) -> metrics [M, R, G]`."""
    return jax.jit(rows.each(make_eval_step(logps, loss)))


def values(evaluator: Evaluator, params: Any) -> dict[str, np.ndarray]:
    """Returns every metric of every comparison, float32[N] each, in the order of the table."""
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(evaluator.table), evaluator.batch_size):
        rows = np.arange(start, min(start + evaluator.batch_size, len(evaluator.table)))
        batch, count, places = pack.build(evaluator.table, rows, evaluator.shape, evaluator.reference)
        metrics = evaluator.step(params, evaluator.put(batch), count)
        parts.append({k: pack.unpack(processes.fetch(v), places) for k, v in metrics.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def interval(value: np.ndarray) -> dict[str, float]:
    """Returns mean, low and high (95%) and the number of values."""
    mean, half = mean_interval(value)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(value)}


def summary(metrics: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns the `interval` of each metric, named with `eval_` in front; Wilson's for accuracy."""
    out = {f"eval_{name}": interval(value) for name, value in metrics.items()}
    right = metrics.get("rewards/accuracies")
    if right is not None:
        low, high = wilson(float(right.sum()), len(right))
        out["eval_rewards/accuracies"] |= {"low": low, "high": high}
    return out


class Judge(NamedTuple):
    """A policy, perhaps beside its reference, to be measured.

    Attributes:
      model: pure functions of both.
      loss: whose metrics are wanted.
      params: "policy" and perhaps "reference" -> parameters.
      batch_size: comparisons, or completions, at a time.
      max_length: longest prompt plus response in tokens.
    """

    model: Model
    loss: Loss
    params: dict[str, Any]
    batch_size: int
    max_length: int


def logps(judge: Judge, who: str, table: Table) -> np.ndarray:
    """Returns the log-probs of a table under one of the models, float32[N, P]."""
    shape = pack.choose(table, max_length=judge.max_length, batch_size=judge.batch_size)
    column = reference.make_column(partial(batch_logps, judge.model))
    params = jax.device_put(judge.params[who])
    return reference.one_pass(column, params, table, shape, judge.batch_size, jax.device_put)


def held_out(judge: Judge, table: Table) -> dict[str, np.ndarray]:
    """Returns every metric of the loss for every comparison of a table, float32[N] each."""
    column = logps(judge, "reference", table) if "reference" in judge.params else None
    shape = pack.choose(table, max_length=judge.max_length, batch_size=judge.batch_size)
    step = make_step(partial(batch_logps, judge.model), judge.loss)
    evaluator = Evaluator(step, table, column, shape, judge.batch_size, jax.device_put)
    return values(evaluator, jax.device_put(judge.params["policy"]))


def distinct_prompts(table: Table, count: int) -> list[Array]:
    """Returns the first `count` distinct prompts of a table as ids."""
    found: dict[bytes, Array] = {}
    for i in range(len(table)):
        if len(found) == count:
            break
        found.setdefault(table[i].prompt.tobytes(), table[i].prompt)
    return list(found.values())


def complete(judge: Judge, prompts: list[Array], **options: Any) -> dict[str, list[Array]]:
    """Returns each model's completions of the same prompts from the same seed; options as for `sample`."""
    draw = partial(sample, judge.model, prompts=prompts, batch_size=judge.batch_size, **options)
    return {who: draw(jax.device_put(params)) for who, params in judge.params.items()}


def kl(judge: Judge, prompts: list[Array], completions: list[Array]) -> np.ndarray:
    """Returns log pi(y | x) - log pi_ref(y | x) of the policy's own completions, whose mean estimates
    KL(policy || reference) over whole sequences, in nats (paper, section 6.1).

    A completion that reached the length limit counts up to there.
    """
    table = Table.of(Tokens(p, (c,)) for p, c in zip(prompts, completions, strict=True))
    judge = judge._replace(max_length=max(judge.max_length, int(table.lengths().max()) + 1))
    return (logps(judge, "policy", table) - logps(judge, "reference", table))[:, 0]
