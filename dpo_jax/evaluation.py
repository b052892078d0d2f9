"""Accuracy, margins and KL on held-out data, with confidence intervals."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import distributed, reference
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.intervals import fisher, mean_interval, measured, wilson
from dpo_jax.logprobs import CHUNK, batch_logps, token_logps_of_batch, token_states_of_batch
from dpo_jax.losses import Loss, length_bias
from dpo_jax.microbatches import map_microbatches
from dpo_jax.models.interface import Model
from dpo_jax.records import Array, Batch, Logps, Tokens
from dpo_jax.sampling import generate
from dpo_jax.sampling.choose import most_likely_tokens
from dpo_jax.sharding import NO_COLLECTIVES, Collectives
from dpo_jax.step import eval_metrics, make_logps_step, only_trained

LogpsStep = Callable[[tuple[Any, Any], Batch, Any], Logps]


class Evaluator(NamedTuple):
    """Evaluates one table.

    Attributes:
      step: from `jit_eval_step`.
      table: N comparisons.
      ref_logps: float32[N, P, 2]; None for a loss without a reference.
      layout: layout of a batch.
      batch_size: comparisons per batch.
      put: moves a Batch to the devices.
      hparams: traced hyper-parameters of the loss.
    """

    step: Callable
    table: Table
    ref_logps: Array | None
    layout: pack.Layout
    batch_size: int
    put: Callable
    hparams: Any = ()


def jit_logps(
    model: Model, loss: Loss, collectives: Collectives = NO_COLLECTIVES, policy: Callable = only_trained
) -> LogpsStep:
    """Returns the compiled `((trained, base), batch, count) -> Logps [M, B, ...]`; arguments as of `make_eval_step`."""
    pure = make_logps_step(model, loss, collectives=collectives, policy=policy)

    def logps(pair: tuple[Any, Any], batch: Batch, count: Any) -> Logps:  # the name of the program
        return pure(pair, batch, count)

    return jax.jit(logps)


def jit_eval_step(logps: LogpsStep, loss_of: Callable[[Any], Loss]) -> Callable:
    """Returns `((trained, base), running, batch, count, hparams) -> metrics [M, R, G]`, as two compiled programs.

    They are the log-probs and their metrics, so that a reference can share the first and larger one.

    Args:
      logps: from `jit_logps`.
      loss_of: traced hyper-parameters -> the loss, so that other values do not compile again.
    """

    def metrics(found: Logps, running: Array, weights: Array, hparams: Any) -> dict[str, Array]:
        return eval_metrics(loss_of(hparams), found, running, weights)

    compiled = jax.jit(metrics)
    return lambda pair, running, batch, count, hparams: compiled(
        logps(pair, batch, count), running, batch.weights, hparams
    )


def reference_by(logps: LogpsStep) -> Callable[[Any, Batch, Any], np.ndarray]:
    """Returns `(params, batch, count) -> ref_logps`, float32[M, R, G, P, 2] on the host, by the policy's program.

    For a reference with the parameters of a whole policy: none below adapters.
    """

    def ref_logps(params: Any, batch: Batch, count: Any) -> np.ndarray:
        found = logps((params, None), batch, count)
        both = [distributed.fetch(x) for x in (found.policy, found.policy_shared)]
        return np.stack(both, axis=-1).reshape(batch.ref_logps.shape)

    return ref_logps


def evaluate_table(evaluator: Evaluator, params: tuple[Any, Any], running: Any) -> dict[str, np.ndarray]:
    """Returns the metrics of a table: name -> float32[N], in table order; NaN for comparisons without the metric.

    Args:
      evaluator: the table and its compiled step.
      params: (trained, base), see `jit_eval_step`.
      running: `TrainState.running` of the policy.
    """
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(evaluator.table), evaluator.batch_size):
        indices = np.arange(start, min(start + evaluator.batch_size, len(evaluator.table)))
        batch, count, places = pack.build_batch(evaluator.table, indices, evaluator.layout, evaluator.ref_logps)
        metrics = evaluator.step(params, running, evaluator.put(batch), count, evaluator.hparams)
        parts.append({k: pack.unpack_batch(distributed.fetch(v), places) for k, v in metrics.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def mean_with_interval(value: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Returns the (weighted) mean, the low and high end of its 95% interval, and the number of values.

    A single value has no interval, so that low and high are left out.
    """
    mean, half = mean_interval(value, weights)
    return measured(mean, mean - half, mean + half, len(value))


def summarize(metrics: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns the weighted mean and 95% interval of each metric, named `eval_NAME`, over the comparisons that have it.

    Accuracy has Wilson's interval and `length_bias` Fisher's, computed with the effective sample size
    (sum w)^2 / sum w^2. Metrics without any value are left out. If no comparison has both responses, the margin is the
    difference of the mean rewards, as in training.

    Args:
      metrics: name -> float32[N].
      weights: float32[N], 0 for comparisons to leave out.
    """
    valid = {k: (weights > 0) & (k.startswith("loss") | ~np.isnan(v)) for k, v in metrics.items()}
    out = {f"eval_{k}": mean_with_interval(metrics[k][at], weights[at]) for k, at in valid.items() if at.any()}
    if "eval_rewards/margins" in out:
        accuracy, known = out["eval_rewards/accuracies"], weights[valid["rewards/accuracies"]].astype(np.float64)
        effective = known.sum() ** 2 / (known**2).sum()
        ends = wilson(accuracy["mean"] * effective, effective)
        out["eval_rewards/accuracies"] = measured(accuracy["mean"], *ends, accuracy["n"])
        bias = float(length_bias(metrics, weights))
        out["eval_length_bias"] = measured(bias, *fisher(bias, effective), len(known))
    elif {"eval_rewards/chosen", "eval_rewards/rejected"} <= out.keys():
        chosen, rejected = out["eval_rewards/chosen"], out["eval_rewards/rejected"]
        mean = chosen["mean"] - rejected["mean"]
        half = math.hypot(*(entry.get("high", math.inf) - entry["mean"] for entry in (chosen, rejected)))
        out["eval_rewards/margins"] = measured(mean, mean - half, mean + half, chosen["n"] + rejected["n"])
    return out


class EvalModel(NamedTuple):
    """A policy to evaluate on tables and prompts, with its reference if it has one.

    Attributes:
      model: pure functions of policy and reference.
      loss: the objective whose metrics are computed.
      params: "policy" and, if there is one, "reference" -> parameters.
      running: `TrainState.running` of the policy.
      batch_size: comparisons, or completions, per batch.
      max_length: maximum length of prompt plus response, in tokens.
    """

    model: Model
    loss: Loss
    params: dict[str, Any]
    running: Any
    batch_size: int
    max_length: int


def table_logps(models: EvalModel, who: str, table: Table) -> np.ndarray:
    """Returns the log-probs of a table, float32[N, P, 2]; `who` is "policy" or "reference"."""
    layout = pack.choose_layout(table, max_length=models.max_length, batch_size=models.batch_size)
    ref_logps = reference.make_ref_logps_fn(partial(batch_logps, models.model))
    params = jax.device_put(models.params[who])
    return reference.table_ref_logps(ref_logps, params, table, layout, models.batch_size, jax.device_put)


def token_logps_per_example(models: EvalModel, table: Table) -> Iterator[tuple[Tokens, dict[str, list[Array]]]]:
    """Yields each comparison with its token log-probs: "policy" or "reference" -> P arrays float32[n_p]."""
    layout = pack.choose_layout(table, max_length=models.max_length, batch_size=models.batch_size)
    score = partial(token_logps_of_batch, models.model)
    step = jax.jit(lambda params, batch, count: map_microbatches(partial(score, params), batch, count))
    on_device = {who: jax.device_put(params) for who, params in models.params.items()}
    for start in range(0, len(table), models.batch_size):
        indices = np.arange(start, min(start + models.batch_size, len(table)))
        batch, count, places = pack.build_batch(table, indices, layout)
        found = {who: np.asarray(step(params, jax.device_put(batch), count)) for who, params in on_device.items()}
        for index, (m, r, g) in zip(indices, places, strict=True):
            slots = [batch.slot[m, r] == g * table.responses + p for p in range(table.responses)]
            yield table[int(index)], {who: [logps[m, r][slot] for slot in slots] for who, logps in found.items()}


def greedy_per_example(models: EvalModel, table: Table) -> Iterator[tuple[Array, Array]]:
    """Yields the policy's log-probs of the tokens of each response, float32[n], and whether each is the most likely.

    The comparisons of the table have one response each.
    """
    layout = pack.choose_layout(table, max_length=models.max_length, batch_size=models.batch_size)

    def score(params: Any, micro: Batch) -> tuple[Array, Array]:
        logps, hidden = token_states_of_batch(models.model, params, micro)
        return logps, most_likely(hidden, models.model.head(params)) == micro.target

    step = jax.jit(lambda params, batch, count: map_microbatches(partial(score, params), batch, count))
    params = jax.device_put(models.params["policy"])
    for start in range(0, len(table), models.batch_size):
        indices = np.arange(start, min(start + models.batch_size, len(table)))
        batch, count, places = pack.build_batch(table, indices, layout)
        logps, greedy = (np.asarray(found) for found in step(params, jax.device_put(batch), count))
        for m, r, g in places:
            yield logps[m, r][batch.slot[m, r] == g], greedy[m, r][batch.slot[m, r] == g]


def most_likely(hidden: Array, head: Array, chunk: int = CHUNK) -> Array:
    """Returns the most likely token int32[R, S] of hidden states [R, S, D], the logits of `chunk` at a time.

    A soft cap keeps the order of logits, so it is left out.
    """
    rows, scored, width = hidden.shape
    size, weight = max(1, min(chunk // rows, scored)), head.astype(hidden.dtype)
    parts = jnp.pad(hidden, ((0, 0), (0, -scored % size), (0, 0))).reshape(rows, -1, size, width)

    def best(part: Array) -> Array:
        return most_likely_tokens(jnp.einsum("rsd,vd->rsv", part, weight, preferred_element_type=jnp.float32))

    return jax.lax.map(best, parts.swapaxes(0, 1)).swapaxes(0, 1).reshape(rows, -1)[:, :scored]


def evaluate_model(models: EvalModel, table: Table) -> dict[str, np.ndarray]:
    """Returns the metrics of the loss on a table: name -> float32[N]."""
    ref_logps = table_logps(models, "reference", table) if "reference" in models.params else None
    layout = pack.choose_layout(table, max_length=models.max_length, batch_size=models.batch_size)
    step = jit_eval_step(jit_logps(models.model, models.loss), lambda _: models.loss)
    evaluator = Evaluator(step, table, ref_logps, layout, models.batch_size, jax.device_put)
    return evaluate_table(evaluator, (jax.device_put(models.params["policy"]), None), models.running)


def distinct_prompts(table: Table, count: int) -> list[Array]:
    """Returns the token ids of the first `count` distinct prompts of a table."""
    found: dict[bytes, Array] = {}
    for i in range(len(table)):
        if len(found) == count:
            break
        found.setdefault(table[i].prompt.tobytes(), table[i].prompt)
    return list(found.values())


def complete_prompts(models: EvalModel, prompts: list[Array], **options: Any) -> dict[str, list[Array]]:
    """Returns "policy" or "reference" -> completions as token ids, with the same seed; options as for `generate`."""
    sample = partial(generate, models.model, prompts=prompts, batch_size=models.batch_size, **options)
    return {who: sample(params) for who, params in models.params.items()}


def policy_kl(models: EvalModel, prompts: list[Array], completions: list[Array]) -> np.ndarray:
    """Returns log pi(y | x) - log pi_ref(y | x) of the policy's completions, float32[n], in nats.

    Of completions sampled with `PLAIN`, the mean is an unbiased estimate of the KL(policy || reference) of whole
    responses (paper, section 6.1), or of their first `max_new_tokens` tokens. Prompts are distinct, so that an interval
    of the values is one over prompts.
    """
    table = Table.of(Tokens(p, (c,)) for p, c in zip(prompts, completions, strict=True))
    models = models._replace(max_length=max(models.max_length, int(table.lengths().max()) + 1))
    return (table_logps(models, "policy", table) - table_logps(models, "reference", table))[:, 0, 0]
