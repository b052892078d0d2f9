"""The order of the data: step number -> indices of the comparisons of that step's batch.

It is a pure function of the step, so that a run resumes from an integer and every process computes the same batch.
"""

import functools
import random
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt64

from dpo_jax.errors import UserError

Order = Callable[[int], Int64[np.ndarray, " N"]]
"""epoch -> int64[N], a permutation of the indices of a table's comparisons."""


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Returns the number of full batches in an epoch. The incomplete last batch is dropped, as in the paper's code.

    Args:
      rows: N, comparisons in the table.
      batch_size: comparisons per step.

    Raises:
      UserError: there is no full batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    if rows < batch_size:
        raise UserError(f"batch_size {batch_size} is more than the {rows} comparisons there are; lower it or add data")
    return rows // batch_size


def example_indices(step: int, order: Order, *, rows: int, batch_size: int) -> Int64[np.ndarray, " batch_size"]:
    """Returns the indices of the comparisons of one step; no comparison comes twice in an epoch.

    Args:
      step: step number, from 0, counted across epochs.
      order: the permutation of each epoch, from `bind_order`.
      rows: N, comparisons in the table.
      batch_size: comparisons per step.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    epoch, batch = divmod(step, steps_per_epoch(rows, batch_size))
    return order(epoch)[batch * batch_size : (batch + 1) * batch_size].copy()


def bind_order(name: str, prompts: UInt64[np.ndarray, " N"], seed: int) -> Order:
    """Returns the order `name` over the comparisons of a table.

    Args:
      name: `seeded` shuffles comparisons, each epoch independently. `original` shuffles prompts and keeps the
        comparisons of a prompt together, exactly as the paper's code does.
      prompts: prompt keys, equal for equal prompts (`Table.prompts`).
      seed: any integer; ignored by `original`, whose seed is 0.
    """
    if name == "original":
        groups = _comparisons_by_prompt(prompts)
        return functools.lru_cache(maxsize=2)(lambda epoch: _original(groups, epoch))
    return functools.lru_cache(maxsize=2)(lambda epoch: _seeded(len(prompts), seed, epoch))


def original_seeds(epochs: int) -> list[int]:
    """Returns the seeds with which the paper's code shuffles its first epochs (it draws a million of them)."""
    return np.random.RandomState(0).randint(0, 2**32, size=1_000_000)[:epochs].tolist()


def _seeded(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " N"]:
    # Philox's raw words are fixed by its definition; Generator.permutation may change with any release of numpy.
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def _original(groups: list[Int64[np.ndarray, " n"]], epoch: int) -> Int64[np.ndarray, " N"]:
    """Returns the order of `get_batch_iterator` in the paper's code.

    That code shuffles one list of prompts in place at the start of every epoch, so each order is a shuffle of the one
    before: the shuffles of all earlier epochs are replayed. Each uses Python's `random` with a seed of its own.
    """
    order = list(range(len(groups)))
    for seed in original_seeds(epoch + 1):
        random.Random(seed).shuffle(order)
    return np.concatenate([groups[prompt] for prompt in order])


def _comparisons_by_prompt(prompts: UInt64[np.ndarray, " N"]) -> list[Int64[np.ndarray, " n"]]:
    """Returns the indices of each prompt's comparisons, prompts in the order of their first comparison."""
    _, first, prompt = np.unique(prompts, return_index=True, return_inverse=True)
    indices = np.argsort(first[prompt], kind="stable")
    return np.split(indices, np.flatnonzero(np.diff(first[prompt][indices])) + 1)
