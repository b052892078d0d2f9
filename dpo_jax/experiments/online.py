"""Online DPO: each round samples the policy, labels the samples by a reward and trains on these pairs with DPO.

The reference is the policy at the start. With Bradley-Terry labels, the optimum is thus that of DPO on any other pairs
(paper, equation 4); the pairs follow the policy (Guo et al. 2024, arXiv 2402.04792).
"""

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dpo_jax import losses
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError, closest
from dpo_jax.experiments.rollouts import OnMetrics, OnStep, Problem, on_devices, sample_rollouts
from dpo_jax.logprobs import as_ref_logps, batch_logps
from dpo_jax.microbatches import map_microbatches
from dpo_jax.models.interface import Model
from dpo_jax.records import Array, Batch, Tokens, TrainState
from dpo_jax.rewards.labels import LABELLERS
from dpo_jax.step import init_state, make_train_step

LENGTH_UNIT = 128  # the length of a row is a multiple of it
MICROBATCH_TOKENS = 2048
SOFT = "soft"


class OnlineOptions(NamedTuple):
    """Options of online DPO.

    Attributes:
      beta: strength of the constraint to the reference.
      learning_rate: of Adam in the first round; it decays linearly to 0 after the last.
      prompts: prompts per round.
      completions: completions per prompt, at least 2.
      max_new_tokens: length of the longest completion.
      label: how scores make pairs: bradley_terry, ranked or best_worst, as in `rewards.labels`; or soft, all pairs with
        the probability sigmoid(r_i - r_j) instead of a sampled label.
      batch_size: pairs per step.
      inner_epochs: passes over the pairs of a round.
    """

    beta: float = 0.1
    learning_rate: float = 1e-5
    prompts: int = 128
    completions: int = 2
    max_new_tokens: int = 64
    label: str = "bradley_terry"
    batch_size: int = 64
    inner_epochs: int = 1


def train_online(
    problem: Problem, options: OnlineOptions, on_step: OnStep | None = None, on_metrics: OnMetrics | None = None
) -> Any:
    """Returns the policy's parameters after online DPO.

    Runs of one model with the same sizes share their compiled programs.

    Args:
      problem: model, parameters, prompts, reward; its steps are rounds.
      options: hyper-parameters and sizes.
      on_step: called after each round with the parameters.
      on_metrics: called after each round with score, pairs, and TRL's metrics of DPO averaged over the round's steps.

    Raises:
      UserError: incompatible options, no prompts, a round without a pair, or a loss that is not finite.
    """
    _check(options, problem)
    layout, problem = _layout(options, max(map(len, problem.prompts))), on_devices(problem)
    state = init_state(problem.policy, optax.adam(0.0), losses.build({"name": "dpo"}))
    for done in range(problem.steps):
        random = np.random.default_rng((problem.seed, done))
        table, score = _labelled(problem, state.params, options, random)
        hparams = {"beta": options.beta, "learning_rate": options.learning_rate * (1 - done / problem.steps)}
        steps = []
        for indices in _batches(len(table), options, random):
            batch, count, _ = pack.build_batch(table, indices, layout)
            state, metrics = _step(problem.model, state, problem.reference, batch, np.int32(count), hparams)
            steps.append(metrics)
        means = {name: float(np.mean([metrics[name] for metrics in steps])) for name in steps[0]}
        if means["nonfinite"]:
            raise UserError(f"online DPO: the loss is not finite in round {done + 1}; lower learning_rate")
        if on_metrics is not None:
            on_metrics(done + 1, {"score": score, "pairs": float(len(table))} | means)
        if on_step is not None:
            on_step(done + 1, state.params)
    return state.params


def _check(options: OnlineOptions, problem: Problem) -> None:
    """Rejects options without a meaning."""
    if options.label not in (SOFT, *LABELLERS):
        known = closest(options.label, [SOFT, *LABELLERS])
        raise UserError(f"online DPO: label: unknown {options.label!r}; {known}")
    if options.completions < 2:
        raise UserError(f"online DPO: completions must be at least 2, got {options.completions}")
    for name in ("prompts", "batch_size", "inner_epochs"):
        if getattr(options, name) < 1:
            raise UserError(f"online DPO: {name} must be at least 1, got {getattr(options, name)}")
    if not len(problem.prompts):
        raise UserError("online DPO: there are no prompts; give at least one")


def _layout(options: OnlineOptions, longest: int) -> pack.Layout:
    """Returns the layout of a step; it holds any pairs of completions."""
    length = -(-(longest + 2 * options.max_new_tokens) // LENGTH_UNIT) * LENGTH_UNIT
    rows = max(1, min(options.batch_size, MICROBATCH_TOKENS // length))
    return pack.Layout(-(-options.batch_size // rows), rows, length, length // 4, length)


def _labelled(
    problem: Problem, policy: Any, options: OnlineOptions, random: np.random.Generator
) -> tuple[Table, float]:
    """Returns labelled pairs of the policy's completions, and the mean score of all completions."""
    copies = options.completions
    samples = sample_rollouts(problem, policy, random, options.prompts, copies, options.max_new_tokens)
    scores = np.asarray(samples.scores, np.float64)
    if not np.isfinite(scores).all():
        raise UserError("online DPO: a score is not a finite number; fix the reward")
    scored: list[Any] = [(tuple(c.tolist()), float(s)) for c, s in zip(samples.completions, scores, strict=True)]
    pairs = [
        Tokens(prompt, (np.array(a, np.int32), np.array(b, np.int32)), preference=preference)
        for i, prompt in enumerate(samples.prompts)
        for a, b, preference in _pairs(scored[i * copies : (i + 1) * copies], options.label, random)
    ]
    if not pairs:
        raise UserError("online DPO: the completions of a round make no pair; increase prompts or completions")
    return Table.of(pairs), float(scores.mean())


def _pairs(scored: list[Any], label: str, random: np.random.Generator) -> list[tuple[Any, Any, float]]:
    """Returns pairs of the scored (completion, score), and the probability that the first is the better one."""
    if label != SOFT:
        return [(chosen, rejected, 1.0) for chosen, rejected in LABELLERS[label](scored, random)]
    combinations = itertools.combinations(scored, 2)
    return [(a, b, 0.5 * (1 + math.tanh((r - s) / 2))) for (a, r), (b, s) in combinations if a != b]


def _batches(count: int, options: OnlineOptions, random: np.random.Generator) -> list[Array]:
    """Returns the pair indices of each step of a round; the last step of a pass may have fewer."""
    starts = range(0, count, options.batch_size)
    orders = (random.permutation(count) for _ in range(options.inner_epochs))
    return [order[start : start + options.batch_size] for order in orders for start in starts]


@partial(jax.jit, static_argnums=0)
def _step(
    model: Model, state: TrainState, reference: Any, batch: Batch, count: Array, hparams: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state after a step of DPO, and TRL's metrics."""
    logps = partial(batch_logps, model)
    ref_logps = map_microbatches(lambda micro: as_ref_logps(logps(reference, micro), micro), batch, count)
    loss = losses.build({"name": "dpo", "beta": hparams["beta"]})
    tx = optax.adam(hparams["learning_rate"])
    return make_train_step(model, loss, tx)(state, batch._replace(ref_logps=ref_logps), count)
