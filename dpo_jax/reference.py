"""The reference column: log-probs under the frozen parameters, from a cache keyed by content or just in time."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import LogpsFn, as_ref_logps, map_microbatches
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.records import Array, Batch
from dpo_jax.sharding import NO_COLLECTIVES, Collectives


def make_ref_logps_fn(logps: LogpsFn, rows: Collectives = NO_COLLECTIVES) -> Callable[[Any, Batch, Any], Array]:
    """Returns the compiled `(params, batch, count) -> ref_logps`, float32[M, R, G, P, 2], lying as the batch does."""

    def column(params: Any, batch: Batch, count: Array) -> Array:
        return map_microbatches(lambda micro: as_ref_logps(logps(params, micro), micro), batch, count)

    return jax.jit(rows.each(column))


def ref_logps_key(table: Table, weights_hash: str, compute: str, attention: str = CHUNKS) -> str:
    """Returns the cache's key: token ids (cut as they are), reference weights, compute dtype, kernel of attention, and
    nothing else."""
    how = compute if attention == CHUNKS else f"{compute} {attention}"
    return hashlib.blake2b(f"{table.digest} {weights_hash} {how}".encode(), digest_size=16).hexdigest()


def table_ref_logps(
    column: Callable, params: Any, table: Table, shape: pack.Layout, batch_size: int, put: Callable
) -> Array:
    """Returns log pi_ref of every response of the table, float32[N, P, 2]: of all of it, and of its shared part.

    Args:
      column: from `make_column`.
      params: the frozen parameters.
      table: N comparisons.
      shape: the layout, which holds `batch_size` comparisons.
      batch_size: comparisons at a time.
      put: moves a Batch to the devices.
    """
    parts = []
    for start in range(0, len(table), batch_size):
        rows = np.arange(start, min(start + batch_size, len(table)))
        batch, count, places = pack.build_batch(table, rows, shape)
        parts.append(pack.unpack_batch(distributed.fetch(column(params, put(batch), count)), places))
    return np.concatenate(parts)


def _kept(path: Path, shape: tuple[int, ...]) -> Array | None:
    """Returns the finite numbers of that shape in a file, or None."""
    if not path.is_file():
        return None
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        values = np.empty(0)
    if values.shape == shape and np.isfinite(values).all():
        return values
    print(f"{path}: damaged, computed again")
    return None


def cached_array(folder: Path, name: str, compute: Callable[[], Array], shape: tuple[int, ...]) -> tuple[Array, bool]:
    """Returns the array kept under a name, computing and keeping it when it is absent, and whether it was there.

    A file that does not hold finite numbers of that shape counts as absent and is replaced.
    """
    path = folder / f"{name}.npy"
    values = _kept(path, shape)
    # Either all processes have it, each perhaps on a disk of its own, or all compute it together.
    if distributed.all_agree(values is not None):
        return values, True
    values = compute()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as f:
        np.save(f, values)
    temporary.replace(path)
    return values, False
