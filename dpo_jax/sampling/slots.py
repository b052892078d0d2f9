"""Which continuations lie where in a batch, on the host: batches of prompts, padding, and compaction.

Axis letters: P prompts, C copies of a prompt, B = P * C rows, T tokens of a padded prompt.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dpo_jax.records import Array

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of it, so that few lengths are compiled
CACHE_TOKENS = 64  # initial size of the cache; it grows fourfold, because attention also reads its unused part
SHRINK = 4  # a batch is compacted to this part of its rows: each size compiles another program
FEWEST_ROWS = 8  # of a device, after compaction
FEWEST_TOKENS = 32  # still to come: for fewer, compiling another program does not pay


def prompt_batches(
    lengths: list[int], copies: int, batch_size: int, devices: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches: indices of P prompts, and indices of their continuations int32[P, C], -1 for padding.

    All batches have the same shape, with the same number of prompts on each device. Prompts are sorted by length, for
    the least padding. A prompt with more than C copies occurs several times.
    """
    per_prompt = min(copies, batch_size, -(-len(lengths) * copies // devices))
    parts = [(prompt, first) for prompt in np.argsort(lengths, kind="stable") for first in range(0, copies, per_prompt)]
    per_batch = -(-max(1, min(batch_size // max(per_prompt, 1), len(parts))) // devices) * devices
    for start in range(0, len(parts), per_batch):
        chosen, first = np.transpose(parts[start : start + per_batch])
        indices = np.full((per_batch, per_prompt), -1, np.int32)
        copy = first[:, None] + np.arange(per_prompt)
        indices[: len(chosen)] = np.where(copy < copies, chosen[:, None] * copies + copy, -1)
        yield chosen, indices


def pad_prompts(prompts: Sequence[np.ndarray], rows: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask int32[rows, T] of left-padded prompts; the mask is 0 for padding and unused rows.

    T is `length`, by default a multiple of `PROMPT_MULTIPLE`.
    """
    length = length or -(-max(len(p) for p in prompts) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return tokens, mask


def cache_sizes(tokens: int) -> list[int]:
    """Returns the sizes of a growing cache, in tokens; the last one is `tokens`."""
    sizes = [CACHE_TOKENS]
    while sizes[-1] < tokens:
        sizes.append(SHRINK * sizes[-1])
    return [*sizes[:-1], tokens]


def smaller_shape(prompts: int, copies: int, left: int) -> tuple[int, int] | None:
    """Returns P and C of a device after compaction, P no larger than before; None if it does not pay.

    Args:
      prompts, copies: P and C before.
      left: tokens that its texts may still get.
    """
    rows, fewer = prompts * copies // SHRINK, -(-copies // SHRINK)
    return (rows // fewer, fewer) if left >= FEWEST_TOKENS and rows >= FEWEST_ROWS else None


def compacted(alive: Array, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns where the rows of a compacted batch come from; None if they are too many on a device.

    A prompt with more than C living continuations lies there several times.

    Args:
      alive: bool[devices, P, C].
      shape: P and C of a device after compaction.

    Returns:
      int32[devices * P], the former places of the prompts, and int32[devices * P, C], the former rows of the
      continuations, -1 for none. Both count from the first of their device.
    """
    prompts, rows = np.zeros((len(alive), shape[0]), np.int32), np.full((len(alive), *shape), -1, np.int32)
    for device, own in enumerate(alive):
        living = [(place, np.flatnonzero(row) + place * len(row)) for place, row in enumerate(own)]
        parts = [(place, row[i : i + shape[1]]) for place, row in living for i in range(0, len(row), shape[1])]
        if len(parts) > shape[0]:
            return None
        for new, (place, row) in enumerate(parts):
            prompts[device, new], rows[device, new, : len(row)] = place, row
    return prompts.ravel(), rows.reshape(-1, shape[1])


def as_they_are(devices: int, prompts: int, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `compacted` does, for a batch whose rows stay where they are."""
    rows = np.arange(prompts * copies, dtype=np.int32).reshape(prompts, copies)
    return np.tile(np.arange(prompts, dtype=np.int32), devices), np.tile(rows, (devices, 1))


def moved(indices: Array, rows: Array, devices: int) -> np.ndarray:
    """Returns the indices of continuations [devices * P, C] in a batch whose rows come from `rows`."""
    old, new = indices.reshape(devices, -1), rows.reshape(devices, -1)
    return np.where(new < 0, -1, np.take_along_axis(old, np.maximum(new, 0), axis=1)).reshape(rows.shape)
