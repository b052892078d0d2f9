"""Which rows a step takes: a pure function of the step, so that resuming a run is knowing an integer."""

import functools

import numpy as np

from dpo_jax.records import Array, UserError


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


def rows_of(step: int, *, rows: int, batch_size: int, seed: int) -> Array:
    """The rows of a step: int64[batch_size], without repeats inside an epoch, each epoch in an order of its own.

    Args:
      step: 0 and up, across epochs.
      rows: how many there are to choose from.
      batch_size: rows for each step.
      seed: any integer; it and the epoch alone determine the epoch's order.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    epoch, batch = divmod(step, steps_per_epoch(rows, batch_size))
    return _permutation(rows, seed, epoch)[batch * batch_size : (batch + 1) * batch_size].copy()


@functools.lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> Array:
    # Raw Philox words are fixed by its definition; numpy keeps the right to change Generator.permutation.
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable").astype(np.int64)
