"""The systems that run in scripts/bench, the steps that they report, and the rows of every step."""

from typing import NamedTuple

import _bench_levers as levers
import numpy as np

from dpo_jax.data.table import Table

BETA, LEARNING_RATE, CLIP, MAX_LENGTH = 0.1, 1e-6, 1.0, 512


class System(NamedTuple):
    """One way to train: a row of the table.

    Attributes:
      name: dpo_jax, TRL or the original; with what is set apart from its defaults or left out.
      dtype: of activations and products.
      checkpointing: TRL: recompute activations, its default.
      precomputed: the reference's log-probs come from a pass before training.
      grouped: batches of comparisons of like length, which are other batches than everybody else's.
      without: the lever of `_bench_levers` that is taken away.
    """

    name: str
    dtype: str
    checkpointing: bool = False
    precomputed: bool = False
    grouped: bool = False
    without: str = ""

    @property
    def family(self) -> str:
        """Whose it is."""
        return self.name.split()[0]


IN_FLOAT32 = (
    System("dpo_jax", "float32"),
    System("dpo_jax cached", "float32", precomputed=True),
    System("TRL", "float32"),
    System("TRL defaults", "float32", checkpointing=True),
    System("TRL cached", "float32", precomputed=True),
    System("TRL best", "float32", precomputed=True, grouped=True),
    System("original", "float32"),
)
SYSTEMS = tuple(
    system._replace(dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for system in IN_FLOAT32
    # TRL's defaults are bfloat16, the original has float32 only.
    if (dtype, system.name) not in (("float32", "TRL defaults"), ("bfloat16", "original"))
)
LEVERED = tuple(System(f"dpo_jax without {name}", "float32", without=name) for name in levers.LEVERS)


class Step(NamedTuple):
    """One measured step.

    Attributes:
      loss: of the batch.
      seconds, cpu: wall-clock time, and CPU time of the process.
      peak_mb: the greatest memory so far.
      attention: the backend of attention.
      foreign: CPU cores that others used.
    """

    loss: float
    seconds: float
    cpu: float
    peak_mb: float
    attention: str = ""
    foreign: float = 0.0


def order(table: Table, steps: int, batch_size: int, grouped: bool = False) -> np.ndarray:
    """Returns the rows of every step, int[steps, batch_size]: the same ones for all, or those sorted by length."""
    rows = np.random.default_rng(0).permutation(len(table))[: steps * batch_size]
    if grouped:
        longest = (table.prompt_lengths + table.response_lengths.max(axis=1))[rows]
        batches = rows[np.argsort(-longest, kind="stable")].reshape(steps, batch_size)
        return np.random.default_rng(1).permutation(batches)
    return rows.reshape(steps, batch_size)
