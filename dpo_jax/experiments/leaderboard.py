"""Every loss in worlds whose optimum is known: a compiled program for all strengths, labels, sizes and seeds of a loss.

A policy is a table of logits (`table_world`), which can be any policy. A seed has a world of its own. All losses of a
seed see the same responses with the same scores: as pairs, or as lists where they rank. The path of a run is measured
by exact sums at some of its steps.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from dpo_jax import distributed, losses
from dpo_jax.errors import UserError
from dpo_jax.experiments.fitted import Term, calibration_error, fitted_rewards
from dpo_jax.experiments.table_world import LABELS, LIST, ScoredLists, TableWorld, logits_logps, sample_lists
from dpo_jax.losses import Logps, Loss
from dpo_jax.losses.registry import find_entry
from dpo_jax.records import Array

SIZES = {"small": 2, "large": 64}  # different batches; a run sees them in the same order again and again
LISTS = 16  # of a batch: 32 pairs
CONDITIONS = tuple((labels, size) for size in SIZES for labels in LABELS)
LEARNING_RATE = 0.03  # of Adam at the first step; decays linearly to 0
FIRST_MEASURED, MEASURED = 5, 20  # step of the first measurement, and their number
AT_ONCE = 2  # losses that compile and train at a time


class Batches(NamedTuple):
    """The comparisons of a run. T batches, B comparisons in each, P responses, best first.

    Attributes:
      prompts: int32[B].
      ids: int32[T, B, P].
      scores: float32[T, B, P].
      chosen: float32[X, Y], the share of comparisons in which a response is the first.
    """

    prompts: Array
    ids: Array
    scores: Array
    chosen: Array


class LossPaths(NamedTuple):
    """What a loss did. S strengths, C conditions, N seeds, K measured steps.

    Attributes:
      betas: S strengths; NaN for a loss without beta.
      steps: int[K].
      reward: float[S, C, N, K], the true reward of the policy, in nats.
      kl: float[S, C, N, K], KL(policy || reference), in nats.
      chosen: float[S, C, N, K], by how much the log-probs of the chosen responses have risen, in nats.
      calibration: float[S, C, N], at the last step: the mean over pairs of responses of the reference of
        |sigmoid(difference of the rewards that the loss fits) - sigmoid(difference of true rewards)|; NaN for a loss
        that fits none.
    """

    betas: tuple[float, ...]
    steps: Array
    reward: Array
    kl: Array
    chosen: Array
    calibration: Array


def batches_of(lists: ScoredLists, loss: Loss, shape: tuple[int, int], batches: int) -> Batches:
    """Returns the batches of comparisons that a loss trains on, repeated in order up to `batches`.

    Losses of rankings see whole lists, losses of a gold, a chosen and a rejected response the best, the second and the
    last of each; all others see two pairs of each. A response to another prompt is the chosen one of the next list.

    Args:
      lists: scored lists, a multiple of `LISTS`.
      loss: the objective.
      shape: X prompts and Y responses.
      batches: T, a multiple of the number of different batches.
    """
    triples = loss.responses == 3 and not loss.mismatched
    of_prompt = LIST if triples or loss.responses is None else 2
    ids, scores = (np.reshape(x, (-1, LISTS * LIST // of_prompt, of_prompt)) for x in lists)
    order = np.argsort(-scores, axis=2)
    ids, scores = (np.take_along_axis(x, order, 2) for x in (ids, scores))
    if triples:
        ids, scores = ids[:, :, [0, 1, -1]], scores[:, :, [0, 1, -1]]
    if loss.mismatched:
        ids = np.concatenate([ids, np.roll(ids[:, :, :1], -2, axis=1)], 2)
        scores = np.concatenate([scores, 0.0 * scores[:, :, :1]], 2)
    ids, scores = (np.tile(x[:, :, : loss.responses], (batches // len(x), 1, 1)) for x in (ids, scores))
    prompts = np.repeat(np.arange(LISTS) % shape[0], LIST // of_prompt)
    return Batches(prompts, ids, scores, _shares(prompts, ids[:, :, 0], shape))


def _shares(prompts: Array, ids: Array, shape: tuple[int, int]) -> Array:
    """Returns the share of each response, float32[X, Y], among those at prompts int[B] and ids int[T, B]."""
    counts = np.zeros(shape, np.float32)
    np.add.at(counts, (np.broadcast_to(prompts, ids.shape), ids), 1.0)
    return counts / counts.sum()


def logps_of(policy: Array, world: TableWorld, at: tuple[Array, Array], **fields: Array) -> Logps:
    """Returns the log-probs of the responses at prompts and ids, of a policy float[X, Y]."""
    chosen, reference = policy[at], world.reference[at]
    shared = {"policy_shared": chosen, "reference_shared": reference}
    return Logps.of(chosen, reference, lengths=world.lengths[at[1]], **shared, **fields)


def table_rewards(term: Term, policy: Array, world: TableWorld) -> Array:
    """Returns the reward that a loss fits (`fitted`), of every response, float32[X, Y]; NaN where it fits none."""
    loss, (prompts, ids) = losses.build(dict(term)), np.indices(policy.shape).reshape(2, -1)
    repeated = np.repeat(ids[:, None], loss.responses or 2, axis=1)
    running = jnp.zeros(loss.carried)
    lp = logps_of(policy, world, (prompts[:, None], repeated), scores=0.0 * repeated, running=running)
    return fitted_rewards(term, lp).reshape(policy.shape)


def measured_steps(steps: int) -> Array:
    """Returns the steps at which a run is measured, int[K]; they lie closer at its start."""
    return np.unique(np.geomspace(min(FIRST_MEASURED, steps), steps, MEASURED).round().astype(int))


def train_table(term: Term, world: TableWorld, batches: Batches, steps: Array) -> tuple[Array, ...]:
    """Returns reward, KL and rise of chosen responses at `steps`, float32[K] each, and the calibration at the end."""
    loss, (start, unravel) = losses.build(dict(term)), ravel_pytree(world.logits)
    tx = optax.adam(optax.linear_schedule(LEARNING_RATE, 0.0, int(steps[-1])))

    def value(table: Array, running: Array, t: Array) -> tuple[Array, Array]:
        at = (batches.prompts[:, None], batches.ids[t % len(batches.ids)])
        fields = {"scores": batches.scores[t % len(batches.ids)], "running": running}
        lp = logps_of(logits_logps(unravel(table)), world, at, **fields)
        return jnp.mean(loss.values(lp)), loss.statistics(lp)

    def step(t: Array, state: Any) -> Any:
        table, optimizer, running = state
        gradient, running = jax.grad(value, has_aux=True)(table, running, t)
        updates, optimizer = tx.update(gradient, optimizer)
        return table + updates, optimizer, running

    def measure(state: Any, ends: Array) -> Any:
        state = jax.lax.fori_loop(ends[0], ends[1], step, state)
        policy = logits_logps(unravel(state[0]))
        mass, ratio = jnp.exp(policy), policy - world.reference
        sums = [(mass * world.reward).sum(1).mean(), (mass * ratio).sum(1).mean(), (batches.chosen * ratio).sum()]
        return state, sums

    ends = jnp.stack([jnp.asarray([0, *steps[:-1]]), jnp.asarray(steps)], 1)
    state, path = jax.lax.scan(measure, (start, tx.init(start), jnp.zeros(loss.carried)), ends)
    rewards = table_rewards(term, logits_logps(unravel(state[0])), world)
    return *path, calibration_error(rewards, world)


def beta_of(term: Term) -> bool:
    """Returns whether a term's loss has a beta that the term leaves open."""
    function = find_entry(term["name"]).function
    return "beta" not in term and "beta" in inspect.signature(function).parameters


def check_entrant(name: str, term: Term, betas: Sequence[float]) -> None:
    """Refuses a loss that trains no policy on pairs or lists with scores, and a beta that it cannot use."""
    for beta in betas if beta_of(term) else [None]:
        loss = losses.build({**term, **({} if beta is None else {"beta": beta})})
        if loss.rewards or loss.confidence:
            raise UserError(f"dpo-jax leaderboard: {name} trains a reward model, not a policy; leave it out")


def run_loss(term: Term, betas: Sequence[float], worlds: Sequence[TableWorld], steps: Array) -> LossPaths:
    """Trains a loss at every strength, under every condition, in every world, as one compiled program."""
    strengths = tuple(betas) if beta_of(term) else (float("nan"),)
    loss = losses.build(dict(term))
    data = [[_data(loss, world, seed, *condition) for seed, world in enumerate(worlds)] for condition in CONDITIONS]
    every = _stacked([_stacked(row) for row in data])

    def run(beta: Array, world: TableWorld, batches: Batches) -> tuple[Array, ...]:
        return train_table({**term, "beta": beta} if beta_of(term) else term, world, batches, steps)

    over_seeds = jax.vmap(run, (None, 0, 0))
    over_all = jax.vmap(jax.vmap(over_seeds, (None, None, 0)), (0, None, None))
    found = jax.device_get(jax.jit(over_all)(np.asarray(strengths, np.float32), _stacked(worlds), every))
    reward, kl, chosen, calibration = (np.asarray(x, np.float64) for x in found)
    return LossPaths(strengths, steps, reward, kl, chosen, calibration)


def _stacked(records: Sequence[Any]) -> Any:
    """Returns records of arrays as one with a leading axis."""
    return jax.tree.map(lambda *x: np.stack(x), *records)


def _data(loss: Loss, world: TableWorld, seed: int, labels: str, size: str) -> Batches:
    """Returns the comparisons of a seed under a condition."""
    lists = sample_lists(world, labels, SIZES[size] * LISTS, seed)
    return batches_of(lists, loss, world.reward.shape, max(SIZES.values()))


def run_leaderboard(
    terms: Mapping[str, Term],
    betas: Sequence[float],
    worlds: Sequence[TableWorld],
    steps: int,
    report: Callable[[str], None] = lambda name: None,
    run: Callable[..., LossPaths] = run_loss,
) -> dict[str, LossPaths]:
    """Returns the paths of every loss, by name.

    Args:
      terms: name -> a term of `losses.build`.
      betas: strengths of each loss that has a beta.
      worlds: one for each seed.
      steps: updates of a run.
      report: called with the name of each loss that is done.
      run: (term, betas, worlds, measured steps) -> paths; `kept_paths.run_kept` keeps them in files.
    """
    found: dict[str, LossPaths] = {}

    def task(name: str) -> None:
        found[name] = run(terms[name], betas, worlds, measured_steps(steps))
        report(name)

    for name, term in terms.items():
        check_entrant(name, term, betas)
    distributed.run_concurrently([partial(task, name) for name in terms], AT_ONCE)
    return {name: found[name] for name in terms}
