"""PPO on a reward with a KL penalty towards the reference: the paper's baselines PPO and PPO-GT.

Policy and value function share all layers: the value of a text is a linear head's output on the hidden state of its
last token, as in TRL's PPOTrainer. Each step samples completions, scores them and trains on them in several passes over
minibatches. `ppo_parts` has the equations and their sources.
"""

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
from dpo_jax.experiments.rollouts import OnMetrics, OnStep, Problem, on_devices, sample_rollouts
from dpo_jax.logprobs import token_logps_of_batch, token_states_of_batch
from dpo_jax.models.interface import Model
from dpo_jax.records import Array, Batch, Tokens


class PpoOptions(NamedTuple):
    """Options of PPO. Defaults are those of the code of Ziegler et al. 2019, or TRL's where they depend on the task.

    Attributes:
      kl_target: target of the KL controller, nats per completion.
      learning_rate: of Adam (epsilon 1e-5) in the first step; it decays linearly to 0 after the last.
      rollouts: completions per step.
      inner_epochs: passes over the completions of a step.
      minibatches: minibatches per pass, of equal size.
      max_new_tokens: length of the longest completion.
      gamma: discount.
      lam: lambda of the advantage estimates.
      clip: the ratio of probabilities is clipped to 1 - clip and 1 + clip.
      value_clip: the new value is clipped to this distance from the old one.
      vf_coef: weight of the value function's loss.
      init_kl_coef: KL coefficient (beta) at the start.
      horizon: completions in which the controller corrects its error; infinite for a constant beta.
      whiten_rewards: whether the rewards of a step are divided by their standard deviation.
      max_grad_norm: gradients are clipped to this global norm.
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
    """Trained parameters: the policy's, and the value function's head {weight: [D], bias: []} on its hidden states."""

    policy: Any
    head: dict[str, Array]


class Rollouts(NamedTuple):
    """The completions of a step, one to a row; float32[N, T] except the batch.

    Attributes:
      batch: fields [N, ...].
      logps: log pi of the tokens under the policy that sampled them.
      values: the value function's at that time.
      advantages: whitened advantage estimates.
      returns: targets of the value function, advantage plus value.
    """

    batch: Batch
    logps: Array
    values: Array
    advantages: Array
    returns: Array


def train_ppo(
    problem: Problem, options: PpoOptions, on_step: OnStep | None = None, on_metrics: OnMetrics | None = None
) -> Any:
    """Returns the policy's parameters after PPO.

    Runs of one model with the same sizes share their compiled programs, whatever their other options. The sizes are
    `rollouts`, `inner_epochs`, `minibatches`, `max_new_tokens` and the longest prompt in units of 32 tokens.

    Args:
      problem: model, parameters, prompts, reward; each of its steps has `rollouts` completions.
      options: hyper-parameters and sizes.
      on_step: called after each step with the parameters.
      on_metrics: called after each step with score, kl, kl_coef, length, policy_loss, value_loss and clipped.

    Raises:
      UserError: incompatible options, no prompts, or a step that is not finite.
    """
    _check(options, problem)
    layout, problem = _layout(options, max(map(len, problem.prompts))), on_devices(problem)
    learner = _first_learner(problem.model, problem.policy)
    opt_state, kl_coef = _adam(0.0, 0.0).init(learner), options.init_kl_coef
    constants = {name: value for name, value in options._asdict().items() if isinstance(value, float)}
    sizes = options.inner_epochs, options.minibatches, options.whiten_rewards
    for step in range(problem.steps):
        random = np.random.default_rng((problem.seed, step))
        batch, scores = _sampled_batch(problem, learner.policy, options, layout, random)
        key = jax.random.key(int(random.integers(2**31)))
        hparams = constants | {"learning_rate": options.learning_rate * (1 - step / problem.steps), "kl_coef": kl_coef}
        learner, opt_state, found = _step(
            problem.model, sizes, learner, problem.reference, opt_state, batch, scores, hparams, key
        )
        metrics = {name: float(value) for name, value in found.items()} | {"kl_coef": kl_coef}
        if not np.isfinite(list(metrics.values())).all():
            raise UserError(f"PPO is not finite at step {step + 1} ({metrics}); lower learning_rate")
        kl_coef = parts.adapt_kl_coef(kl_coef, metrics["kl"], options.kl_target, options.rollouts, options.horizon)
        if on_metrics is not None:
            on_metrics(step + 1, metrics)
        if on_step is not None:
            on_step(step + 1, learner.policy)
    return learner.policy


def _check(options: PpoOptions, problem: Problem) -> None:
    """Rejects options without a meaning."""
    if options.minibatches < 1 or options.rollouts < 1 or options.rollouts % options.minibatches:
        raise UserError(
            f"PPO: {options.rollouts} rollouts do not divide into {options.minibatches} equal minibatches; change one"
        )
    if not options.kl_target > 0 or not options.horizon > 0:
        raise UserError("PPO: kl_target and horizon must be above 0; an infinite horizon keeps the KL coefficient")
    if not len(problem.prompts):
        raise UserError("PPO: there are no prompts; give at least one")


def _layout(options: PpoOptions, longest: int) -> pack.Layout:
    """Returns the layout of a step's completions: one to a row, one minibatch's number of rows per microbatch."""
    new = options.max_new_tokens
    return pack.Layout(options.minibatches, options.rollouts // options.minibatches, longest + new, 1, new)


def _first_learner(model: Model, policy: Any) -> Learner:
    """Returns the learner at the start; its value function is 0 everywhere."""
    width = model.architecture.width + model.architecture.head_bias  # see `Model.head`
    return Learner(policy, {"weight": jnp.zeros(width), "bias": jnp.zeros(())})


def _sampled_batch(
    problem: Problem, policy: Any, options: PpoOptions, layout: pack.Layout, random: np.random.Generator
) -> tuple[Batch, Array]:
    """Returns a step's completions as a batch [M, R, ...], one to a row, and their scores float32[M, R]."""
    samples = sample_rollouts(problem, policy, random, options.rollouts, 1, options.max_new_tokens)
    table = Table.of(Tokens(p, (c,)) for p, c in zip(samples.prompts, samples.completions, strict=True))
    batch, _, places = pack.build_batch(table, np.arange(options.rollouts), layout)
    scores = np.zeros((layout.microbatches, layout.rows), np.float32)
    scores[places[:, 0], places[:, 1]] = np.asarray(samples.scores, np.float32)
    return batch, scores


def _adam(learning_rate: Any, norm: Any) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(norm), optax.adam(learning_rate, eps=1e-5))


def _logps_and_values(model: Model, learner: Learner, batch: Batch) -> tuple[Array, Array]:
    """Returns log-probs and values of tokens, float32[R, T]; a value is that of the text before the token."""
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
    hparams: dict[str, Array],
    key: Array,
) -> tuple[Learner, Any, dict[str, Array]]:
    """Returns the learner and the optimizer's state after a step, and the step's metrics."""
    epochs, minibatches, whiten = sizes
    rollouts, metrics = _with_advantages(model, learner, reference, batch, scores, hparams, whiten)
    count = len(rollouts.logps)
    keys = jax.random.split(key, epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, count))(keys).reshape(epochs * minibatches, -1)
    tx = _adam(hparams["learning_rate"], hparams["max_grad_norm"])

    def update(state: tuple[Learner, Any], chosen: Array) -> tuple[tuple[Learner, Any], dict[str, Array]]:
        learner, opt_state = state
        minibatch = jax.tree.map(lambda x: x[chosen], rollouts)
        gradient, metrics = jax.grad(partial(_objective, model, minibatch, hparams), has_aux=True)(learner)
        updates, opt_state = tx.update(gradient, opt_state, learner)
        new: Any = optax.apply_updates(learner, updates)
        return (new, opt_state), metrics

    (learner, opt_state), of_updates = jax.lax.scan(update, (learner, opt_state), orders)
    return learner, opt_state, metrics | jax.tree.map(jnp.mean, of_updates)


def _with_advantages(
    model: Model, learner: Learner, reference: Any, batch: Batch, scores: Array, hparams: dict[str, Array], whiten: bool
) -> tuple[Rollouts, dict[str, Array]]:
    """Returns the completions of a batch [M, R, ...] with advantages and returns from scores [M, R], and metrics."""
    logps, values = jax.lax.map(partial(_logps_and_values, model, learner), batch)
    ref_logps = jax.lax.map(partial(token_logps_of_batch, model, reference), batch)
    batch, logps, values, ref_logps, scores = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (batch, logps, values, ref_logps, scores)
    )
    mask = batch.slot >= 0
    rewards = parts.token_rewards(scores, logps, ref_logps, mask, hparams["kl_coef"])
    rewards = parts.whiten(rewards, mask, center=False) if whiten else rewards
    advantages = parts.advantages(rewards, values, mask, hparams["gamma"], hparams["lam"])
    metrics = {
        "score": scores.mean(),
        "kl": jnp.where(mask, logps - ref_logps, 0.0).sum(axis=1).mean(),
        "length": mask.sum(axis=1).mean(dtype=jnp.float32),
    }
    return Rollouts(batch, logps, values, parts.whiten(advantages, mask), advantages + values), metrics


def _objective(
    model: Model, rollouts: Rollouts, hparams: dict[str, Array], learner: Learner
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of a minibatch, and metrics."""
    mask = rollouts.batch.slot >= 0
    logps, values = _logps_and_values(model, learner, rollouts.batch)
    policy = parts.policy_loss(logps, rollouts.logps, rollouts.advantages, mask, hparams["clip"])
    value = parts.value_loss(values, rollouts.values, rollouts.returns, mask, hparams["value_clip"])
    clipped = parts.masked_mean(jnp.abs(jnp.expm1(logps - rollouts.logps)) > hparams["clip"], mask)
    metrics = {"policy_loss": policy, "value_loss": value, "clipped": clipped}
    return policy + hparams["vf_coef"] * value, metrics
