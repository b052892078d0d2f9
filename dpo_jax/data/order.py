"""Which rows a step takes: a pure function of the step, so that resuming a run is knowing an integer."""

import functools
import random
from collections.abc import Callable

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.records import Array

Order = Callable[[int], Array]
"""epoch -> int64[N], the rows of a table in the order in which the epoch takes them."""


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Full batches in an epoch; its incomplete tail is left out, as the original does.

    Raises:
      UserError: there is not one full batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    if rows < batch_size:
        raise UserError(f"batch_size {batch_size} is more than the {rows} comparisons there are; lower it or add data")
    return rows // batch_size


def example_indices(step: int, order: Order, *, rows: int, batch_size: int) -> Array:
    """The rows of a step: int64[batch_size], without repeats inside an epoch.

    Args:
      step: 0 and up, across epochs.
      order: `seeded` or `original`, bound.
      rows: how many there are to choose from.
      batch_size: rows for each step.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    epoch, batch = divmod(step, steps_per_epoch(rows, batch_size))
    return order(epoch)[batch * batch_size : (batch + 1) * batch_size].copy()


def bind_order(name: str, prompts: Array, seed: int) -> Order:
    """The order of that name over a table.

    Args:
      name: `seeded` shuffles rows, each epoch from the start; `original` shuffles prompts, as the original code does.
      prompts: uint64[N], equal where the prompts of rows are.
      seed: any integer; has no say in `original`, whose seed is always 0.
    """
    if name == "original":
        groups = _groups(prompts)
        return functools.lru_cache(maxsize=2)(lambda epoch: _original(groups, epoch))
    return functools.lru_cache(maxsize=2)(lambda epoch: _seeded(len(prompts), seed, epoch))


def original_seeds(epochs: int) -> list[int]:
    """The seeds with which the original shuffles its first epochs, of which it can have a million."""
    return np.random.RandomState(0).randint(0, 2**32, size=1_000_000)[:epochs].tolist()


def _seeded(rows: int, seed: int, epoch: int) -> Array:
    # Raw Philox words are fixed by its definition; numpy keeps the right to change Generator.permutation.
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable").astype(np.int64)


def _original(groups: list[Array], epoch: int) -> Array:
    """The original's `get_batch_iterator`: each epoch shuffles the order of the one before it."""
    order = list(range(len(groups)))
    for seed in original_seeds(epoch + 1):
        random.Random(seed).shuffle(order)
    return np.concatenate([groups[prompt] for prompt in order])


def _groups(prompts: Array) -> list[Array]:
    """The rows of each prompt, int64[n], prompts in the order in which they first appear."""
    _, first, prompt = np.unique(prompts, return_index=True, return_inverse=True)
    rows = np.argsort(first[prompt], kind="stable")
    return np.split(rows, np.flatnonzero(np.diff(first[prompt][rows])) + 1)
