"""A tiny model with so few completions that sums over all of them are exact, and its optimal policy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoConfig

from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.experiments.rollouts import Problem
from dpo_jax.logprobs import batch_logps
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens

EOS, VOCAB, LONGEST = 2, 5, 2
PROMPTS = [np.array([1, 3], np.int32), np.array([1, 4, 4], np.int32)]
# All completions: EOS, another token and EOS, or two other tokens.
RESPONSES = [
    np.array(ids, np.int32)
    for n in range(1, LONGEST + 1)
    for ids in itertools.product(range(VOCAB), repeat=n)
    if EOS not in ids[:-1] and (ids[-1] == EOS or n == LONGEST)
]
PLACE = {tuple(r.tolist()): i for i, r in enumerate(RESPONSES)}
REWARD = np.random.default_rng(3).normal(size=(len(PROMPTS), len(RESPONSES)))
CONFIG = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16, "initializer_range": 0.1,
}  # fmt: skip


@functools.cache
def world():
    """Returns the model and the reference's parameters."""
    config = AutoConfig.for_model("llama", **CONFIG).to_dict()
    model = build_model(architecture_of(config))
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(0)))


@functools.cache
def _compiled():
    model, _ = world()
    table = Table.of(Tokens(p, (r,)) for p in PROMPTS for r in RESPONSES)
    batch, _, places = pack.build_batch(table, np.arange(len(table)), pack.Layout(1, 64, 8, 1, LONGEST))
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    return jax.jit(lambda params: batch_logps(model, params, one).policy), places


def exact(params):
    """Returns log pi of every completion of every prompt, float64[prompts, responses]."""
    logps_of, places = _compiled()
    logps = np.asarray(logps_of(params), np.float64)[places[:, 1], 0]
    return logps.reshape(len(PROMPTS), len(RESPONSES))


def reward(prompts, completions):
    """The true reward of ids."""
    rows = [int(np.array_equal(p, PROMPTS[1])) for p in prompts]
    return np.array([REWARD[x, PLACE[tuple(c.tolist())]] for x, c in zip(rows, completions, strict=True)], np.float32)


def problem(steps, seed):
    """The problem of training the reference on its own samples."""
    model, reference = world()
    return Problem(model, reference, reference, PROMPTS, reward, steps=steps, seed=seed, ends=(EOS,))


def optimum(reference, beta):
    """The closed form ref exp(r / beta) / Z (paper, eq. 4), as log-probs."""
    logits = reference + REWARD / beta
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def distance(a, b):
    """The total variation distance, the larger one of the prompts."""
    return 0.5 * np.abs(np.exp(a) - np.exp(b)).sum(axis=1).max()


def kl(a, b):
    """KL(a || b), averaged over the prompts."""
    return float((np.exp(a) * (a - b)).sum(axis=1).mean())
