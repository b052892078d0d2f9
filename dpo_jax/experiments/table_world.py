"""A world in which sums over every response are exact, and policies that are tables of next-token logits.

A response is up to `LONGEST` tokens of a small alphabet with an end; one of the greatest length has none. A table has
an entry for each next token at each prefix, of each prompt: for n = 0, 1, ... tokens before, float[X, A^n, A + 1] with
the end last. X prompts, Y responses. A table of logits can be any policy, so that what a loss misses is due to the loss
and its data; responses share prefixes, as a language model's do, and have lengths.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax
from scipy.interpolate import CubicHermiteSpline

from dpo_jax.experiments.optimum import tilted_weights
from dpo_jax.records import Array

ALPHABET, LONGEST, PROMPTS = 3, 4, 4
SPREAD = 2.0  # standard deviation of the reward under the reference: a judge is right about four of five pairs
FLIPPED = 0.2  # share of the pairs whose scores are exchanged, where labels are flipped
LIST = 4  # responses of a list: two pairs
LABELS = {
    "clean": "the better response is the chosen one",
    "flipped": f"a share of {FLIPPED:g} of the pairs the other way round",
    "bradley_terry": "chosen with probability sigmoid(difference of rewards)",
    "off_policy": "clean, of responses that another policy wrote",
}


class TableWorld(NamedTuple):
    """A reference and a reward.

    Attributes:
      logits: the table of the reference.
      reference: float32[X, Y], its log-probs.
      reward: float32[X, Y], in nats; mean 0 and standard deviation `SPREAD` under the reference of each prompt.
      lengths: float32[Y], tokens of each response, its end included.
      other: float32[X, Y], log-probs of the policy that writes off-policy responses.
    """

    logits: tuple[Array, ...]
    reference: Array
    reward: Array
    lengths: Array
    other: Array


class ScoredLists(NamedTuple):
    """Scored lists of responses: list m has prompt m mod X.

    Attributes:
      ids: int32[M, LIST], responses, all different.
      scores: float32[M, LIST]; the annotator's, from whose order every label is made.
    """

    ids: Array
    scores: Array


def path_sums(table: Sequence[Array], xp: Any = jnp) -> Array:
    """Returns the sum of a table's entries along each response, float[X, Y]: short responses first."""
    before, ended = xp.zeros((len(table[0]), 1)), []
    for level in table:
        after = before[:, :, None] + level
        ended.append(after[:, :, -1])
        before = after[:, :, :-1].reshape(len(level), -1)
    return xp.concatenate([*ended, before], axis=1)


def logits_logps(logits: Sequence[Array]) -> Array:
    """Returns log pi of every response, float[X, Y], of a table of logits."""
    return path_sums([log_softmax(level) for level in logits])


def table_lengths(alphabet: int, longest: int) -> Array:
    """Returns the tokens of each response, float32[Y], an end included."""
    ended = [np.full(alphabet**n, n + 1) for n in range(longest)]
    return np.concatenate([*ended, np.full(alphabet**longest, longest)]).astype(np.float32)


def make_world(
    seed: int, prompts: int = PROMPTS, alphabet: int = ALPHABET, longest: int = LONGEST, spread: float = SPREAD
) -> TableWorld:
    """Returns a random world: normal logits, and a reward that sums a normal value of each token at each prefix."""
    random = np.random.default_rng([seed, 0])
    logits, values, other = (
        tuple(random.normal(size=(prompts, alphabet**n, alphabet + 1)).astype(np.float32) for n in range(longest))
        for _ in range(3)
    )
    reference, other = (np.asarray(logits_logps(table)) for table in (logits, other))
    reward, lengths = path_sums(values, np), table_lengths(alphabet, longest)
    mass = np.exp(reference) / np.exp(reference).sum(1, keepdims=True)
    reward = reward - (mass * reward).sum(1, keepdims=True)
    reward *= spread / np.sqrt((mass * reward**2).sum(1, keepdims=True))
    return TableWorld(logits, reference, reward.astype(np.float32), lengths, other)


def sample_lists(world: TableWorld, labels: str, count: int, seed: int) -> ScoredLists:
    """Returns lists of different responses of the reference, with the scores of an annotator.

    Scores are rewards; where labels are flipped, those of some pairs (the first two responses of a list, and the last
    two) are exchanged, and for Bradley-Terry each has Gumbel noise, so that the order is a sample of Plackett-Luce's.
    """
    random = np.random.default_rng([seed, 1, list(LABELS).index(labels)])
    prompts = np.arange(count) % len(world.reward)
    writer = (world.other if labels == "off_policy" else world.reference)[prompts]
    ids = np.argsort(-(writer + random.gumbel(size=writer.shape)), axis=1)[:, :LIST]
    scores = world.reward[prompts[:, None], ids]
    if labels == "bradley_terry":
        scores = scores + random.gumbel(size=scores.shape)
    if labels == "flipped":
        pairs = scores.reshape(-1, 2)
        scores = np.where(random.random((len(pairs), 1)) < FLIPPED, pairs[:, ::-1], pairs).reshape(scores.shape)
    return ScoredLists(ids.astype(np.int32), scores.astype(np.float32))


class ExactFrontier:
    """The highest reward of any policy at each KL from the reference, in a world: exact sums over all responses.

    Optima at many betas are joined by a spline of the reward over the square root of the KL, whose slope is known:
    d reward / d KL is beta.
    """

    def __init__(self, world: TableWorld, betas: Sequence[float] = tuple(np.geomspace(100.0, 0.02, 400))):
        reward, base = (np.asarray(x, np.float64) for x in (world.reward, world.reference))
        points = [[part.mean() for part in tilted_weights(reward, base, beta)[:2]] for beta in betas]
        mass = np.exp(base)
        start = (mass * reward).sum(1)
        variance = ((mass * reward**2).sum(1) - start**2).mean()
        rewards, kls = np.array([[start.mean(), 0.0], *points]).T
        slopes = np.concatenate([[np.sqrt(2 * variance)], 2 * np.sqrt(kls[1:]) * np.asarray(betas)])
        apart = np.diff(kls, prepend=-1.0) > 1e-9  # at the smallest betas the best response has all probability
        self.start, self.furthest = float(start.mean()), float(kls[-1])
        self._spline = CubicHermiteSpline(np.sqrt(kls[apart]), rewards[apart], slopes[apart])

    def at(self, kl: Array) -> Array:
        """Returns the highest reward at KLs, float64[...]; beyond the last optimum its reward."""
        return self._spline(np.sqrt(np.clip(kl, 0.0, self.furthest)))
