"""Responses with a token after their last one: in a row there is no last token, and a reward model must see it."""

import dataclasses

import numpy as np

from dpo_jax.data.table import Table, offsets_of


def ended(table: Table, end: int, pad: int) -> Table:
    """Returns a table in which a token follows each response, but for one whose last token is padding.

    A reward is then read at the last token that is no padding, as transformers reads it: EOS or, where texts are
    padded with EOS, the token before it.

    Args:
      table: comparisons.
      end: the token that follows.
      pad: the token that texts are padded with.
    """
    ends, sizes = table.offsets[:, 2:], table.response_lengths
    grown = (sizes > 0) & (table.ids[np.maximum(ends - 1, 0)] != pad)
    return dataclasses.replace(
        table,
        ids=np.insert(table.ids, ends[grown], end),
        offsets=offsets_of(np.column_stack([table.prompt_lengths, sizes + grown]).tolist()),
    )
