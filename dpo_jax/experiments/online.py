"""Online DPO: in each round the policy writes, a reward labels what it wrote, and DPO learns from these pairs.

The reference stays that of the start, so that with Bradley-Terry labels of a reward the best policy is the one that DPO
on any other pairs has (paper, eq. 4); what is new is that pairs are of what the policy writes now (Guo et al. 2024,
arXiv 2402.04792).
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dpo_jax import losses
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError, closest
from dpo_jax.experiments.ppo import Each, Reward, Tell
from dpo_jax.logprobs import as_ref_logps, batch_logps, map_microbatches
from dpo_jax.models.model import Model
from dpo_jax.records import Array, Batch, Tokens, TrainState
from dpo_jax.rewards.labels import LABELLERS
from dpo_jax.sampling import generate
from dpo_jax.step import init_state, make_train_step

UNIT = 128  # of the length of a row
MICROBATCH = 2048  # tokens
SOFT = "soft"


class OnlineOptions(NamedTuple):
    """How online DPO goes.

    Attributes:
      beta: strength of the constraint to the reference.
      learning_rate: of Adam in the first round; it falls in a line to 0 after the last.
      prompts: prompts a round.
      completions: of each of them, at least 2.
      max_new_tokens: longest completion.
      label: how scores make pairs: bradley_terry, ranked or best_worst, as in `rewards.label`; or soft, all pairs with
        the probability sigmoid(r_i - r_j) in the place of a draw.
      batch_size: pairs in a step.
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
    model: Model,
    params: Any,
    reference: Any,
    prompts: Sequence[Array],
    reward: Reward,
    options: OnlineOptions,
    *,
    steps: int,
    seed: int,
    eos: int,
    each: Each | None = None,
    tell: Tell | None = None,
) -> Any:
    """Returns the parameters of a policy after online DPO.

    Runs of one model with the same sizes share their compiled programs, as `ppo.train`'s do.

    Args:
      model: pure functions of policy and reference.
      params: the policy at the start.
      reference: parameters that stay.
      prompts: int32 ids, drawn from anew in every round.
      reward: scores completions, which end with EOS unless they were cut.
      options: how.
      steps: rounds.
      seed: of everything random.
      eos: the token that ends a completion.
      each: is told the rounds done and the parameters after each round.
      tell: is told them and the round's figures: score, pairs, and TRL's metrics of DPO as means over its steps.

    Raises:
      UserError: options that do not go together, no prompts, a round without a pair, or a loss that is not finite.
    """
    _check(options, prompts)
    shape = _shape(options, max(map(len, prompts)))
    model = model._replace(axes=None)  # so that it can be the key of a compiled program
    params, reference = jax.device_put((params, reference))
    state = init_state(params, optax.adam(0.0), losses.build({"name": "dpo"}))
    for done in range(steps):
        draw = np.random.default_rng((seed, done))
        table, score = _labelled(model, state.params, prompts, reward, options, draw, eos)
        numbers = {"beta": options.beta, "learning_rate": options.learning_rate * (1 - done / steps)}
        found = []
        for rows in _batches(len(table), options, draw):
            batch, count, _ = pack.build_batch(table, rows, shape)
            state, metrics = _step(model, state, reference, batch, np.int32(count), numbers)
            found.append(metrics)
        told = {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}
        if told["nonfinite"]:
            raise UserError(f"online DPO: the loss is not finite in round {done + 1}; lower learning_rate")
        if tell is not None:
            tell(done + 1, {"score": score, "pairs": float(len(table))} | told)
        if each is not None:
            each(done + 1, state.params)
    return state.params


def _check(options: OnlineOptions, prompts: Sequence[Array]) -> None:
    if options.label not in (SOFT, *LABELLERS):
        known = closest(options.label, [SOFT, *LABELLERS])
        raise UserError(f"online DPO: label: unknown {options.label!r}; {known}")
    if options.completions < 2 or min(options.prompts, options.batch_size, options.inner_epochs) < 1:
        raise UserError("online DPO: completions are at least 2, prompts, batch_size and inner_epochs at least 1")
    if not len(prompts):
        raise UserError("online DPO: there are no prompts")


def _shape(options: OnlineOptions, longest: int) -> pack.Layout:
    """Returns the layout of a step, which holds any pairs of completions."""
    length = -(-(longest + 2 * options.max_new_tokens) // UNIT) * UNIT
    rows = max(1, min(options.batch_size, MICROBATCH // length))
    return pack.Layout(-(-options.batch_size // rows), rows, length, length // 4, length)


def _labelled(
    model: Model,
    policy: Any,
    prompts: Sequence[Array],
    reward: Reward,
    options: OnlineOptions,
    draw: np.random.Generator,
    eos,
) -> tuple[Table, float]:
    """Returns pairs of the policy's completions, labelled, and the mean score of all completions."""
    chosen = draw.choice(len(prompts), options.prompts, replace=options.prompts > len(prompts))
    asked, copies = [np.asarray(prompts[i], np.int32) for i in chosen], options.completions
    answers = generate(
        model, policy, asked, copies=copies, max_new_tokens=options.max_new_tokens, eos_id=eos,
        seed=int(draw.integers(2**31)), batch_size=copies * len(asked),
    )  # fmt: skip
    scores = np.asarray(reward([p for p in asked for _ in range(copies)], answers), np.float64)
    if not np.isfinite(scores).all():
        raise UserError("online DPO: a score is no finite number")
    written: list[Any] = [(tuple(a.tolist()), float(s)) for a, s in zip(answers, scores, strict=True)]
    pairs = [
        Tokens(prompt, (np.array(a, np.int32), np.array(b, np.int32)), preference=preference)
        for i, prompt in enumerate(asked)
        for a, b, preference in _pairs(written[i * copies : (i + 1) * copies], options.label, draw)
    ]
    if not pairs:
        raise UserError("online DPO: no two completions of a prompt differ, so there is nothing to learn from")
    return Table.of(pairs), float(scores.mean())


def _pairs(scored: list[Any], label: str, draw: np.random.Generator) -> list[tuple[Any, Any, float]]:
    """Returns pairs of (completion, score), each with the probability that its first is the better one."""
    if label != SOFT:
        return [(chosen, rejected, 1.0) for chosen, rejected in LABELLERS[label](scored, draw)]
    every = itertools.combinations(scored, 2)
    return [(a, b, 0.5 * (1 + math.tanh((r - s) / 2))) for (a, r), (b, s) in every if a != b]


def _batches(count: int, options: OnlineOptions, draw: np.random.Generator) -> list[Array]:
    """Returns the rows of each step of a round; the last of a pass may be fewer."""
    starts = range(0, count, options.batch_size)
    orders = (draw.permutation(count) for _ in range(options.inner_epochs))
    return [order[start : start + options.batch_size] for order in orders for start in starts]


@partial(jax.jit, static_argnums=0)
def _step(
    model: Model, state: TrainState, reference: Any, batch: Batch, count: Array, numbers: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state after a step of DPO, and TRL's metrics."""
    logps = partial(batch_logps, model)
    column = map_microbatches(lambda micro: as_ref_logps(logps(reference, micro), micro), batch, count)
    loss = losses.build({"name": "dpo", "beta": numbers["beta"]})
    tx = optax.adam(numbers["learning_rate"])
    return make_train_step(model, loss, tx)(state, batch._replace(ref_logps=column), count)
