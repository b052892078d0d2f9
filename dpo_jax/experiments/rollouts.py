"""Training on samples of the policy: the problem that PPO and online DPO solve, and sampling with scores."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.models.interface import Model
from dpo_jax.records import Array
from dpo_jax.sampling import generate

RewardOfIds = Callable[[list[Array], list[Array]], np.ndarray]
"""(prompts, completions), n arrays of ids each -> float[n]. A completion ends with one of `ends` unless it was cut."""
OnStep = Callable[[int, Any], None]
"""(steps done, the policy's parameters)."""
OnMetrics = Callable[[int, dict[str, float]], None]
"""(steps done, metrics of the step)."""


class Problem(NamedTuple):
    """A policy to train on its own samples.

    Attributes:
      model: pure functions of policy and reference.
      policy: parameters at the start.
      reference: frozen parameters.
      prompts: int32 ids; each step samples some of them.
      reward: scores completions.
      steps: steps to train, each with new samples.
      seed: seed of all random numbers.
      ends: ids of the tokens that end a completion.
    """

    model: Model
    policy: Any
    reference: Any
    prompts: Sequence[Array]
    reward: RewardOfIds
    steps: int
    seed: int
    ends: tuple[int, ...]


class Samples(NamedTuple):
    """Samples of a policy: n prompts with `copies` completions each.

    Attributes:
      prompts: n arrays int32.
      completions: n * copies arrays int32; completions of one prompt are adjacent.
      scores: float[n * copies], as the reward returned them.
    """

    prompts: list[Array]
    completions: list[Array]
    scores: Array


def on_devices(problem: Problem) -> Problem:
    """Returns the problem with parameters on the devices and a hashable model, so that jit can take it as static."""
    policy, reference = jax.device_put((problem.policy, problem.reference))
    return problem._replace(model=problem.model._replace(axes=None), policy=policy, reference=reference)


def sample_rollouts(
    problem: Problem, policy: Any, random: np.random.Generator, prompts: int, copies: int, max_new_tokens: int
) -> Samples:
    """Returns scored samples of a policy at temperature 1; prompts repeat only if there are too few.

    Args:
      problem: model, prompts and reward.
      policy: the policy's parameters.
      random: chooses the prompts and the seed of the completions.
      prompts: prompts to choose.
      copies: completions of each prompt.
      max_new_tokens: length of the longest completion.
    """
    chosen = random.choice(len(problem.prompts), prompts, replace=prompts > len(problem.prompts))
    asked = [np.asarray(problem.prompts[i], np.int32) for i in chosen]
    completions = generate(
        problem.model, policy, asked, copies=copies, max_new_tokens=max_new_tokens, eos_id=problem.ends,
        seed=int(random.integers(2**31)), batch_size=copies * prompts,
    )  # fmt: skip
    return Samples(asked, completions, problem.reward([p for p in asked for _ in range(copies)], completions))
