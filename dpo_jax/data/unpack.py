"""Values of a packed batch, by example."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.data import pack
from dpo_jax.data.collate import default_layout
from dpo_jax.data.table import Table
from dpo_jax.records import Array


def unpack(values: Any, table: Table, indices: Sequence[int] | Array, layout: pack.Layout | None = None) -> Any:
    """Returns values of a packed batch by example, in the order of `indices`.

    Args:
      values: an array [M, R, G, ...] or [M * R * G, ...], as the evaluation step or `sequence_logps` return them; also
        a dict or record of such arrays. Numbers stay as they are.
      table, indices, layout: as for `collate`, of the batch that the values belong to.

    Returns:
      Arrays [n, ...] on the host.
    """
    chosen = np.asarray(indices)
    batch, _, places = pack.build_batch(table, chosen, layout or default_layout(table, len(chosen)))
    shape = batch.weights.shape

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: one(part) for name, part in value.items()}
        if isinstance(value, tuple):
            return type(value)(*map(one, value))
        if np.ndim(value) == 0:
            return value
        value = np.asarray(value)
        return pack.unpack_batch(value.reshape(*shape, *value.shape[3 if value.shape[:3] == shape else 1 :]), places)

    return one(values)
