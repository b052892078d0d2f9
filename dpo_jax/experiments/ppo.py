"""PPO on a reward with a penalty on the distance from the reference: the paper's baselines PPO and PPO-GT.

The policy and its value function share all layers: the value of a text is a linear head's product with the hidden
state of its last token, as in TRL's PPOTrainer. In each step completions are drawn, scored and learned from in several
passes over minibatches. `ppo_parts` has the pieces, with their sources.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.experiments import ppo_parts as parts
from dpo_jax.logprobs import token_logps_of_batch, token_states_of_batch
from dpo_jax.models.model import Model
from dpo_jax.records import Array, Batch, Tokens
from dpo_jax.sampling import generate

Reward = Callable[[list[Array], list[Array]], np.ndarray]  # (prompts, completions), n of ids each -> float32[n]
Each = Callable[[int, Any], None]  # (steps done, the policy's parameters)
Tell = Callable[[int, dict[str, float]], None]  # (steps done, figures)


class PpoOptions(NamedTuple):
    """How PPO goes; defaults as in the code of Ziegler et al. 2019, or TRL's where that depends on the task.

    Attributes:
      kl_target: nats a completion that the controller aims at.
      learning_rate: of Adam (epsilon 1e-5) in the first step; it falls in a line to 0 after the last.
      rollouts: completions a step.
      inner_epochs: passes over a step's completions.
      minibatches: in each pass; they share the completions evenly.
      max_new_tokens: longest completion.
      gamma: discount.
      lam: lambda of the advantage estimates.
      clip: how far from 1 a ratio of probabilities counts.
      value_clip: how far from the old value a new one counts.
      vf_coef: weight of the value function's loss.
      init_kl_coef: beta at the start.
      horizon: completions in which the controller corrects its error; infinite for a beta that stays.
      whiten_rewards: whether a step's rewards are divided by their standard deviation.
      max_grad_norm: to which a gradient is clipped.
    """

    kl_target: float
    learning_rate: float = 1.41e-5
    rollouts: int = 256
    inner_epochs: int = 4
    minibatches: int = 4
    max_new_tokens: int = 64
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    vf_coef: float = 0.1
    init_kl_coef: float = 0.2
    horizon: float = 10_000.0
    whiten_rewards: bool = True
    max_grad_norm: float = 1.0


class Learner(NamedTuple):
    """What PPO trains: the policy, and the value function's head {weight: [D], bias: []} on its hidden states."""

    policy: Any
    head: dict[str, Array]


class Rollouts(NamedTuple):
    """A step's completions, one to a row, float32[N, T] but for the batch.

    Attributes:
      batch: fields [N, ...].
      logps: log pi of their tokens when they were drawn.
      values: by the value function then.
      advantages: whitened.
      returns: what the value function should have said.
    """

    batch: Batch
    logps: Array
    values: Array
    advantages: Array
    returns: Array


def train_ppo(
    model: Model,
    params: Any,
    reference: Any,
    prompts: Sequence[Array],
    reward: Reward,
    options: PpoOptions,
    *,
    steps: int,
    seed: int,
    eos: int,
    each: Each | None = None,
    tell: Tell | None = None,
) -> Any:
    """Returns the parameters of a policy after PPO.

    Runs of one model with the same sizes share their compiled programs, whatever their other options: sizes are
    `rollouts`, `inner_epochs`, `minibatches`, `max_new_tokens`, and the longest prompt in units of 32 tokens.

    Args:
      model: pure functions of policy and reference.
      params: the policy at the start.
      reference: parameters that stay.
      prompts: int32 ids, drawn from anew in every step.
      reward: scores completions, which end with EOS unless they were cut.
      options: how.
      steps: each of `rollouts` completions.
      seed: of everything random.
      eos: the token that ends a completion.
      each: is told the steps done and the parameters after each step.
      tell: is told them and the step's figures: score, kl, kl_coef, length, policy_loss, value_loss, clipped.

    Raises:
      UserError: options that do not go together, or a step that is not finite.
    """
    _check(options, prompts)
    shape = _shape(options, prompts)
    model = model._replace(axes=None)  # so that it can be the key of a compiled program
    learner, reference = jax.device_put((_learner(model, params), reference))
    opt_state, kl_coef = _adam(0.0, 0.0).init(learner), options.init_kl_coef
    numbers = {name: value for name, value in options._asdict().items() if isinstance(value, float)}
    sizes = options.inner_epochs, options.minibatches, options.whiten_rewards
    for step in range(steps):
        draw = np.random.default_rng((seed, step))
        batch, scores = _drawn(model, learner.policy, prompts, reward, options, shape, draw, eos)
        now = numbers | {"learning_rate": options.learning_rate * (1 - step / steps), "kl_coef": kl_coef}
        key = jax.random.key(int(draw.integers(2**31)))
        learner, opt_state, found = _step(model, sizes, learner, reference, opt_state, batch, scores, now, key)
        told = {name: float(value) for name, value in found.items()} | {"kl_coef": kl_coef}
        if not np.isfinite(list(told.values())).all():
            raise UserError(f"PPO is not finite at step {step + 1} ({told}); lower learning_rate")
        kl_coef = parts.adapt_kl_coef(kl_coef, told["kl"], options.kl_target, options.rollouts, options.horizon)
        if tell is not None:
            tell(step + 1, told)
        if each is not None:
            each(step + 1, learner.policy)
    return learner.policy


def _shape(options: PpoOptions, prompts: Sequence[Array]) -> pack.Layout:
    """Returns the layout of a step's completions: one to a row, a minibatch's worth at a time."""
    longest, new = max(map(len, prompts)), options.max_new_tokens
    return pack.Layout(options.minibatches, options.rollouts // options.minibatches, longest + new, 1, new)


def _learner(model: Model, params: Any) -> Learner:
    """Returns what is trained at the start, when every text is worth 0."""
    width = model.architecture.width + model.architecture.head_bias  # see `Model.head`
    return Learner(params, {"weight": jnp.zeros(width), "bias": jnp.zeros(())})


def _check(options: PpoOptions, prompts: Sequence[Array]) -> None:
    if options.minibatches < 1 or options.rollouts < 1 or options.rollouts % options.minibatches:
        raise UserError(f"PPO: {options.rollouts} rollouts do not make {options.minibatches} equal minibatches")
    if not options.kl_target > 0 or not options.horizon > 0:
        raise UserError("PPO: kl_target and horizon are above 0; an infinite horizon leaves the KL coefficient alone")
    if not len(prompts):
        raise UserError("PPO: there are no prompts")


def _drawn(
    model: Model,
    policy: Any,
    prompts: Sequence[Array],
    reward: Reward,
    options: PpoOptions,
    shape: pack.Layout,
    draw,
    eos,
) -> tuple[Batch, Array]:
    """Returns a step's completions as a batch [M, R, ...] of one to a row, and their scores float32[M, R]."""
    chosen = draw.choice(len(prompts), options.rollouts, replace=options.rollouts > len(prompts))
    asked, count = [np.asarray(prompts[i], np.int32) for i in chosen], options.rollouts
    answers = generate(
        model, policy, asked, max_new_tokens=options.max_new_tokens, eos_id=eos, seed=int(draw.integers(2**31)),
        batch_size=count,
    )  # fmt: skip
    scored = np.asarray(reward(asked, answers), np.float32)
    table = Table.of(Tokens(p, (a,)) for p, a in zip(asked, answers, strict=True))
    batch, _, places = pack.build_batch(table, np.arange(count), shape)
    scores = np.zeros((shape.microbatches, shape.rows), np.float32)
    scores[places[:, 0], places[:, 1]] = scored
    return batch, scores


def _adam(learning_rate: Any, norm: Any) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(norm), optax.adam(learning_rate, eps=1e-5))


def _scored(model: Model, learner: Learner, batch: Batch) -> tuple[Array, Array]:
    """Returns log-probs and values of the tokens of some rows, float32[R, T]; a value is of the text before a token."""
    logps, hidden = token_states_of_batch(model, learner.policy, batch)
    values = hidden.astype(jnp.float32) @ learner.head["weight"] + learner.head["bias"]
    return logps, values


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    model: Model,
    sizes: tuple[int, int, bool],
    learner: Learner,
    reference: Any,
    opt_state: Any,
    batch: Batch,
    scores: Array,
    numbers: dict[str, Array],
    key: Array,
) -> tuple[Learner, Any, dict[str, Array]]:
    """Returns what is trained and its optimiser's state after a step, and the step's figures."""
    epochs, minibatches, whiten = sizes
    rollouts, told = _judged(model, learner, reference, batch, scores, numbers, whiten)
    count = len(rollouts.logps)
    keys = jax.random.split(key, epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, count))(keys).reshape(epochs * minibatches, -1)
    tx = _adam(numbers["learning_rate"], numbers["max_grad_norm"])

    def one(state: tuple[Learner, Any], chosen: Array) -> tuple[tuple[Learner, Any], dict[str, Array]]:
        learner, opt_state = state
        mini = jax.tree.map(lambda x: x[chosen], rollouts)
        slopes, figures = jax.grad(partial(_objective, model, mini, numbers), has_aux=True)(learner)
        updates, opt_state = tx.update(slopes, opt_state, learner)
        new: Any = optax.apply_updates(learner, updates)
        return (new, opt_state), figures

    (learner, opt_state), figures = jax.lax.scan(one, (learner, opt_state), orders)
    return learner, opt_state, told | jax.tree.map(jnp.mean, figures)


def _judged(
    model: Model, learner: Learner, reference: Any, batch: Batch, scores: Array, numbers: dict[str, Array], whiten: bool
) -> tuple[Rollouts, dict[str, Array]]:
    """Returns completions with what they were worth, from a batch [M, R, ...] and scores [M, R], and its figures."""
    logps, values = jax.lax.map(partial(_scored, model, learner), batch)
    ref_logps = jax.lax.map(partial(token_logps_of_batch, model, reference), batch)
    batch, logps, values, ref_logps, scores = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (batch, logps, values, ref_logps, scores)
    )
    mask = batch.slot >= 0
    rewards = parts.token_rewards(scores, logps, ref_logps, mask, numbers["kl_coef"])
    rewards = parts.whiten(rewards, mask, center=False) if whiten else rewards
    found = parts.advantages(rewards, values, mask, numbers["gamma"], numbers["lam"])
    told = {
        "score": scores.mean(),
        "kl": jnp.where(mask, logps - ref_logps, 0.0).sum(axis=1).mean(),
        "length": mask.sum(axis=1).mean(dtype=jnp.float32),
    }
    return Rollouts(batch, logps, values, parts.whiten(found, mask), found + values), told


def _objective(
    model: Model, rollouts: Rollouts, numbers: dict[str, Array], learner: Learner
) -> tuple[Array, dict[str, Array]]:
    """Returns what a minibatch's gradient is taken of, and figures."""
    mask = rollouts.batch.slot >= 0
    logps, values = _scored(model, learner, rollouts.batch)
    policy = parts.policy_loss(logps, rollouts.logps, rollouts.advantages, mask, numbers["clip"])
    value = parts.value_loss(values, rollouts.values, rollouts.returns, mask, numbers["value_clip"])
    clipped = parts.masked_mean(jnp.abs(jnp.expm1(logps - rollouts.logps)) > numbers["clip"], mask)
    told = {"policy_loss": policy, "value_loss": value, "clipped": clipped}
    return policy + numbers["vf_coef"] * value, told
