"""Responses with a token after their last one: in a row there is no last token, and a reward model must see it."""

from collections.abc import Iterator

import numpy as np

from dpo_jax.data.table import Table
from dpo_jax.records import Array, Tokens


def ended(table: Table, end: int, pad: int) -> Iterator[Tokens]:
    """Yields comparisons in which a token follows each response, but for one whose last token is padding.

    A reward is then read at the last token that is no padding, as transformers reads it: EOS or, where texts are
    padded with EOS, the token before it.

    Args:
      table: comparisons.
      end: the token that follows.
      pad: the token that texts are padded with.
    """

    def longer(response: Array) -> Array:
        return np.append(response, np.int32(end)) if len(response) and response[-1] != pad else response

    for index in range(len(table)):
        row = table[index]
        yield row._replace(responses=tuple(map(longer, row.responses)))
