"""Reference log-probs: computed under the frozen parameters, cached by content or filled in just in time."""

import functools
import hashlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import distributed
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.logprobs import LogpsFn, as_ref_logps, batch_logps
from dpo_jax.microbatches import map_microbatches
from dpo_jax.models.attention import CHUNKS
from dpo_jax.models.interface import Model
from dpo_jax.paths import read_checked, write_checked
from dpo_jax.records import Array, Batch
from dpo_jax.sharding import NO_COLLECTIVES, Collectives


def make_ref_logps_fn(logps: LogpsFn, collectives: Collectives = NO_COLLECTIVES) -> Callable[[Any, Batch, Any], Array]:
    """Returns the compiled `(params, batch, count) -> ref_logps`, float32[M, R, G, P, 2], sharded as the batch."""

    def ref_logps(params: Any, batch: Batch, count: Array) -> Array:
        return map_microbatches(lambda micro: as_ref_logps(logps(params, micro), micro), batch, count)

    return jax.jit(collectives.map_rows(ref_logps))


def with_reference(model: Model, params: Any, batch: Batch, count: int | Array) -> Batch:
    """Returns the batch with `ref_logps` filled in by the frozen parameters.

    Args:
      model: pure functions of the reference.
      params: its parameters.
      batch: fields [M, R, ...], from `collate`.
      count: microbatches that hold any comparison.
    """
    # A model without its dict fields can be the key of a cache, so that each model compiles once.
    return batch._replace(ref_logps=_ref_logps_of(model._replace(axes=None, hf_config=None))(params, batch, count))


@functools.lru_cache(maxsize=8)
def _ref_logps_of(model: Model) -> Callable[[Any, Batch, Any], Array]:
    return make_ref_logps_fn(partial(batch_logps, model))


def ref_logps_key(table: Table, weights_hash: str, compute: str, attention: str = CHUNKS) -> str:
    """Returns the cache key: a hash of the truncated token ids, weights, compute dtype and attention kernel.

    Nothing else changes the log-probs, so runs with other losses and hyper-parameters share an entry.
    """
    how = compute if attention == CHUNKS else f"{compute} {attention}"
    return hashlib.blake2b(f"{table.digest} {weights_hash} {how}".encode(), digest_size=16).hexdigest()


def table_ref_logps(
    ref_logps: Callable, params: Any, table: Table, layout: pack.Layout, batch_size: int, put: Callable
) -> Array:
    """Returns the log-probs of every response of a table and of its shared part, float32[N, P, 2].

    Args:
      ref_logps: from `make_ref_logps_fn`.
      params: the frozen parameters.
      table: N comparisons.
      layout: of a batch of `batch_size` comparisons.
      batch_size: comparisons per batch.
      put: moves a Batch to the devices.
    """
    parts = []
    for start in range(0, len(table), batch_size):
        rows = np.arange(start, min(start + batch_size, len(table)))
        batch, count, places = pack.build_batch(table, rows, layout)
        parts.append(pack.unpack_batch(distributed.fetch(ref_logps(params, put(batch), count)), places))
    return np.concatenate(parts)


def _kept(path: Path, shape: tuple[int, ...]) -> Array | None:
    """Returns the array in a file if it is intact, finite and of that shape, else None."""
    if (content := read_checked(path)) is None:
        return None
    values = np.load(io.BytesIO(content), allow_pickle=False)
    return values if values.shape == shape and np.isfinite(values).all() else None


def cached_array(folder: Path, name: str, compute: Callable[[], Array], shape: tuple[int, ...]) -> tuple[Array, bool]:
    """Returns a cached array and True, or computes, caches and returns it with False.

    A file that has changed, or does not hold finite numbers of that shape, is replaced.
    """
    path = folder / f"{name}.npy"
    values = _kept(path, shape)
    # Computing is collective, so all processes read the cache or none does; each may have its own disk.
    if distributed.all_agree(values is not None):
        return values, True
    values = compute()
    np.save(content := io.BytesIO(), values)
    write_checked(path, content.getvalue())
    return values, False
